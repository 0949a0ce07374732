"""The life of the weights of a JAX model: load, swap, replace, reload, export, and the stages of a pipeline."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from small_checkpoints import (
    EMBED,
    HEAD,
    IDS,
    D,
    Make,
    assert_same_checkpoint,
    bits,
    broken_copy,
    one_bit,
    random_table,
    tensors_of,
)

import jax_models
from jax_models.weights import flatten
from loaders import CheckpointError, open_checkpoint
from loaders.reading.place import weight_loader
from parity.zoo import make_checkpoint

# load


@pytest.mark.parametrize(("name", "num_files"), [("qwen3", 2), ("qwen3-bias", 2), ("qwen3-moe", 2), ("qwen3-tied", 2)])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_export_gives_back_the_checkpoint(make: Make, tmp_path: Path, name: str, num_files: int, dtype: str) -> None:
    source = make(name, dtype=dtype)
    assert len(tensors_of(source)) >= num_files
    assert_same_checkpoint(jax_models.load(source).export(tmp_path / "out"), source)


@pytest.mark.parametrize(
    ("stored", "asked", "computed"),
    [
        ("F32", None, "float32"),
        ("BF16", None, "bfloat16"),
        ("F16", None, "float32"),
        ("F32", "bfloat16", "bfloat16"),
        ("BF16", "float32", "float32"),
        ("F16", jnp.bfloat16, "bfloat16"),
    ],
)
def test_dtype_is_what_is_computed_in_and_parameters_keep_their_own(
    make: Make, tmp_path: Path, stored: str, asked, computed: str
) -> None:
    source = make("qwen3", dtype=stored)
    model = jax_models.load(source, dtype=asked)
    kept = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[stored]
    assert model.dtype.name == computed
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.weights)} == {kept}
    assert_same_checkpoint(model.export(tmp_path / "out"), source)


def test_a_float32_checkpoint_computed_in_bfloat16_runs_in_bfloat16(make: Make) -> None:
    model = jax_models.load(make(num_hidden_layers=1), dtype="bfloat16")
    logits_BTV, taps = model.with_taps(IDS)
    assert logits_BTV.dtype == jnp.float32
    assert {value.dtype.name for value in taps.values()} == {"bfloat16"}


def test_of_weights_that_cannot_be_nothing_is_given_up(tmp_path: Path) -> None:
    """All bytes can be read; that the head is not the embedding is known once they are."""
    sizes = {"num_hidden_layers": 1, "ship_tied_head": True}
    model = jax_models.load(make_checkpoint("qwen3-tied", tmp_path / "a", **sizes))
    other = make_checkpoint("qwen3-tied", tmp_path / "b", seed=1, **sizes)
    before = model.digests()
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="differs from"):
        model.update_weights_from_disk(other, donate=True)
    assert model.digests() == before


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "not float32"])
def test_a_dtype_that_is_not_computed_in_is_refused(make: Make, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype {dtype} is not computed in, expected one of float32, bfloat16"):
        jax_models.load(make(), dtype=dtype)


def test_the_report_counts_what_was_loaded(make: Make) -> None:
    source = make()
    found = open_checkpoint(source)
    report = jax_models.load(source).report
    assert report.num_tensors == len(found.tensors) == sum(map(len, tensors_of(source).values()))
    assert report.num_bytes == sum(len(t[2]) for file in tensors_of(source).values() for t in file.values())
    assert (report.verified, report.left_out, report.other_stages) == ((), (), 0)
    parts = [jax_models.load(source, stage=(index, 2)).report for index in range(2)]
    assert sum(part.num_tensors for part in parts) == len(found.tensors)
    assert [part.other_stages for part in parts] == [len(found.tensors) - part.num_tensors for part in parts]
    experts = jax_models.load(make("qwen3-moe"))
    assert experts.report.num_tensors == len(open_checkpoint(make("qwen3-moe")).tensors)
    assert experts.report.num_tensors > len(jax.tree.leaves(experts.weights))  # experts are stacked


def test_a_redundant_tied_head_is_verified_and_exported_again(make: Make, tmp_path: Path) -> None:
    source = make("qwen3-tied", ship_tied_head=True)
    model = jax_models.load(source)
    assert model.report.verified == (HEAD,)
    assert HEAD not in flatten(model.weights)
    assert_same_checkpoint(model.export(tmp_path / "a"), source)
    changed = model.set_embed_and_head(random_table(3)).export(tmp_path / "b")
    found = {name: value for file in tensors_of(changed).values() for name, value in file.items()}
    assert found[HEAD] == found[EMBED]
    assert found[EMBED][2] == random_table(3).tobytes()


def test_a_tied_head_that_differs_in_one_bit_is_refused(make: Make, tied: jax_models.Model, tmp_path: Path) -> None:
    source = broken_copy(make("qwen3-tied", ship_tied_head=True), tmp_path / "a", one_bit(HEAD))
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but 'lm_head.weight' differs"):
        jax_models.load(source)
    before = dict(flatten(tied.weights))
    with pytest.raises(CheckpointError, match="differs"):
        tied.update_weights_from_disk(source)
    assert all(flatten(tied.weights)[name] is value for name, value in before.items())


def test_ids_by_position_are_a_type_error() -> None:
    param, weight = np.zeros((2, 3, 4), np.float32), np.ones((3, 4), np.float32)
    with pytest.raises(TypeError, match="positional"):
        weight_loader(param, weight, 1)
    weight_loader(param, weight, shard_id=1)
    assert param[:, 0, 0].tolist() == [0, 1]


# replace and apply


def test_replace_lists_every_leaf_that_differs(dense: jax_models.Model) -> None:
    weights = jax.tree.map(lambda leaf: leaf, dense.weights)
    del weights["model"]["norm"]
    weights["model"]["layers"]["0"]["extra"] = {"weight": jnp.zeros(3)}
    weights["lm_head"]["weight"] = weights["lm_head"]["weight"].astype(jnp.bfloat16)
    weights["model"]["embed_tokens"]["weight"] = weights["model"]["embed_tokens"]["weight"][:-1]
    weights["model"]["layers"]["1"]["post_attention_layernorm"]["weight"] = jax.lax.broadcast(1.0, (D,))
    weights["model"]["layers"]["1"]["input_layernorm"]["weight"] = np.ones(D, np.float32)
    with pytest.raises(ValueError, match="Nothing was changed") as caught:
        dense.replace(weights=weights)
    for problem in (
        "model.norm.weight is missing",
        "model.layers.1.post_attention_layernorm.weight is weakly typed",
        "model.layers.0.extra.weight is unexpected",
        "lm_head.weight is bfloat16 (211, 40), expected float32 (211, 40)",
        "model.embed_tokens.weight is float32 (210, 40), expected float32 (211, 40)",
        "model.layers.1.input_layernorm.weight is a ndarray, expected a JAX array",
    ):
        assert problem in str(caught.value)


def test_replace_publishes_a_version_and_leaves_the_old_model(dense: jax_models.Model) -> None:
    doubled = jax.tree.map(lambda leaf: leaf * 2, dense.weights)
    new = dense.replace(weights=doubled)
    assert (new.version, new.events[-1].kind, dense.version) == (2, "replace", 1)
    assert all(a is b for a, b in zip(jax.tree.leaves(new.weights), jax.tree.leaves(doubled), strict=True))
    back = new.replace(weights=dense.weights)
    assert (back.version, bits(back(IDS))) == (3, bits(dense(IDS)))


def test_apply_is_the_model_under_jit_and_has_gradients(dense: jax_models.Model) -> None:
    def loss(weights, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BTV = dense.apply(weights, ids, mask)
        picked_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), ids[..., None], axis=-1)[..., 0]
        return -jnp.where(mask, picked_BT, 0).sum() / mask.sum(), logits_BTV

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    mask_BT = np.ones(IDS.shape, bool)
    mask_BT[1, :3] = False
    inputs = jnp.asarray(IDS), jnp.asarray(mask_BT)
    (_, logits_BTV), gradient = run(dense.weights, *inputs)
    want = np.asarray(dense(IDS, mask_BT))
    assert np.linalg.norm(np.asarray(logits_BTV) - want) <= 1e-6 * np.linalg.norm(want)

    assert jax.tree.structure(gradient) == jax.tree.structure(dense.weights)
    size = {name: float(jnp.linalg.norm(leaf)) for name, leaf in flatten(gradient).items()}
    assert all(np.isfinite(value) and value > 0 for value in size.values()), size
    # along the gradient of one weight the loss rises by its length: central difference, float32 noise about 1 %
    for path in ("model.layers.0.self_attn.k_norm.weight", "model.layers.2.mlp.down_proj.weight"):
        step = 1e-2 * flatten(gradient)[path] / size[path]
        ends = []
        for sign in (1, -1):
            flat = flatten(dense.weights)
            flat[path] = flat[path] + sign * step
            ends.append(float(run(traverse_util.unflatten_dict(flat, sep="."), *inputs)[0][0]))
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(size[path], rel=3e-2)


# reload


def test_a_reload_changes_everything_and_compiles_nothing(make: Make, tmp_path: Path) -> None:
    a, b = make(), make(seed=1)
    first = jax_models.load(a)
    before = np.asarray(first(IDS))
    compiled = first.programs.forward._cache_size()
    second = first.update_weights_from_disk(b)
    assert (second.version, second.events[-1].kind, second.report.num_tensors) == (
        2,
        "reload",
        first.report.num_tensors,
    )
    assert_same_checkpoint(second.export(tmp_path / "b"), b)
    fresh = np.asarray(jax_models.load(b)(IDS))
    assert bits(second(IDS)) == fresh.tobytes() != before.tobytes()
    third = second.update_weights_from_disk(a)
    assert_same_checkpoint(third.export(tmp_path / "a"), a)
    assert bits(third(IDS)) == before.tobytes() == bits(first(IDS))
    assert third.digests() == first.digests() != second.digests()
    assert first.programs.forward._cache_size() == compiled


def test_a_reload_made_twice_is_the_reload_made_once(make: Make) -> None:
    once = jax_models.load(make("qwen3-moe")).update_weights_from_disk(make("qwen3-moe", seed=1))
    twice = once.update_weights_from_disk(make("qwen3-moe", seed=1))
    assert (twice.version, twice.digests()) == (3, once.digests())
    assert once.digests() == jax_models.load(make("qwen3-moe", seed=1)).digests()


def test_a_reload_that_would_change_the_computation_is_refused_by_name(make: Make, dense: jax_models.Model) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    other = make(seed=1, rms_norm_eps=1e-5, rope_parameters=rope, attention_bias=True)
    before, version = flatten(dense.weights), dense.version
    with pytest.raises(CheckpointError) as caught:
        dense.update_weights_from_disk(other)
    for key in ("rms_norm_eps is 1e-05, expected 0.0003", "rope_parameters", "attention_bias is True, expected False"):
        assert f"config.json: {key}" in str(caught.value)
    assert "model.layers.2.self_attn.q_proj.bias' of" in str(caught.value)
    for refused in (make("qwen3-tied"), make("qwen3-moe"), make(vocab_size=212), make(dtype="BF16")):
        with pytest.raises(CheckpointError, match="as it is live"):
            dense.update_weights_from_disk(refused)
    assert dense.version == version
    assert all(flatten(dense.weights)[name] is value for name, value in before.items())


def test_a_reload_may_say_otherwise_of_windows_that_no_layer_has(make: Make) -> None:
    words = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4}
    model = jax_models.load(make("qwen3")).update_weights_from_disk(make("qwen3", seed=1, **words))
    assert model.digests() == jax_models.load(make("qwen3", seed=1)).digests()


def test_a_reload_may_change_how_generation_ends(make: Make, dense: jax_models.Model) -> None:
    new = dense.update_weights_from_disk(make(eos_token_id=[7, 9]))
    assert new.checkpoint.eos_token_ids == (7, 9)


def test_a_broken_checkpoint_leaves_the_old_weights_serving(
    make: Make, dense: jax_models.Model, tmp_path: Path
) -> None:
    before = bits(dense(IDS))
    gone = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")

    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in gone:
            tensors.pop(name, None)

    source = broken_copy(make(seed=1), tmp_path / "gone", drop)
    with pytest.raises(CheckpointError) as caught:
        dense.update_weights_from_disk(source)
    assert all(name in str(caught.value) for name in gone)
    assert (bits(dense(IDS)), dense.version) == (before, 1)


def test_a_cache_that_a_step_wrote_in_is_not_taken_again(make: Make) -> None:
    model = jax_models.load(make("qwen3"))
    logits, cache = model.prefill(IDS)
    tokens = np.asarray(logits).argmax(-1)
    _, following = model.decode(tokens, cache)
    with pytest.raises(ValueError, match="was given to a step before.* Take what that returned"):
        model.decode(tokens, cache)
    model.decode(tokens, following)


def test_a_step_says_that_an_update_gave_up_some_weights(make: Make) -> None:
    """Which of them, a step has no time to look."""
    model = jax_models.load(make("qwen3"))
    _, cache = model.prefill(IDS)
    for array in model._arrays[1:3]:
        array.delete()
    with pytest.raises(RuntimeError, match=r"2 of \d+ weights of version 1 were given up to an update"):
        model.decode([3] * len(IDS), cache)


def test_what_was_given_up_is_not_published_again(make: Make) -> None:
    """Shapes of a donated array can still be read, and it goes to where it is without an error."""
    model, other = jax_models.load(make("qwen3")), jax_models.load(make("qwen3", seed=1))
    weights, (embed, head) = other.weights, other.get_embed_and_head()
    other.update_weights_from_disk(make("qwen3"), donate=True)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight was given up.* and \d+ more\. Nothing was changed"):
        model.replace(weights=weights)
    with pytest.raises(ValueError, match=r"embed was given up.*head was given up.* Nothing was changed"):
        model.set_embed_and_head(embed, head)


@pytest.mark.parametrize("weights", [None, {1: 2}, [], {"model": None}])
def test_weights_that_are_no_tree_of_names_are_refused(make: Make, weights: object) -> None:
    with pytest.raises(ValueError, match="Nothing was changed"):
        jax_models.load(make("qwen3")).replace(weights=weights)


@pytest.mark.parametrize("address", ["direct:///tmp/x", "runai:///tmp/x", "foo://x"])
def test_nothing_is_saved_to_an_address_that_cannot_be_written(make: Make, address: str) -> None:
    with pytest.raises(ValueError, match=r"nothing is saved to .*://"):
        jax_models.load(make("qwen3")).save(address)
