"""A plain checkpoint seen through quantisation: ModelOpt's names, bits and documents, however it is read."""

import weakref

import ml_dtypes
import numpy as np
import pytest

from loaders import CheckpointError, open_checkpoint
from loaders import checkpoint as checkpoint_module
from loaders.nvfp4 import global_scale, quantize
from loaders.quantization.quantize import open_to_load, quantized
from loaders.quantization.schemes import Scheme
from loaders.reading.filling import Filling
from loaders.reading.plan import plan_load
from loaders.reading.regions import Region
from loaders.reading.shards import read_shards
from loaders.reading.slices import Slice
from loaders.stage import Stage
from loaders.writing.writer import write_checkpoint
from parity.zoo import block_sizes, make_checkpoint

HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


def plain(name, directory, **options):
    sizes = block_sizes(name) | (HYBRID if "qwen3_5" in name else {"num_hidden_layers": 2})
    return open_checkpoint(make_checkpoint(name, directory, **({"dtype": "BF16"} | sizes | options)))


def same_bits(a, b):
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", {}),
        ("qwen3", {"dtype": "F32", "max_file_bytes": 30_000}),
        ("qwen3-tied", {"dtype": "F16"}),
        ("qwen3-moe", {"max_file_bytes": 30_000}),
        ("qwen3_5-moe", {}),
        ("qwen3_5-moe-wrapped", {"experts": "per expert"}),
    ],
)
@pytest.mark.parametrize("activations", [False, True])
def test_a_stream_gives_the_bits_of_single_reads(name, options, activations, tmp_path):
    source = plain(name, tmp_path / "p", **options)
    amax = {module: 1.0 + number for number, module in enumerate(quantized(source).matrices)} if activations else None
    streamed = dict(quantized(source, amax).stream())
    checkpoint = quantized(source, amax)
    assert set(streamed) == set(checkpoint.tensors)
    for tensor in sorted(checkpoint.tensors):  # not the order in which they lie there
        assert same_bits(checkpoint.read(tensor), streamed[tensor]), tensor


def test_places_that_lie_otherwise_in_memory_are_filled_too(tmp_path):
    """A transposed one of codes stayed as it was, and was given out as filled."""
    checkpoint = quantized(plain("qwen3-moe", tmp_path / "p"))
    names = [name for name in checkpoint.tensors if name.endswith(("_proj.weight", "_proj.weight_scale"))]
    types = {name: checkpoint.read(name) for name in names}
    places = {name: np.zeros(array.shape[::-1], array.dtype).T for name, array in types.items()}
    assert any(not place.flags.c_contiguous for place in places.values())
    for name, array in quantized(checkpoint.plain).stream(names=list(places), into=places.get):
        assert array is places[name]
        assert same_bits(np.ascontiguousarray(array), checkpoint.read(name)), name


def test_one_plain_tensor_at_a_time_is_held(tmp_path, monkeypatch):
    checkpoint, alive = quantized(plain("qwen3", tmp_path / "p")), []
    made = checkpoint_module.aligned_empty

    def counted(shape, dtype):
        assert not any(one() is not None for one in alive)
        array = made(shape, dtype)
        alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(checkpoint_module, "aligned_empty", counted)
    names = ["model.embed_tokens.weight", "lm_head.weight"]  # of one size, and both stay plain
    for _, array in checkpoint.stream(checkpoint.tensors[names[0]].num_bytes, names=names):
        del array
    assert len(alive) == 2


def test_a_part_of_a_stream_is_the_same_and_lies_where_it_was_to_go(tmp_path):
    checkpoint = quantized(plain("qwen3-moe", tmp_path / "p"))
    names = [
        name for name in checkpoint.tensors if name.endswith(("k_proj.weight", "3.up_proj.weight_scale", "norm.weight"))
    ]
    names += ["model.layers.0.mlp.experts.2.down_proj.weight_scale_2"]
    places = {name: np.empty_like(checkpoint.read(name)) for name in names[::2]}
    found = dict(quantized(checkpoint.plain).stream(names=names, into=places.get))
    assert set(found) == set(names)
    for name, array in found.items():
        assert same_bits(array, checkpoint.read(name))
        assert (array is places.get(name)) == (name in places)


def test_what_was_read_is_the_callers_to_change(tmp_path):
    checkpoint = quantized(plain("qwen3", tmp_path / "p"))
    name = "model.layers.0.mlp.up_proj.weight"
    first = checkpoint.read(name).copy()
    checkpoint.read(name)[:] = 0
    scale = checkpoint.read(f"{name}_scale")  # computed together with the codes
    kept = scale.copy()
    scale.view(np.uint8)[:] = 0
    assert same_bits(checkpoint.read(f"{name}_scale"), kept)
    assert same_bits(checkpoint.read(name), first)


def test_a_name_that_is_not_there_is_a_key_error(tmp_path):
    checkpoint = quantized(plain("qwen3", tmp_path / "p"))
    with pytest.raises(KeyError, match="nothing"):
        next(checkpoint.stream(names=["nothing"]))
    with pytest.raises(KeyError, match="nothing"):
        checkpoint.read("nothing")


def test_matrices_that_are_multiplied_as_one_share_the_scale_of_the_largest(tmp_path):
    source = plain("qwen3-moe", tmp_path / "p")
    checkpoint = quantized(source)
    attention = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    for group in (
        attention,
        [attention[0].replace("q_proj", "o_proj")],
        [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj")],
        [f"model.layers.0.mlp.experts.3.{name}" for name in ("gate_proj", "up_proj")],
        ["model.layers.0.mlp.experts.3.down_proj"],
    ):
        weights = [source.read(f"{module}.weight") for module in group]
        amax = max(float(np.abs(weight.astype(np.float32)).max()) for weight in weights)
        for module, weight in zip(group, weights, strict=True):
            expected = quantize(weight, amax=amax)
            assert checkpoint.read(f"{module}.weight_scale_2") == global_scale(amax)
            assert same_bits(checkpoint.read(f"{module}.weight"), expected.packed)
            assert same_bits(checkpoint.read(f"{module}.weight_scale"), expected.block_scale)


def test_experts_in_one_tensor_and_one_by_one_are_the_same_experts(tmp_path):
    fused, apart = (
        quantized(plain("qwen3_5-moe", tmp_path / form, experts=form, draft_experts="fused"))
        for form in ("fused", "per expert")
    )
    assert fused.tensors.keys() == apart.tensors.keys()
    assert fused.config == apart.config
    for name in fused.tensors:
        assert same_bits(fused.read(name), apart.read(name)), name


def test_scales_of_inputs_are_of_the_amax_that_was_measured(tmp_path):
    source = plain("qwen3", tmp_path / "p")
    amax = {module: 2.0 + number for number, module in enumerate(quantized(source).matrices)}
    checkpoint = quantized(source, amax)
    assert checkpoint.quantization_document["quantization"]["quant_algo"] == "NVFP4"
    assert set(checkpoint.config.quantization.table.values()) == {Scheme("nvfp4", True)}
    for module, most in amax.items():
        scale = checkpoint.read(f"{module}.input_scale")
        assert (scale.dtype, scale.shape) == (np.float32, ())
        assert scale == global_scale(most)


def test_inputs_of_some_layers_only_are_refused_by_name(tmp_path):
    source = plain("qwen3", tmp_path / "p")
    with pytest.raises(CheckpointError, match="saw no input of model.layers.1.self_attn.q_proj"):
        quantized(source, {"model.layers.0.self_attn.q_proj": 1.0})


def test_what_recipes_leave_alone_is_left_alone_and_said_to_be(tmp_path):
    source = plain("qwen3_5-moe", tmp_path / "p")
    checkpoint = quantized(source)
    assert set(checkpoint.left_alone.values()) == {
        *("the embedding", "the head", "a router", "a gate of few outputs", "a convolution", "the draft")
    }
    assert checkpoint.left_alone["mtp.layers.0.mlp.experts"] == "the draft"
    assert checkpoint.left_alone["model.layers.0.mlp.shared_expert_gate"] == "a gate of few outputs"
    excluded = checkpoint.quantization_document["quantization"]["exclude_modules"]
    assert excluded == sorted(checkpoint.left_alone)
    assert excluded == checkpoint.config_document["quantization_config"]["ignore"]
    for name, info in source.tensors.items():
        if checkpoint.tensors.get(name, info).dtype == info.dtype and name in checkpoint.tensors:
            assert same_bits(source.read(name), checkpoint.read(name))
        else:
            assert "layers" in name, name
            assert "norm" not in name, name


def test_layers_whose_inputs_are_no_multiple_of_16_stay_as_they_are(tmp_path):
    checkpoint = quantized(plain("qwen3", tmp_path / "p", intermediate_size=100))
    assert checkpoint.left_alone["model.layers.1.mlp.down_proj"] == "100 inputs, no multiple of 16"
    assert checkpoint.tensors["model.layers.1.mlp.down_proj.weight"].dtype == "BF16"
    assert checkpoint.tensors["model.layers.1.mlp.up_proj.weight"].dtype == "U8"
    plan_load(checkpoint, Stage())


@pytest.mark.parametrize("form", ["fused", "per expert"])
def test_experts_are_left_alone_as_one_where_any_of_them_must_be(form, tmp_path):
    checkpoint = quantized(plain("qwen3_5-moe", tmp_path / "p", experts=form, moe_intermediate_size=24))
    assert checkpoint.left_alone["model.layers.0.mlp.experts"] == "24 inputs, no multiple of 16"
    assert not any(".experts." in module for module in checkpoint.matrices)
    assert "model.layers.0.mlp.experts" not in checkpoint.config.quantization.table
    plan_load(checkpoint, Stage())


def test_where_nothing_can_be_quantised_nothing_is(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to quantise"):
        quantized(open_checkpoint(make_checkpoint("qwen3", tmp_path / "p")))


def test_nothing_is_quantised_twice(tmp_path):
    checkpoint = quantized(plain("qwen3", tmp_path / "p"))
    with pytest.raises(CheckpointError, match="quantised already"):
        quantized(checkpoint)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied", "qwen3-moe", "qwen3_5-moe", "qwen3_5-wrapped"])
@pytest.mark.parametrize("activations", [False, True])
def test_what_is_written_opens_as_what_was_seen(name, activations, tmp_path):
    source = plain(name, tmp_path / "p")
    amax = dict.fromkeys(quantized(source).matrices, 5.0) if activations else None
    seen = quantized(source, amax)
    written = open_checkpoint(
        write_checkpoint(
            tmp_path / "q",
            seen.tensors,
            seen.read,
            config=seen.config_document,
            quantization=seen.quantization_document,
        )
    )
    assert written.config == seen.config
    assert written.tensors.keys() == seen.tensors.keys()
    for tensor in written.tensors:
        assert same_bits(written.read(tensor), seen.read(tensor))
    assert written.num_bytes == seen.num_bytes
    if activations:
        with pytest.raises(CheckpointError, match="quantised already, and not as quantize='nvfp4' would"):
            open_to_load(tmp_path / "q", "nvfp4")
    else:
        assert open_to_load(tmp_path / "q", "nvfp4").config == seen.config  # quantised already, and loaded as it is
    plan_load(written, Stage(mtp=written.config.num_mtp_layers > 0))


def test_writing_reads_each_tensor_of_experts_a_few_times_and_not_once_for_each_expert(tmp_path, monkeypatch):
    source = plain("qwen3_5-moe", tmp_path / "p", num_experts=9)
    seen, reads = quantized(source), []
    original = type(source).read
    monkeypatch.setattr(
        type(source), "read", lambda self, name, out=None: reads.append(name) or original(self, name, out)
    )
    write_checkpoint(tmp_path / "q", seen.tensors, seen.read, config=seen.config_document)
    for name in ("gate_up_proj", "down_proj"):
        assert reads.count(f"model.layers.0.mlp.experts.{name}") == 2  # for the scales, which lie first; for the codes
    assert reads.count("model.layers.1.self_attn.k_proj.weight") == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(value, tmp_path):
    source = plain("qwen3", tmp_path / "p")
    name = "model.layers.0.mlp.up_proj.weight"
    others = {"model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"}

    def read(tensor):
        array = source.read(tensor)
        if tensor in {name, *others}:
            array[3, 5] = np.asarray(value, ml_dtypes.bfloat16)
        return array

    bad = write_checkpoint(tmp_path / "bad", source.tensors, read, config=source.config_document)

    def all_of_it(one):
        return dict(one.stream())

    def load(one):
        plan = plan_load(one, Stage())
        plan = plan.within(None, staged=True, boxes_of=lambda spec: [tuple((0, size) for size in spec.shape)])
        return list(read_shards(Filling(plan)))

    for use in (all_of_it, lambda one: one.read(f"{name}_scale_2"), lambda one: one.read(name)):
        with pytest.raises(CheckpointError, match="model.layers.0.mlp.up_proj cannot be quantised") as caught:
            use(quantized(open_checkpoint(bad)))
        assert all(f"{one.removesuffix('.weight')} cannot" in str(caught.value) for one in others) == (use is all_of_it)
        assert "gate_proj" not in str(caught.value)
    again = quantized(open_checkpoint(bad))
    for _ in range(2):  # nothing of it is remembered
        with pytest.raises(CheckpointError, match="model.layers.0.mlp.up_proj cannot be quantised"):
            again.read(f"{name}_scale_2")
    with pytest.raises(CheckpointError, match="3 problems"):
        load(quantized(open_checkpoint(bad)))


def test_a_method_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(ValueError, match="int4"):
        open_to_load(tmp_path, "int4")


@pytest.mark.parametrize(("name", "options"), [("qwen3-moe", {"max_file_bytes": 30_000}), ("qwen3_5-moe", {})])
def test_in_lots_every_tensor_comes_once_and_in_one_session(name, options, tmp_path, monkeypatch):
    """Also where the lots share a matrix, as those of experts that are stored in one tensor."""
    checkpoint = quantized(plain(name, tmp_path / "p", **options))
    expected = {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors}
    groups: dict[str, set[str]] = {}
    for tensor in checkpoint.tensors:
        groups.setdefault(checkpoint.group_of(tensor), set()).add(tensor)
    lots, sessions, session = list(groups.values()), [], type(checkpoint.source).session
    monkeypatch.setattr(
        type(checkpoint.source), "session", lambda self, size: sessions.append(1) or session(self, size)
    )

    def whole(tensor):
        out = np.empty_like(expected[tensor])
        return [Region(out.shape, tuple((0, size) for size in out.shape), out)]

    streamed = list(checkpoint.stream(lots=lots))
    regions = [(tensor, part) for tensor, (part,) in checkpoint.stream_regions(lots, whole)]
    assert len(sessions) == 2
    for found in (streamed, regions):
        assert len(found) == len(expected) == len(dict(found))
        assert all(same_bits(array, expected[tensor]) for tensor, array in found)


def test_a_group_of_which_nothing_is_wanted_is_not_computed(tmp_path, monkeypatch):
    checkpoint = quantized(plain("qwen3_5-moe", tmp_path / "p"))
    some = sorted(name for name in checkpoint.tensors if "experts.1." in name)
    computed, parts = set(), type(checkpoint)._parts
    monkeypatch.setattr(
        type(checkpoint), "_parts", lambda self, matrix, *rest: computed.add(matrix.group) or parts(self, matrix, *rest)
    )

    def wanted(tensor):
        if tensor not in some:
            return []
        out = checkpoint.destination(tensor)
        return [Region(out.shape, tuple((0, size) for size in out.shape), out)]

    found = dict(checkpoint.stream_regions([set(checkpoint.tensors)], wanted))
    assert found.keys() == checkpoint.tensors.keys()
    assert {name for name, arrays in found.items() if arrays} == set(some)
    assert computed == {checkpoint.group_of(name) for name in some}
    assert all(same_bits(found[name][0], quantized(checkpoint.plain).read(name)) for name in some)


def test_names_and_lots_are_one_or_the_other(tmp_path):
    checkpoint = plain("qwen3", tmp_path / "p")
    for one in (checkpoint, quantized(checkpoint)):
        with pytest.raises(ValueError, match="expected one of them"):
            list(one.stream(names=["lm_head.weight"], lots=[{"lm_head.weight"}]))


MISUSES = {
    "an unknown name": (lambda it, name: it.stream(names=["nope"]), KeyError),
    "one name": (lambda it, name: it.stream(names=name), ValueError),
    "names and lots": (lambda it, name: it.stream(names=[name], lots=[[name]]), ValueError),
    "an unknown name in a lot": (lambda it, name: it.stream(lots=[[name], ["nope"]]), KeyError),
    "no budget": (lambda it, name: it.stream(host_budget_bytes=-1), ValueError),
    "too small a budget": (lambda it, name: it.stream(64, names=[name]), ValueError),
    "too small a budget for a slice": (lambda it, name: it.stream_slices([Slice(name)], 64), ValueError),
    "an unknown slice": (lambda it, name: it.stream_slices([Slice("nope", (0,))]), KeyError),
    "no part": (lambda it, name: it.stream_slices([Slice(name, (1 << 20,))]), IndexError),
    "slices without a budget": (lambda it, name: it.stream_slices([], 0), ValueError),
    "an unknown region": (lambda it, name: it.stream_regions([["nope"]], lambda _: []), KeyError),
    "regions without a budget": (lambda it, name: it.stream_regions([[name]], lambda _: [], 0), ValueError),
}


@pytest.mark.parametrize("kind", [lambda it: it, quantized], ids=["plain", "quantised"])
@pytest.mark.parametrize("misuse", MISUSES)
def test_what_cannot_be_is_said_when_it_is_asked_for(misuse, kind, tmp_path):
    ask, error = MISUSES[misuse]
    with pytest.raises(error):
        ask(kind(plain("qwen3", tmp_path / "p")), "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("kind", [lambda it: it, quantized], ids=["plain", "quantised"])
def test_a_destination_that_does_not_fit_is_never_written(kind, tmp_path):
    """NumPy would put one number into four places, and codes into floats."""
    checkpoint = kind(plain("qwen3", tmp_path / "p"))
    leaves = ["weight"] if kind is not quantized else ["weight", "weight_scale", "weight_scale_2"]
    for name in (f"model.layers.1.mlp.up_proj.{leaf}" for leaf in leaves):
        right = checkpoint.read(name)
        wide, read_only = np.full((4, *right.shape), 7, right.dtype), np.zeros_like(right)
        read_only.flags.writeable = False
        for out in (wide, np.full(right.shape, 7, np.float64), read_only):
            before = out.tobytes()
            box = tuple((0, size) for size in right.shape)
            attempts = [
                lambda name=name, out=out: checkpoint.read(name, out),
                lambda name=name, out=out: list(checkpoint.stream(names=[name], into=lambda _: out)),
                lambda name=name, out=out: list(checkpoint.stream_slices([Slice(name)], into=lambda _: out)),
                lambda name=name, out=out, shape=right.shape, box=box: list(
                    checkpoint.stream_regions([[name]], lambda _: [Region(shape, box, out)])
                ),
            ]
            for attempt in attempts:
                with pytest.raises(ValueError, match="expected"):
                    attempt()
            assert out.tobytes() == before
