"""A model on a mesh is the same model: same bits, same export, same tokens, and an update compiles nothing."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jax_models
from jax_models.abstract import abstract_cache, abstract_rows, abstract_weights
from jax_models.batch import Batch
from jax_models.kernels.grouped import grouped_matmul, grouped_on_tpu
from jax_models.programs import programs_for
from jax_models.sharding import MESH_AXES, param_spec
from jax_models.weights import flatten
from loaders import open_checkpoint
from loaders.axes import replicated
from loaders.reading.plan import specs_of
from loaders.stage import Stage
from parity.zoo import make_checkpoint, prompts

pytestmark = pytest.mark.usefixtures("eight_devices")

# every cut axis of every parameter has 4 whole units or a multiple of them
EVEN = {
    "vocab_size": 208,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
EVEN_MOE = EVEN | {"num_experts": 8, "moe_intermediate_size": 24}
MODELS = {"qwen3": EVEN, "qwen3-moe": EVEN_MOE}
MESHES = {
    "data2-tensor4": (2, 1, 4),
    "expert2-tensor2": (1, 2, 2),
    "expert4-tensor2": (1, 4, 2),
    "data2-expert2-tensor2": (2, 2, 2),
    "tensor4 alone": 4,
}
LOGITS_TOLERANCE = 2e-6  # relative L2: float32 sums in another order, over 2 layers


def mesh_of(name: str) -> Mesh:
    sizes = MESHES[name]
    if isinstance(sizes, int):
        return Mesh(np.array(jax.devices()[:sizes]), ("tensor",))
    return Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), MESH_AXES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(zoo name, "even" or "odd", seed) -> checkpoint directory, made once."""
    made: dict[tuple[str, str, int], Path] = {}

    def get(name: str, sizes: str = "even", seed: int = 0) -> Path:
        key = (name, sizes, seed)
        if key not in made:
            changes = MODELS[name] if sizes == "even" else {"num_hidden_layers": 2}
            made[key] = make_checkpoint(name, tmp_path_factory.mktemp("checkpoint") / "it", seed=seed, **changes)
        return made[key]

    return get


@pytest.fixture(scope="module")
def single(checkpoints):
    """The same checkpoints on one device, with what they answer."""
    answers: dict[tuple[str, str], tuple] = {}

    def get(name: str, sizes: str = "even"):
        if (name, sizes) not in answers:
            model = jax_models.load(checkpoints(name, sizes))
            inputs = prompts(model.config, rows=4, tokens=24)
            answers[name, sizes] = model, inputs, np.asarray(model(**inputs)), generated(model, inputs)
        return answers[name, sizes]

    return get


def generated(model, inputs) -> np.ndarray:
    return np.asarray(model.generate(**inputs, max_new_tokens=6, ignore_eos=True))


def exported(model, directory: Path) -> dict[str, str]:
    """File name -> digest of its bytes."""
    written = model.export(directory)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(written.iterdir())}


def error(found, expected) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


def shardings(model) -> dict[str, PartitionSpec]:
    return {name: array.sharding for name, array in flatten(model.weights).items()}


@contextlib.contextmanager
def compilations():
    """Counts the programs that are compiled inside the block (jit caches of a process cannot be emptied by others)."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def stacked(checkpoint, spec) -> np.ndarray:
    """A parameter, put together from the checkpoint's tensors by the plain rule of the table."""
    whole = np.empty(spec.shape, checkpoint.read(spec.placements[0].tensor).dtype)
    for placement in spec.placements:
        whole[placement.index] = checkpoint.read(placement.tensor)
    return whole


@pytest.fixture(params=[name for name in MESHES if name != "data2-expert2-tensor2"])
def mesh(request):
    return mesh_of(request.param)


@pytest.fixture(params=["data2-expert2-tensor2", "expert4-tensor2"])
def wide_mesh(request):
    """All 8 devices, for what compiles much."""
    return mesh_of(request.param)


@pytest.mark.parametrize("sizes", ["even", "odd"])
@pytest.mark.parametrize("name", MODELS)
def test_every_device_holds_its_slice_of_the_checkpoint_bit_for_bit(name, sizes, mesh, checkpoints):
    path = checkpoints(name, sizes)
    model, checkpoint = jax_models.load(path, mesh=mesh), open_checkpoint(path)
    flat = flatten(model.weights)
    for spec in specs_of(model.config, Stage()):
        array, whole = flat[spec.name], stacked(checkpoint, spec)
        assert array.shape == spec.shape
        assert array.sharding.device_set == set(mesh.devices.flat)
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes(), spec.name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow_unless("expert2-tensor2-qwen3-moe", "data2-tensor4-qwen3")
def test_digests_and_export_do_not_know_of_the_mesh(name, mesh, checkpoints, single, tmp_path):
    model = jax_models.load(checkpoints(name), mesh=mesh)
    assert model.digests() == single(name)[0].digests()
    assert exported(model, tmp_path / "mesh") == exported(single(name)[0], tmp_path / "one")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow_unless("expert2-tensor2-qwen3-moe", "data2-tensor4-qwen3")
def test_logits_and_tokens_are_those_of_one_device(name, mesh, checkpoints, single):
    check_answers(jax_models.load(checkpoints(name), mesh=mesh), *single(name)[1:])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow_unless("expert4-tensor2-qwen3")
def test_so_they_are_where_the_mesh_does_not_divide_the_sizes(name, wide_mesh, checkpoints, single):
    check_answers(jax_models.load(checkpoints(name, "odd"), mesh=wide_mesh), *single(name, "odd")[1:])


def check_answers(model, inputs, logits, tokens):
    real = inputs["attention_mask"].astype(bool)
    assert error(np.asarray(model(**inputs))[real], logits[real]) < LOGITS_TOLERANCE
    assert generated(model, inputs).tolist() == tokens.tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow_unless("expert4-tensor2-qwen3-moe")
def test_swap_and_reload_compile_nothing_and_leave_shardings_as_they_were(name, wide_mesh, checkpoints, tmp_path):
    path_a, path_b = checkpoints(name), checkpoints(name, seed=1)
    model = jax_models.load(path_a, mesh=wide_mesh)
    inputs = prompts(model.config, rows=4, tokens=24)
    before, logits, tokens, digests = (
        shardings(model),
        np.asarray(model(**inputs)),
        generated(model, inputs),
        model.digests(),
    )
    embed, head = (np.asarray(half) for half in model.get_embed_and_head())
    with compilations() as compiled:
        swapped = model.set_embed_and_head(embed[::-1].copy(), head[::-1].copy())
        swapped(**inputs), generated(swapped, inputs)
        back = swapped.set_embed_and_head(embed, head)
        changed = back.update_weights_from_disk(path_b)
        changed(**inputs), generated(changed, inputs)
        again = changed.update_weights_from_disk(path_a)
        last_logits, last_tokens = np.asarray(again(**inputs)), generated(again, inputs)
    assert compiled == []
    assert shardings(swapped) == shardings(changed) == shardings(again) == before
    assert swapped.digests() != digests
    assert changed.digests() == jax_models.load(path_b).digests()
    assert back.digests() == again.digests() == digests
    assert np.array_equal(last_logits, logits)
    assert last_tokens.tolist() == tokens.tolist()
    assert exported(again, tmp_path / "again") == exported(model, tmp_path / "first")


def test_compilations_are_seen():
    with compilations() as compiled:
        jax.jit(lambda x: x * 3 + 17)(jnp.ones((5, 7)))
    assert compiled


@pytest.mark.parametrize("name", MODELS)
def test_decoding_donates_the_cache_and_keeps_it_where_it_was(name, wide_mesh, checkpoints):
    model = jax_models.load(checkpoints(name), mesh=wide_mesh)
    inputs = prompts(model.config, rows=4, tokens=24)
    logits, cache = model.prefill(**inputs, max_new_tokens=8)
    before = jax.tree.map(lambda array: array.sharding, cache.arrays)
    old = cache.arrays.layers["0"]["key"]
    # 4 heads for expert x tensor = 8 devices: expert alone, of most devices, cuts them
    part = (4 // wide_mesh.shape["data"], 1, cache.capacity, model.config.head_dim)
    assert old.addressable_shards[0].data.shape == part
    pointers = [shard.data.unsafe_buffer_pointer() for shard in old.addressable_shards]
    logits, cache = model.decode(np.argmax(np.asarray(logits), -1), cache)
    with compilations() as compiled:
        for _ in range(3):
            logits, cache = model.decode(np.argmax(np.asarray(logits), -1), cache)
    assert compiled == []
    assert old.is_deleted()
    assert jax.tree.map(lambda array: array.sharding, cache.arrays) == before
    assert [s.data.unsafe_buffer_pointer() for s in cache.arrays.layers["0"]["key"].addressable_shards] == pointers


# parameter (layer 0), mesh -> shape of a device's part
DENSE_PARTS = {
    "model.embed_tokens.weight": {"data2-tensor4": (52, 40), "expert2-tensor2": (52, 40), "expert4-tensor2": (26, 40)},
    "lm_head.weight": {"data2-tensor4": (52, 40), "expert2-tensor2": (52, 40), "expert4-tensor2": (26, 40)},
    "self_attn.q_proj.weight": {"data2-tensor4": (20, 40), "expert4-tensor2": (10, 40)},
    "self_attn.o_proj.weight": {"data2-tensor4": (40, 20), "expert4-tensor2": (40, 10)},
    # 4 heads for 8 devices: expert alone
    "self_attn.k_proj.weight": {"data2-tensor4": (10, 40), "expert2-tensor2": (10, 40), "expert4-tensor2": (10, 40)},
    "self_attn.v_proj.weight": {"data2-tensor4": (10, 40), "expert2-tensor2": (10, 40), "expert4-tensor2": (10, 40)},
    "mlp.gate_proj.weight": {"data2-tensor4": (14, 40), "expert4-tensor2": (7, 40)},
    "mlp.down_proj.weight": {"data2-tensor4": (40, 14), "expert4-tensor2": (40, 7)},
    "input_layernorm.weight": {"data2-tensor4": (40,), "expert4-tensor2": (40,)},
    "self_attn.q_norm.weight": {"data2-tensor4": (10,), "expert4-tensor2": (10,)},
    "model.norm.weight": {"data2-tensor4": (40,), "expert4-tensor2": (40,)},
}
MOE_PARTS = {
    "mlp.gate.weight": {"data2-tensor4": (8, 40), "expert4-tensor2": (8, 40)},  # a router is whole everywhere
    "mlp.experts.gate_up_proj": {
        "data2-tensor4": (8, 2, 6, 40),
        "expert2-tensor2": (4, 2, 12, 40),
        "expert4-tensor2": (2, 2, 12, 40),
    },
    "mlp.experts.down_proj": {
        "data2-tensor4": (8, 40, 6),
        "expert2-tensor2": (4, 40, 12),
        "expert4-tensor2": (2, 40, 12),
    },
}


@pytest.mark.parametrize(("name", "table"), [("qwen3", DENSE_PARTS), ("qwen3-moe", MOE_PARTS)])
@pytest.mark.parametrize("mesh_name", ["data2-tensor4", "expert2-tensor2", "expert4-tensor2"])
def test_the_table_cuts_what_it_says(name, table, mesh_name, checkpoints):
    model = jax_models.load(checkpoints(name), mesh=mesh_of(mesh_name))
    flat = flatten(model.weights)
    expected = {parameter: parts[mesh_name] for parameter, parts in table.items() if mesh_name in parts}
    full = {parameter: parameter if parameter in flat else f"model.layers.0.{parameter}" for parameter in expected}
    found = {parameter: flat[full[parameter]].addressable_shards[0].data.shape for parameter in expected}
    assert found == expected
    assert replicated(specs_of(model.config, Stage()).params, model.config.dims(), model.mesh.shape) == []


def test_what_a_mesh_does_not_divide_is_whole_everywhere_and_named(checkpoints):
    mesh = mesh_of("data2-tensor4")
    model = jax_models.load(checkpoints("qwen3", "odd"), mesh=mesh)  # vocabulary 211, heads 6 and 3
    flat = flatten(model.weights)
    named = replicated(specs_of(model.config, Stage()).params, model.config.dims(), mesh.shape)
    assert "model.embed_tokens.weight" in named
    assert "model.layers.0.self_attn.q_proj.weight" in named
    assert all(flat[parameter].is_fully_replicated for parameter in named)
    assert flat["model.layers.0.mlp.gate_proj.weight"].addressable_shards[0].data.shape == (14, 40)  # 56 rows


def test_heads_are_never_cut_in_two(checkpoints):
    config = open_checkpoint(checkpoints("qwen3", "odd")).config
    specs = {spec.name: spec for spec in specs_of(config, Stage())}
    k_proj = specs["model.layers.0.self_attn.k_proj.weight"]
    assert k_proj.shape[0] == 30  # two devices would get 15 rows each: one head and a half
    assert param_spec(k_proj, config.dims(), Mesh(np.array(jax.devices()[:2]), ("tensor",))) == PartitionSpec(
        None, None
    )


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "gemma3"])
def test_where_queries_are_cut_further_than_keys_nothing_is_gathered_to_keep_them(family, tmp_path):
    """New keys cut as the queries are make XLA for TPU gather the whole cache, at every step and of every layer."""
    path = make_checkpoint(family, tmp_path / "it", num_attention_heads=8, num_key_value_heads=4)
    model = jax_models.load(path, mesh=mesh_of("expert4-tensor2"))
    cache = model.programs.empty_cache(rows=2, capacity=64)
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    step = model.programs.decode.trace(model.weights, tokens, cache).lower().compile().as_text()
    assert "all-reduce" in step
    assert "all-gather" not in step


@pytest.mark.parametrize("axis", ["model", "Tensor"])
def test_an_axis_without_meaning_is_a_value_error(axis, checkpoints):
    mesh = Mesh(np.array(jax.devices()[:2]), (axis,))
    with pytest.raises(ValueError, match=rf"mesh has axes \['{axis}'\], expected only data, expert, tensor"):
        jax_models.load(checkpoints("qwen3"), mesh=mesh)


def test_a_mesh_as_jax_makes_it_serves(checkpoints, single):
    """``jax.make_mesh`` gives Explicit axes, under which an unannotated product of two cut arrays is an error."""
    _, inputs, logits, _ = single("qwen3-moe")
    model = jax_models.load(
        checkpoints("qwen3-moe"), mesh=jax.make_mesh((1, 2, 2), MESH_AXES, devices=jax.devices()[:4])
    )
    real = inputs["attention_mask"].astype(bool)
    assert error(np.asarray(model(**inputs))[real], logits[real]) < LOGITS_TOLERANCE


def test_rows_that_data_does_not_divide_are_served_too(checkpoints, single):
    _, inputs, logits, tokens = single("qwen3-moe")
    three = {key: value[:3] for key, value in inputs.items()}
    check_answers(
        jax_models.load(checkpoints("qwen3-moe"), mesh=mesh_of("data2-tensor4")), three, logits[:3], tokens[:3]
    )


def test_pipeline_stages_go_on_a_mesh(checkpoints, single):
    _, inputs, logits, _ = single("qwen3-moe")
    first = jax_models.load(checkpoints("qwen3-moe"), mesh=mesh_of("expert2-tensor2"), stage=(0, 2))
    last = jax_models.load(checkpoints("qwen3-moe"), mesh=mesh_of("expert2-tensor2"), stage=(1, 2))
    hidden = first(**inputs)
    found = last(hidden_states=hidden, attention_mask=inputs["attention_mask"])
    real = inputs["attention_mask"].astype(bool)
    assert error(np.asarray(found)[real], logits[real]) < LOGITS_TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_abstract_weights_and_cache_are_the_real_ones_without_their_bytes(name, wide_mesh, checkpoints):
    model = jax_models.load(checkpoints(name), mesh=wide_mesh)
    cache = model.programs.empty_cache(rows=4, capacity=32)

    def described(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)

    assert described(abstract_weights(model.config, model.mesh, "float32")) == described(model.weights)
    abstract = abstract_cache(model.config, 4, 32, "float32", model.mesh)
    assert described(abstract) == described(cache)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow_unless("qwen3")
def test_abstract_models_compile(name, checkpoints):
    config, mesh = open_checkpoint(checkpoints(name)).config, mesh_of("expert2-tensor2")
    weights, cache = abstract_weights(config, mesh, "float32"), abstract_cache(config, 2, 16, "float32", mesh)
    programs = programs_for(config, Stage(), jnp.dtype("float32"), mesh)
    ids, mask = abstract_rows((2, 16), "int32", mesh), abstract_rows((2, 16), "bool", mesh)
    prefill = programs.prefill.lower(weights, Batch(ids, mask, ids), cache=cache).compile()
    decode = programs.decode.lower(weights, abstract_rows((2, 1), "int32", mesh), cache=cache).compile()
    cache_bytes = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(cache))
    for compiled in (prefill, decode):
        assert compiled.memory_analysis().alias_size_in_bytes == cache_bytes


@pytest.mark.parametrize(
    ("rows", "sizes"), [(24, [5, 0, 9, 10]), (24, [5, 0, 0, 3]), (7, [0, 7, 0, 0]), (300, [1, 90, 0, 160])]
)
@pytest.mark.parametrize(("inner", "outer"), [(40, 48), (24, 40), (72, 256), (256, 72)])
@pytest.mark.parametrize(
    "product", [grouped_matmul, functools.partial(grouped_on_tpu, interpret=True)], ids=["here", "tpu"]
)
def test_the_grouped_product_is_that_of_one_product_per_group(product, rows, sizes, inner, outer):
    """For TPU interpreted. Rows behind the last group belong to other devices: whatever they come out as is thrown
    away. A group without rows may be anything.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, inner), np.float32)
    weights = rng.standard_normal((len(sizes), outer, inner), np.float32)
    weights[np.array(sizes) == 0] = np.inf
    found = product(jnp.asarray(x), jnp.asarray(weights), jnp.asarray(sizes, jnp.int32))
    group = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.einsum("ai,aoi->ao", x[: len(group)].astype(np.float64), weights[group].astype(np.float64))
    assert found.shape == (rows, outer)
    assert error(np.asarray(found)[: len(group)], expected) < 1e-6


def test_the_grouped_product_has_the_derivatives_of_one_product_per_group():
    rng, sizes = np.random.default_rng(0), np.array([5, 0, 9, 7])
    x, weights = (rng.standard_normal(shape, np.float32) for shape in ((24, 40), (4, 48, 40)))
    group = jnp.asarray(np.repeat(np.arange(4), sizes))

    def by_group(x, weights):
        return jnp.sin(grouped_matmul(x, weights, jnp.asarray(sizes, jnp.int32))[: len(group)]).sum()

    def one_by_one(x, weights):
        return jnp.sin(jnp.einsum("ai,aoi->ao", x[: len(group)], weights[group])).sum()

    for found, expected in zip(*(jax.grad(way, (0, 1))(x, weights) for way in (by_group, one_by_one)), strict=True):
        assert error(np.asarray(found), np.asarray(expected)) < 1e-5
    found, expected = (float(jax.jvp(way, (x, weights), (x, weights))[1]) for way in (by_group, one_by_one))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("product", [grouped_matmul, functools.partial(grouped_on_tpu, interpret=True)])
def test_rows_of_experts_are_rounded_once_where_they_are_stored(product):
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((24, 256), (3, 48, 256)))
    sizes = jnp.asarray([5, 9, 10], jnp.int32)
    found = product(x, weights, sizes, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(found, product(x, weights, sizes).astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16


def test_a_mesh_without_devices_is_refused(tmp_path):
    empty = Mesh(np.array(jax.devices())[:0], ("tensor",))
    with pytest.raises(ValueError, match="the mesh has no device"):
        jax_models.load(make_checkpoint("qwen3", tmp_path / "it"), mesh=empty)
