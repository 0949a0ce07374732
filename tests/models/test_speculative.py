"""Speculative decoding says what decoding says, greedily token by token, and sampled in distribution."""

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from planted import LENGTHS, PACKAGES, batch, expected_report, load, plant, watch_keep, wrong
from shape_suffixes import checked_shape_suffixes

import jax_models
import jax_models.draft
import loaders.host.speculation
import torch_models.draft
from loaders.host.acceptance import accept_greedy

MODELS = ("qwen3_5", "qwen3_5-tied", "qwen3_5-moe", "qwen3_5-wrapped")
LONGEST = 90


@pytest.fixture(scope="module", params=PACKAGES)
def package(request):
    return PACKAGES[request.param]


@pytest.fixture(scope="module")
def model(package, tmp_path_factory):
    return load(package, tmp_path_factory.mktemp("model") / "a")


@pytest.fixture(scope="module")
def plain(model):
    """What decoding without a draft says, whichever side is padded; twice as long as what tests ask for."""
    return np.asarray(model.generate(*batch("left"), LONGEST + 8, ignore_eos=True))


def ending(model, ends):
    """The same model with other end tokens."""
    document = model.checkpoint.generation_document | {"eos_token_id": ends}
    checkpoint = dataclasses.replace(model.checkpoint, generation_document=document)
    if isinstance(model, jax_models.model.Model):
        return dataclasses.replace(model, checkpoint=checkpoint)
    found = copy.copy(model)
    found.checkpoint = checkpoint
    return found


def accepted_counts(monkeypatch):
    """Every round's counts, [B] each, filled while the model generates."""
    counts = []

    def spy(drafted_BK, best_BT):
        found = accept_greedy(drafted_BK, best_BT)
        counts.append(found[0])
        return found

    monkeypatch.setattr(loaders.host.speculation, "accept_greedy", spy)
    return counts


@pytest.mark.parametrize(("K", "side"), [(1, "left"), (2, "right"), (3, "left"), (4, "left"), (5, "right")])
@pytest.mark.slow_unless("torch-*", "jax-3-left")
def test_greedy_tokens_are_those_without_a_draft_whatever_it_gets_right(model, plain, package, K, side, monkeypatch):
    plant(monkeypatch, model, plain)
    counts = accepted_counts(monkeypatch)
    for N in (1, 2, K, 24) if package is torch_models or K == 3 else (24,):  # JAX compiles for each capacity
        draft = model.draft
        found = model.generate(*batch(side), N, ignore_eos=True, draft=draft, draft_tokens=K)
        np.testing.assert_array_equal(found, plain[:, :N])
        rounds, accepted = expected_report(wrong, K, N)
        assert (draft.report.rounds, draft.report.accepted) == (rounds, accepted)
        assert draft.report.drafted == K * rounds
        assert draft.report.acceptance_length == (1 + accepted / rounds if rounds else 0)
    assert any(set(row) >= {0, K} and len(set(row)) >= min(K + 1, 3) for row in counts)  # all at once, in one batch


@pytest.mark.parametrize("name", MODELS[1:])
@pytest.mark.slow_unless("torch-*", "jax-qwen3_5-tied")
def test_greedy_tokens_are_those_without_a_draft_in_every_family(package, name, tmp_path, monkeypatch):
    model = load(package, tmp_path / "a", name)
    plain = np.asarray(model.generate(*batch("right"), 28, ignore_eos=True))
    free = model.draft
    found = model.generate(*batch("right"), 24, ignore_eos=True, draft=free)
    np.testing.assert_array_equal(found, plain[:, :24])
    assert 1 <= free.report.acceptance_length <= 4
    plant(monkeypatch, model, plain)
    draft = model.draft
    found = model.generate(*batch("right"), 24, ignore_eos=True, draft=draft)
    np.testing.assert_array_equal(found, plain[:, :24])
    assert (draft.report.rounds, draft.report.accepted) == expected_report(wrong, 3, 24)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 8])
def test_a_row_ends_at_its_end_token_also_inside_an_accepted_run(model, plain, index, monkeypatch):
    ends = [int(plain[1, index])]
    model = ending(model, ends)
    plant(monkeypatch, model, plain)
    want = np.asarray(model.generate(*batch("left"), 24))
    assert (want == 5).any()  # the filler
    np.testing.assert_array_equal(model.generate(*batch("left"), 24, draft=model.draft), want)
    stopping = ending(model, [int(row[index]) for row in plain])
    want = np.asarray(stopping.generate(*batch("left"), 24))
    np.testing.assert_array_equal(stopping.generate(*batch("left"), 24, draft=stopping.draft), want)
    assert want.shape[1] <= index + 1


@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.slow_unless("torch-*", "jax-True")
def test_a_long_generation_is_compacted_again_and_again(model, plain, package, is_early, monkeypatch):
    """Where row 1, whose draft is always right, ends early, it must not fill the cache while the others go on."""
    plant(monkeypatch, model, plain)
    compactions = []
    owner, name = (model.programs.draft, "compact") if package is jax_models else (torch_models.cache.Cache, "compact")
    compact = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: compactions.append(1) or compact(*args, **kwargs))
    ends = [int(token) for token in plain[1, :40] if token not in plain[[0, 2, 3]]][:1] if is_early else []
    stopping = ending(model, ends)
    want = np.asarray(stopping.generate(*batch("left"), LONGEST))
    assert want.shape[1] == LONGEST
    assert (want[1, 40:] == 5).all() == is_early
    np.testing.assert_array_equal(stopping.generate(*batch("left"), LONGEST, draft=stopping.draft), want)
    assert len(compactions) >= 3


@pytest.mark.slow_unless("torch")
def test_bfloat16_tokens_differ_only_where_two_are_nearly_as_good(package, tmp_path):
    """One run over K + 1 tokens rounds otherwise than K + 1 runs; float32 states then differ, and rarely a bfloat16."""
    model = load(package, tmp_path / "a", "qwen3_5-tied", dtype="bfloat16")
    ids_BT, N = np.random.default_rng(0).integers(0, 211, (64, 12)), 32
    plain = np.asarray(model.generate(ids_BT, None, N, ignore_eos=True))
    draft = model.draft
    found = np.asarray(model.generate(ids_BT, None, N, ignore_eos=True, draft=draft))
    assert draft.report.acceptance_length > 1.5
    rows = np.flatnonzero((plain != found).any(1))
    assert len(rows) <= 4
    logits = np.asarray(model(np.concatenate([ids_BT, plain[:, :-1]], axis=1)))[:, ids_BT.shape[1] - 1 :]
    for row in rows:
        first = int(np.flatnonzero(plain[row] != found[row])[0])
        best = np.sort(logits[row, first])
        assert best[-1] - best[-2] < 0.25, (row, first)  # logits reach 8 to 16: four of bfloat16's steps there


def slots(cache, row):
    """Keys and values of a row's real tokens, convolution and recurrent state, by layer."""
    mask_S = np.asarray(cache.key_mask)[row]
    return {
        (layer, key): np.asarray(part)[row][:, mask_S] if key in ("key", "value") else np.asarray(part)[row].copy()
        for layer, parts in cache.layers.items()
        if layer != "mtp"
        for key, part in parts.items()
    }


def test_after_every_round_the_cache_is_that_of_plain_decoding(model, plain, package, monkeypatch):
    N, K = 14, 3
    _, cache = model.prefill(*batch("left"), max_new_tokens=N + K)
    arrays = cache.arrays if package is jax_models else cache
    states = [[slots(arrays, row) for row in range(len(LENGTHS))]]
    for step in range(N):
        _, cache = model.decode(plain[:, step], cache)
        arrays = cache.arrays if package is jax_models else cache
        states.append([slots(arrays, row) for row in range(len(LENGTHS))])
    plant(monkeypatch, model, plain)
    fed, seen = np.zeros(len(LENGTHS), int), []

    def look(cache, kept_B):
        nonlocal fed
        fed = fed + kept_B
        for row in np.flatnonzero(kept_B):
            assert int(cache.position[row]) == LENGTHS[row] + fed[row] == int(np.asarray(cache.key_mask)[row].sum())
            found, want = slots(cache, row), states[fed[row]][row]
            assert found.keys() == want.keys()
            for key, value in want.items():
                error = np.linalg.norm(found[key] - value) / np.linalg.norm(value)
                assert error < 3e-6, (key, row, error)  # 25 ulp
            seen.append((int(row), int(kept_B[row])))

    watch_keep(monkeypatch, model, look)
    model.generate(*batch("left"), N, ignore_eos=True, draft=model.draft, draft_tokens=K)
    assert {kept for _, kept in seen} >= {1, 3, 4}


def test_what_lies_in_rejected_slots_is_never_seen(model, plain, package, monkeypatch):
    """Whatever finite value: a masked key has weight 0, and 0 NaN is NaN; only what a model computed lies there."""
    plant(monkeypatch, model, plain)
    said = []
    monkeypatch.setattr(
        loaders.host.speculation, "accept_greedy", lambda *args: said.append(args) or accept_greedy(*args)
    )
    model.generate(*batch("left"), LONGEST, ignore_eos=True, draft=model.draft)
    clean = list(said)
    said.clear()

    def look(cache, kept_B):
        mask = cache.key_mask[:, None, :, None]
        if package is jax_models:
            layers = {
                name: {
                    key: jnp.where(mask, part, 1e3) if key in ("key", "value") else part for key, part in parts.items()
                }
                for name, parts in cache.layers.items()
            }
            return dataclasses.replace(cache, layers=layers)
        for parts in cache.layers.values():
            for key in {"key", "value"} & parts.keys():
                slots_S = torch.arange(cache.capacity)[:, None]
                parts[key].masked_fill_(~mask & (slots_S < cache.length - 4), 1e3)
        return None

    watch_keep(monkeypatch, model, look)
    found = model.generate(*batch("left"), LONGEST, ignore_eos=True, draft=model.draft)
    np.testing.assert_array_equal(found, plain[:, :LONGEST])
    assert len(said) == len(clean)
    for one, other in zip(said, clean, strict=True):
        np.testing.assert_array_equal(np.asarray(one[1]), np.asarray(other[1]))


def test_no_run_reads_slots_far_beyond_those_that_are_filled(tmp_path, monkeypatch):
    """In torch. What a mask hides is still multiplied by 0, and 0 NaN is NaN. JAX's programs are made for all slots."""
    model = load(torch_models, tmp_path / "a")
    ends = [int(row[-1]) for row in model.generate(*batch("left"), 8, ignore_eos=True)]
    stopping = ending(model, ends)
    want = stopping.generate(*batch("left"), 200)
    made, empty_cache = [], torch_models.draft.Draft.empty_cache

    def with_junk(self, rows, capacity):
        made.append(empty_cache(self, rows, capacity))
        for parts in made[-1].layers.values():
            for key in {"key", "value"} & parts.keys():
                parts[key][:, :, 64:] = torch.nan
        return made[-1]

    monkeypatch.setattr(torch_models.draft.Draft, "empty_cache", with_junk)
    found = stopping.generate(*batch("left"), 200, draft=stopping.draft)
    np.testing.assert_array_equal(found, want)
    (cache,) = made
    assert cache.length == int(cache.slot) <= 64 < cache.capacity


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shape_suffixes_tell_the_truth_while_speculating(model, temperature):
    with checked_shape_suffixes("jax_models", "torch_models", "loaders") as seen:
        model.generate(*batch("left"), 24, temperature, ignore_eos=True, draft=model.draft)
        model.mtp_forward(*batch("right"))
    assert {
        "loaders.host.acceptance.accept_sampled" if temperature else "loaders.host.acceptance.accept_greedy"
    } <= seen
