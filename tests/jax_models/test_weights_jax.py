"""The life of the weights of a JAX model: load, swap, replace, reload, export, and the stages of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import jax_models
from jax_models.weights import flatten
from loaders import CheckpointError, open_checkpoint
from loaders.place import weight_loader
from parity.zoo import make_checkpoint

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
V, D, LAYERS = 211, 40, 3
IDS = np.random.default_rng(0).integers(0, V, (2, 8))

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint of several files; made once, however often it is asked for."""
    made: dict[str, Path] = {}

    def build(name: str = "qwen3", seed: int = 0, **options) -> Path:
        key = repr((name, seed, sorted(options.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp("checkpoint") / "a"
            sizes = {"num_hidden_layers": LAYERS, "max_file_bytes": 60_000}
            made[key] = make_checkpoint(name, directory, seed=seed, **(sizes | options))
        return made[key]

    return build


@pytest.fixture(scope="module")
def dense(make: Make) -> jax_models.Model:
    return jax_models.load(make())


@pytest.fixture(scope="module")
def tied(make: Make) -> jax_models.Model:
    return jax_models.load(make("qwen3-tied"))


def random_table(seed: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(V, D)).astype(dtype)


def bits(value) -> bytes:
    return np.asarray(value).tobytes()


def tensors_of(directory: Path) -> dict[str, dict[str, tuple]]:
    """File -> tensor -> dtype, shape, bytes; read by the safetensors library."""
    return {
        path.name: {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in load_file(path).items()}
        for path in sorted(directory.glob("*.safetensors"))
    }


def assert_same_checkpoint(exported: Path, source: Path) -> None:
    want = tensors_of(source)
    assert tensors_of(exported) == want
    for path in source.glob("*.safetensors"):
        assert (exported / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported / name).read_text()) == json.loads((source / name).read_text())
    index = "model.safetensors.index.json"
    assert (exported / index).exists() == (source / index).exists() == (len(want) > 1)
    if len(want) > 1:
        assert json.loads((exported / index).read_text()) == json.loads((source / index).read_text())


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


def broken_copy(source: Path, directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """The checkpoint with each file's tensors passed through ``change``."""
    directory.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, directory / path.name)
        else:
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def one_bit(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        if name in tensors:
            tensors[name].view(np.uint8).reshape(-1)[-1] ^= 1

    return change


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


# swap


def test_a_swap_changes_two_leaves_and_shares_the_others(dense: jax_models.Model) -> None:
    embed, head = random_table(1), random_table(2)
    new = dense.set_embed_and_head(embed, head)
    assert (new.version, new.events[-1].kind, new.events[-1].ignored) == (dense.version + 1, "swap", ())
    old, now = flatten(dense.weights), flatten(new.weights)
    assert list(old) == list(now)
    assert {name for name in old if old[name] is not now[name]} == {EMBED, HEAD}
    assert (bits(now[EMBED]), bits(now[HEAD])) == (embed.tobytes(), head.tobytes())
    assert old[EMBED] is dense.get_embed_and_head()[0]
    assert dense.version == 1


def test_a_swap_changes_the_logits_and_swapping_back_restores_them(dense: jax_models.Model, tmp_path: Path) -> None:
    before = np.asarray(dense(IDS))
    new = dense.set_embed_and_head(random_table(1), random_table(2))
    assert np.abs(np.asarray(new(IDS)) - before).max() > 1
    assert bits(new(IDS)) == bits(jax_models.load(new.export(tmp_path / "a"))(IDS))
    back = new.set_embed_and_head(*dense.get_embed_and_head())
    assert back.version == 3
    assert bits(back(IDS)) == bits(dense(IDS)) == before.tobytes()
    assert back.digests() == dense.digests()


def test_none_leaves_a_half_alone(dense: jax_models.Model) -> None:
    embed, head = dense.get_embed_and_head()
    one = dense.set_embed_and_head(random_table(1), None)
    assert one.get_embed_and_head()[1] is head
    assert bits(one.get_embed_and_head()[0]) == random_table(1).tobytes()
    two = dense.set_embed_and_head(head=random_table(2))
    assert two.get_embed_and_head()[0] is embed
    assert bits(two.get_embed_and_head()[1]) == random_table(2).tobytes()


def test_setting_what_is_there_publishes_nothing(dense: jax_models.Model, tied: jax_models.Model) -> None:
    for model in (dense, tied):
        assert model.set_embed_and_head(*model.get_embed_and_head()) is model
        assert model.set_embed_and_head() is model


def test_a_swap_made_twice_is_the_swap_made_once(dense: jax_models.Model) -> None:
    once = dense.set_embed_and_head(random_table(1), random_table(2))
    twice = once.set_embed_and_head(random_table(1), random_table(2))
    assert twice.digests() == once.digests() != dense.digests()


def test_halves_may_be_handed_over_crosswise(dense: jax_models.Model) -> None:
    embed, head = dense.get_embed_and_head()
    new = dense.set_embed_and_head(head, embed)
    assert [bits(half) for half in new.get_embed_and_head()] == [bits(head), bits(embed)]
    assert new.set_embed_and_head(*reversed(new.get_embed_and_head())).digests() == dense.digests()


def test_a_numpy_buffer_may_be_overwritten_after_a_swap(dense: jax_models.Model) -> None:
    memory = np.empty(V * D * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64  # JAX on CPU aliases what is aligned so
    table = memory[start : start + V * D * 4].view(np.float32).reshape(V, D)
    table[...] = random_table(1)
    new = dense.set_embed_and_head(table, table)
    table[...] = 0
    assert [bits(half) for half in new.get_embed_and_head()] == [random_table(1).tobytes()] * 2


def test_no_kind_of_array_makes_a_swap_compile_anew(dense: jax_models.Model) -> None:
    dense(IDS)
    compiled = dense.programs.forward._cache_size()
    ones = np.ones((V, D), np.float32)
    weak = jax.lax.broadcast(1.0, (V, D))
    assert weak.weak_type
    for table in (ones, jnp.asarray(ones), jax.device_put(ones, jax.devices()[1]), weak):
        new = dense.set_embed_and_head(table, table)
        assert new.get_embed_and_head()[0].sharding == dense.get_embed_and_head()[0].sharding
        assert bits(new(IDS)) == bits(dense.set_embed_and_head(ones, ones)(IDS))
    assert dense.programs.forward._cache_size() == compiled


def test_every_misfit_of_a_swap_is_listed_and_nothing_changes(dense: jax_models.Model) -> None:
    before = flatten(dense.weights)
    with pytest.raises(ValueError, match="Nothing was changed") as caught:
        dense.set_embed_and_head(random_table(1).T, random_table(1, "float16"))
    assert "embed is float32 (40, 211), expected float32 (211, 40)" in str(caught.value)
    assert "head is float16 (211, 40), expected float32 (211, 40)" in str(caught.value)
    with pytest.raises(ValueError, match="embed is a list") as caught:
        dense.set_embed_and_head([[1.0]], random_table(1)[:-1])
    assert "head is float32 (210, 40)" in str(caught.value)
    assert all(flatten(dense.weights)[name] is value for name, value in before.items())
    assert dense.version == 1


def test_a_swap_in_a_bfloat16_model_takes_bfloat16(make: Make) -> None:
    model = jax_models.load(make(dtype="BF16"))
    with pytest.raises(ValueError, match="embed is float32"):
        model.set_embed_and_head(random_table(1))
    table = random_table(1).astype(ml_dtypes.bfloat16)
    assert bits(model.set_embed_and_head(table).get_embed_and_head()[0]) == table.tobytes()


def test_a_tied_model_takes_an_equal_head_and_refuses_another(tied: jax_models.Model) -> None:
    embed, head = tied.get_embed_and_head()
    assert embed is head
    assert tied.set_embed_and_head(head=np.asarray(embed).copy()) is tied
    for halves in ((None, random_table(1)), (random_table(1), random_table(2)), (random_table(1), embed)):
        with pytest.raises(ValueError, match="head must be the embedding or equal to it. Nothing was changed"):
            tied.set_embed_and_head(*halves)
    negative_zero = np.asarray(embed).copy()
    negative_zero[0, 0] = -0.0
    zero = negative_zero.copy()
    zero[0, 0] = 0.0
    with pytest.raises(ValueError, match="equal to it"):  # bits, not values
        tied.set_embed_and_head(zero, negative_zero)
    new = tied.set_embed_and_head(random_table(1), random_table(1))
    assert new.get_embed_and_head()[0] is new.get_embed_and_head()[1]
    assert bits(new.get_embed_and_head()[0]) == random_table(1).tobytes()
    assert sorted(flatten(new.weights)) == sorted(flatten(tied.weights))


# stages


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied"])
def test_chained_stages_are_the_whole_model(make: Make, name: str, count: int) -> None:
    whole = jax_models.load(make(name))
    stages = [jax_models.load(make(name), stage=(index, count)) for index in range(count)]
    mask_BT = np.ones_like(IDS)
    mask_BT[1, :3] = 0
    x = stages[0](IDS, mask_BT)
    assert x.shape == (*IDS.shape, D)
    for stage in stages[1:]:
        x = stage(attention_mask=mask_BT, hidden_states=x)
    want = np.asarray(whole(IDS, mask_BT))
    real_BT = mask_BT == 1
    error = np.linalg.norm((np.asarray(x) - want)[real_BT]) / np.linalg.norm(want[real_BT])
    assert error <= 2e-6  # the same sums, fused differently
    held = [name for stage in stages for name in flatten(stage.weights)]
    assert set(held) == set(flatten(whole.weights))
    for stage in stages:
        assert all(bits(v) == bits(flatten(whole.weights)[n]) for n, v in flatten(stage.weights).items())


def halves_of(model: jax_models.Model) -> tuple[bool, bool]:
    embed, head = model.get_embed_and_head()
    return embed is not None, head is not None


@pytest.mark.parametrize(
    ("name", "count", "want"),
    [
        ("qwen3", 2, [(True, False), (False, True)]),
        ("qwen3", 3, [(True, False), (False, False), (False, True)]),
        ("qwen3-tied", 2, [(True, True), (True, True)]),
        ("qwen3-tied", 3, [(True, True), (False, False), (True, True)]),
    ],
)
def test_a_stage_has_its_own_halves_and_ignores_the_others_by_name(
    make: Make, name: str, count: int, want: list[tuple[bool, bool]]
) -> None:
    for index, has in enumerate(want):
        model = jax_models.load(make(name), stage=(index, count))
        assert halves_of(model) == has
        names = set(flatten(model.weights))
        given = (random_table(1), random_table(1 if "tied" in name else 2))
        new = model.set_embed_and_head(*given)
        ignored = tuple(half for half, own in zip(("embed", "head"), has, strict=True) if not own)
        assert new.version == (2 if any(has) else 1)
        assert new.events[1:][-1].ignored == ignored
        assert set(flatten(new.weights)) == names
        for half, own, value in zip(new.get_embed_and_head(), has, given, strict=True):
            assert (half is not None) == own
            assert not own or bits(half) == value.tobytes()
        assert model.events == model.events[:1]


def test_a_stage_reloads_and_exports_its_part(make: Make, tmp_path: Path) -> None:
    sources = [make(), make(seed=1)]
    whole = {name: value for file in tensors_of(sources[1]).values() for name, value in file.items()}
    found: dict[str, tuple] = {}
    for index in range(2):
        stage = jax_models.load(sources[0], stage=(index, 2)).update_weights_from_disk(sources[1])
        for file in tensors_of(stage.export(tmp_path / str(index))).values():
            assert not set(file) & set(found)
            found |= file
    assert found == whole


def test_a_stage_takes_what_is_its_own(make: Make) -> None:
    first, last = (jax_models.load(make(), stage=(index, 2)) for index in range(2))
    with pytest.raises(ValueError, match="this stage is the first of the pipeline: give input_ids"):
        first(hidden_states=np.zeros((1, 2, D)))
    with pytest.raises(ValueError, match="stage 1 of 2 takes hidden_states, not input_ids"):
        last(IDS)
    with pytest.raises(ValueError, match=r"expected \[B, T, 40\]"):
        last(hidden_states=np.zeros((1, 2, D + 1), np.float32))
    with pytest.raises(ValueError, match="prefill needs the whole model; this is stage 0 of 2"):
        first.generate(IDS)
    for stage in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="must be"):
            jax_models.load(make(), stage=stage)
    with pytest.raises(ValueError, match="4 pipeline stages for 3 decoder layers"):
        jax_models.load(make(), stage=(0, 4))


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
    with pytest.raises(ValueError, match=r"lm_head\.weight was given up.* Nothing was changed"):
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
