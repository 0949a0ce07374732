"""Sampling with a draft, end to end: pairs of tokens are distributed as the target alone has them."""

import numpy as np
import pytest
from planted import PACKAGES, TWO_LAYERS

import loaders.host.speculation
from loaders.host.acceptance import distribution, draw
from parity.zoo.draft import make_drafting_checkpoint

V, ROWS, PROMPT = 19, 3000, [3, 14, 15, 9, 2, 6]
BATCH = np.tile(PROMPT, (ROWS, 1))


@pytest.fixture(scope="module", params=PACKAGES)
def package(request):
    return PACKAGES[request.param]


@pytest.fixture(scope="module")
def model(package, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "a"
    return package.load(make_drafting_checkpoint("qwen3_5", path, **TWO_LAYERS, vocab_size=V), mtp=True)


def expected(model, temperature, top_p, top_k):
    """P(second token, third token) of a row, [V, V], from a full forward over every beginning."""
    pairs = np.stack(np.meshgrid(range(V), range(V), indexing="ij"), axis=-1).reshape(-1, 2)
    logits = np.asarray(model(np.concatenate([np.tile(PROMPT, (len(pairs), 1)), pairs], axis=1)))[:, -3:]
    first_AV, second_AV, third_AV = distribution(logits, temperature, top_p, top_k).swapaxes(0, 1)
    first_V, second_VV, third_VVV = first_AV[0], second_AV[::V], third_AV.reshape(V, V, V)
    return np.einsum("a,ab,abc->bc", first_V, second_VV, third_VVV)


def excess(model, options, seed=0):
    """Chi-square above its degrees of freedom, in standard deviations; cells below 5 together."""
    draft = model.draft
    choices = {"temperature": options[0], "top_p": options[1], "top_k": options[2]}
    tokens = model.generate(BATCH, None, 3, **choices, ignore_eos=True, seed=seed, draft=draft, draft_tokens=2)
    found = np.zeros((V, V))
    np.add.at(found, tuple(np.asarray(tokens)[:, 1:].T), 1)
    want = ROWS * expected(model, options[0], options[1] or 1.0, options[2])
    if found[want == 0].sum():
        return float("inf"), draft.report
    is_rare = want < 5
    found, want = (np.append(cells[~is_rare], cells[is_rare].sum()) for cells in (found, want))
    freedom = len(want) - 1
    chi = ((found - want) ** 2 / np.maximum(want, 1e-9))[want > 0].sum()
    return (chi - freedom) / np.sqrt(2 * freedom), draft.report


@pytest.mark.parametrize("options", [(1.0, None, None), (1.6, None, 7), (1.2, 0.8, None)])
@pytest.mark.slow_unless("torch-*", "jax-options1")
def test_pairs_of_sampled_tokens_have_the_targets_distribution(model, options):
    deviation, report = excess(model, options)
    assert 1.2 < report.acceptance_length < 2.8  # some are taken, some not
    assert deviation < 4


def test_the_test_would_see_a_rule_that_always_accepts(model, monkeypatch):
    def always(drafted_BK, draft_BKV, target_BTV, rng):
        count_B = np.full(len(drafted_BK), drafted_BK.shape[1])
        return count_B, draw(target_BTV[:, -1], rng)

    monkeypatch.setattr(loaders.host.speculation, "accept_sampled", always)
    assert excess(model, (1.0, None, None))[0] > 20


@pytest.mark.slow_unless("torch")
def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(model):
    def sample(seed):
        return np.asarray(
            model.generate(BATCH, None, 3, 1.0, ignore_eos=True, seed=seed, draft=model.draft, draft_tokens=2)
        )

    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()


@pytest.mark.slow_unless("torch")
def test_a_choice_of_one_is_greedy(model):
    want = np.asarray(model.generate(BATCH[:1], None, 3, ignore_eos=True))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        given = {"temperature": 1.7, "draft": model.draft, "draft_tokens": 2} | options
        found = np.asarray(model.generate(BATCH, None, 3, **given, ignore_eos=True))
        assert (found == want).all()


def test_weights_that_take_gradients_draft_too(tmp_path):
    model = PACKAGES["torch"].load(make_drafting_checkpoint("qwen3_5", tmp_path / "it", **TWO_LAYERS), mtp=True)
    options = {"temperature": 1.0, "seed": 3, "draft": model.draft, "max_new_tokens": 4}
    expected = model.generate([[3, 14, 15]], **options)
    model.requires_grad_(True)
    assert (model.generate([[3, 14, 15]], **options) == expected).all()
