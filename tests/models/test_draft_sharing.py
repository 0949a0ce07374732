"""A draft has no embedding and no head: it reads its target's, whatever becomes of them. Laws 7 and 10."""

import numpy as np
import pytest
import torch
from planted import PACKAGES, TWO_LAYERS

import jax_models
from loaders import CheckpointError, open_checkpoint
from loaders.writing.writer import write_checkpoint
from parity.lifecycle.live_jax import JaxLive
from parity.zoo import make_checkpoint
from parity.zoo.draft import make_drafting_checkpoint

IDS = np.array([[3, 14, 15, 92, 65, 35], [89, 79, 32, 38, 46, 26]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
NAMES = ("qwen3_5", "qwen3_5-tied")


@pytest.fixture(scope="module", params=PACKAGES)
def package(request):
    return PACKAGES[request.param]


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return [make_drafting_checkpoint(request.param, root / str(s), seed=s, **TWO_LAYERS) for s in range(2)]


def said(model, **given):
    return [np.asarray(part) for part in model.mtp_forward(IDS, MASK, **given)]


def same(found, want):
    for one, other in zip(found, want, strict=True):
        np.testing.assert_array_equal(one, other)


def values(array):
    return np.asarray(array.detach() if isinstance(array, torch.Tensor) else array).copy()


def buffers(model):
    """Where every parameter lies."""
    if isinstance(model, torch.nn.Module):
        return {name: param.data_ptr() for name, param in model.named_parameters()}
    return {name: leaf.unsafe_buffer_pointer() for name, leaf in jax_models.weights.flatten(model.weights).items()}


@pytest.mark.slow_unless("torch-*", "jax-qwen3_5")
def test_after_a_reload_the_draft_is_that_of_a_cold_load_bit_for_bit(package, pair):
    model, cold = package.load(pair[0], mtp=True), package.load(pair[1], mtp=True)
    before = said(model)
    held = model.draft
    model = model.update_weights_from_disk(pair[1])
    same(said(model), said(cold))
    assert model.version == 2  # of target and draft: there is one
    assert model.draft.source is model.draft.target is model
    assert model.digests() == cold.digests()
    assert sum(name.startswith("mtp.") for name in model.digests()) > 10
    # torch changed the model that the draft is bound to; in JAX it goes on with the one that it is bound to
    same([np.asarray(part) for part in held(IDS, MASK)], said(cold) if package is not jax_models else before)
    same(said(model.update_weights_from_disk(pair[0])), before)


@pytest.mark.parametrize("halves", [("embed", "head"), ("embed",), ("head",)])
def test_after_a_swap_the_draft_reads_the_new_halves(package, pair, halves, tmp_path):
    model, other = package.load(pair[0], mtp=True), package.load(pair[1], mtp=True)
    embed, head = (values(half) for half in other.get_embed_and_head())
    is_tied = model.config.tie_word_embeddings
    if is_tied and halves == ("head",):
        with pytest.raises(ValueError, match="tie_word_embeddings"):
            model.set_embed_and_head(None, head)
        return
    given = {"embed": embed if "embed" in halves else None, "head": head if "head" in halves else None}
    ours = open_checkpoint(pair[0])
    written = {"model.embed_tokens.weight": given["embed"], "lm_head.weight": given["head"]}

    def read(tensor):
        value = written.get(tensor)
        return ours.read(tensor) if value is None else value

    mixed = write_checkpoint(tmp_path / "mixed", ours.tensors, read, config=ours.config_document)
    before = said(model)
    swapped = model.set_embed_and_head(**given)
    found = said(swapped)
    same(found, said(package.load(mixed, mtp=True)))
    assert (found[0] != before[0]).any()
    assert swapped.version == 2


def test_a_draft_holds_no_buffer_of_its_own_but_mtp(package, pair):
    model = package.load(pair[0], mtp=True)
    plain = package.load(pair[0])
    own = {name for name in buffers(model) if name not in buffers(plain)}
    assert own == {name for name in buffers(model) if name.startswith("mtp.")}
    other = package.load(pair[1])
    bound = model.draft.bind(other)
    if package is jax_models:
        weights = jax_models.weights.flatten(bound.weights)
        theirs, ours = (jax_models.weights.flatten(one.weights) for one in (other, model))
        assert all(leaf is (ours if name.startswith("mtp.") else theirs)[name] for name, leaf in weights.items())
    else:
        ends = [param for param in model.mtp.parameters() if 211 in param.shape]
        assert not ends
        assert bound.bound is other
    moved = buffers(model)
    after = model.update_weights_from_disk(pair[1])
    if package is not jax_models:
        assert buffers(after) == moved


@pytest.mark.slow_unless("torch-*", "jax-qwen3_5-tied")
def test_a_draft_bound_to_another_model_reads_that_ones_embedding_and_head(package, pair):
    model, other = package.load(pair[0], mtp=True), package.load(pair[1])
    draft = model.draft.bind(other)
    assert draft.source is model
    assert draft.target is other
    assert draft.shared == {"embed": "shared", "head": "shared"}
    found = np.asarray(other.generate(IDS, MASK, 8, ignore_eos=True, draft=draft))
    np.testing.assert_array_equal(found, other.generate(IDS, MASK, 8, ignore_eos=True))
    assert draft.report.rounds
    before = np.asarray(draft(IDS, MASK)[0])
    embed, _ = other.get_embed_and_head()
    changed = other.set_embed_and_head(values(embed)[::-1].copy())
    draft = draft.bind(changed)
    assert (np.asarray(draft(IDS, MASK)[0]) != before).any()
    free = draft.unbind()
    assert free.shared == {"embed": "absent", "head": "absent"}
    with pytest.raises(RuntimeError, match="bound to no model"):
        free(IDS)
    with pytest.raises(ValueError, match="bound to another model"):
        changed.generate(IDS, draft=free)
    same([np.asarray(part) for part in free.bind(model)(IDS, MASK)], said(model))


def test_a_draft_that_does_not_fit_is_refused_with_every_reason(package, pair, tmp_path):
    model = package.load(pair[0], mtp=True)
    path = make_checkpoint("qwen3_5", tmp_path / "other", **TWO_LAYERS, hidden_act="silu", rms_norm_eps=1e-5)
    with pytest.raises(ValueError, match="configs differ.*; the draft computes in.*Nothing was bound"):
        model.draft.bind(package.load(path, dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"stage Stage\(index=0, count=1, mtp=True, vision=True\), the target"):
        model.draft.bind(package.load(pair[0], stage=(1, 2)))
    with pytest.raises(ValueError, match="holds no draft: load it with mtp=True"):
        _ = package.load(pair[0]).draft
    with pytest.raises(ValueError, match="a token and the one after it"):
        model.mtp_forward([[1]])
    for K in (0, True, 1.0):
        with pytest.raises(ValueError, match=f"draft_tokens={K}"):
            model.generate(IDS, draft=model.draft, draft_tokens=K)
    with pytest.raises(ValueError, match="draft_tokens=2 without a draft"):
        model.generate(IDS, draft_tokens=2)


@pytest.mark.slow_unless("torch-*", "jax-qwen3_5")
def test_the_draft_of_an_old_version_is_refused_by_the_new_one_in_jax_and_lives_on_in_torch(package, pair):
    model = package.load(pair[0], mtp=True)
    draft = model.draft
    newer = model.update_weights_from_disk(pair[1])
    if package is jax_models:
        with pytest.raises(
            ValueError, match=r"another model or version, this model is at version 2\. Use model\.draft"
        ):
            newer.generate(IDS, draft=draft)
        draft = newer.draft
    want = np.asarray(newer.generate(IDS, MASK, 8, ignore_eos=True))
    np.testing.assert_array_equal(newer.generate(IDS, MASK, 8, ignore_eos=True, draft=draft), want)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow_unless("torch-*", "jax-qwen3_5-2")
def test_a_last_stage_keeps_a_declared_copy_of_the_embedding_that_every_update_refreshes(
    package, name, count, tmp_path
):
    layers = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    first, second = (make_checkpoint(name, tmp_path / str(s), seed=s, **layers) for s in range(2))

    def run(whole, stages):
        x = stages[0](IDS, MASK)
        for stage in stages[1:-1]:
            x = stage(None, MASK, hidden_states=x)
        want = said(whole)
        for one, other in zip(said(stages[-1], hidden_states=x), want, strict=True):
            np.testing.assert_allclose(one[0], other[0], rtol=2e-4, atol=2e-4)
            np.testing.assert_allclose(one[1, 2:], other[1, 2:], rtol=2e-4, atol=2e-4)  # padding says nothing

    def stages_of(path):
        return [package.load(path, stage=(index, count), mtp=True) for index in range(count)]

    stages = stages_of(first)
    is_tied = stages[-1].config.tie_word_embeddings
    assert stages[-1].draft.shared == {"embed": "shared" if is_tied else "copied", "head": "shared"}
    with pytest.raises(ValueError, match="holds no draft"):
        _ = stages[0].draft
    assert "mtp.fc.weight" not in stages[0].digests()
    run(package.load(first, mtp=True), stages)
    whole = package.load(second, mtp=True)
    reloaded = [stage.update_weights_from_disk(second) for stage in stages]
    run(whole, reloaded)
    assert reloaded[-1].digests()["model.embed_tokens.weight"] == whole.digests()["model.embed_tokens.weight"]
    embed, head = (values(half) for half in package.load(first).get_embed_and_head())
    whole = whole.set_embed_and_head(embed, head)
    run(whole, [stage.set_embed_and_head(embed, head) for stage in reloaded])
    assert {reloaded[0].version, reloaded[-1].version} == {2 if package is jax_models else 3}


def test_a_last_stage_without_the_copy_cannot_be_bound_unless_it_is_tied(package, tmp_path):
    for name in NAMES:
        path = make_checkpoint(name, tmp_path / name, **TWO_LAYERS)
        last, bare = package.load(path, stage=(1, 2), mtp=True), package.load(path, stage=(1, 2))
        if name.endswith("tied"):
            assert last.draft.bind(bare).shared == {"embed": "shared", "head": "shared"}
            continue
        with pytest.raises(ValueError, match="no copy of the embedding"):
            last.draft.bind(bare)


def test_a_redundant_head_of_a_tied_checkpoint_is_verified_never_written(package, tmp_path):
    path = make_checkpoint("qwen3_5-tied", tmp_path / "a", ship_tied_head=True, **TWO_LAYERS)
    model = package.load(path, mtp=True)
    assert model.report.verified == ("lm_head.weight",)
    before = said(model)
    ours = open_checkpoint(path)

    def read(tensor):
        return ours.read(tensor) * (2 if tensor == "lm_head.weight" else 1)

    wrong = write_checkpoint(tmp_path / "wrong", ours.tensors, read, config=ours.config_document)
    for attempt in (lambda: package.load(wrong, mtp=True), lambda: model.update_weights_from_disk(wrong)):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            attempt()
    same(said(model), before)
    assert model.version == 1


@pytest.mark.slow_unless("qwen3_5")
def test_generating_with_a_draft_after_a_reload_compiles_nothing(pair):
    live = JaxLive(None)
    model = jax_models.load(pair[0], mtp=True)
    live.compiled(model)
    model.generate(IDS, MASK, 40, ignore_eos=True, draft=model.draft)
    model.generate(IDS, MASK, 40, 1.0, ignore_eos=True, draft=model.draft)
    before = live.compiled(model)
    assert before["process"]
    for path in reversed(pair):
        model = model.update_weights_from_disk(path)
        model.generate(IDS, MASK, 40, ignore_eos=True, draft=model.draft)
        model.generate(IDS, MASK, 40, 0.7, ignore_eos=True, draft=model.draft, seed=3)
    embed, _ = model.get_embed_and_head()
    model = model.set_embed_and_head(values(embed))
    model.generate(IDS, MASK, 40, ignore_eos=True, draft=model.draft)
    assert live.compiled(model) == before
