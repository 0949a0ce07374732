"""Parts of tensors: the bytes of a plain index, of which little more is read than there are."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
from handmade import entry, open_files, safetensors, write
from hypothesis import given
from hypothesis import strategies as st

from loaders import CheckpointError, open_checkpoint
from loaders.dtypes import to_numpy
from loaders.quantization.quantize import quantized
from loaders.reading.filling import Filling
from loaders.reading.memory import STAGING_BYTES
from loaders.reading.plan import plan_load
from loaders.reading.regions import Region, box_of, pieces_of, sizes_of
from loaders.reading.scratch import Staging
from loaders.reading.shards import read_shards, region_of
from loaders.reading.whole import read_whole
from loaders.sources.local import LocalDirectory, LocalFile
from loaders.spec import ParamSpec, Placement
from loaders.stage import Stage
from parity.lifecycle.staged_memory import counted
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint


@pytest.fixture
def bytes_read(monkeypatch):
    """Lengths of all reads of tensors from here on."""
    found: list[int] = []
    plain = LocalFile.scatter_into

    def counted(self, outs, position):
        found.extend(size for size in [sum(map(len, outs))] if size)
        plain(self, outs, position)

    monkeypatch.setattr(LocalFile, "scatter_into", counted)
    return found


def numbered(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 16, shape).astype(np.uint16)


def read_region(checkpoint, name, box):
    info = checkpoint.tensors[name]
    region = Region(info.shape, box, np.empty(sizes_of(box), to_numpy(info.dtype)))
    list(checkpoint.stream_regions([{name}], lambda _: [region]))
    return region.out


def slices_of(box):
    return tuple(slice(*ends) for ends in box)


@st.composite
def boxes(draw):
    """A shape, and parts of it."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    ends = st.tuples(*(st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted).map(tuple) for size in shape))
    return shape, draw(st.lists(ends, min_size=1, max_size=4))


@given(boxes(), st.integers(0, 40), st.booleans(), st.sampled_from([11, 64, 1 << 20]))
def test_pieces_together_are_the_plain_index(case, gap_bytes, is_strided, most_bytes):
    shape, found = case
    whole = numbered(*shape)
    parts = []
    for box in found:
        sizes = sizes_of(box)
        out = np.empty(sizes[::-1], np.uint16).T if is_strided else np.empty(sizes, np.uint16)
        parts.append(Region(shape, box, out))
    raw, read, position = whole.reshape(-1).view(np.uint8), 0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loaders.reading.memory.STAGING_BYTES", most_bytes)
        for piece in pieces_of(parts, gap_bytes):
            assert position <= piece.position
            assert piece.num_bytes <= most_bytes
            position = piece.position
            read += piece.num_bytes
            piece.take(raw[position : position + piece.num_bytes].copy())
    for part in parts:
        np.testing.assert_array_equal(part.out, whole[slices_of(part.box)])
    if len(parts) == 1 and not gap_bytes:
        assert read == parts[0].out.nbytes  # and not a byte more


@pytest.mark.parametrize(
    ("shape", "box", "reads"),
    [
        ((64, 8), ((16, 32), (0, 8)), [256]),  # rows: one range
        ((4, 4, 16), ((1, 3), (0, 4), (0, 16)), [256]),
        ((4, 4, 4096), ((1, 3), (2, 4), (0, 4096)), [16384] * 2),  # of each expert a range
        ((4, 4098), ((0, 4), (0, 2049)), [4098] * 4),  # more than a page between columns: row by row
        ((4, 4096), ((0, 4), (1024, 3072)), [4 * 8192 - 4096]),  # less: read through, from the first to the last
        ((), (), [2]),
        ((3, 0), ((1, 2), (0, 0)), []),
        ((5, 4), ((2, 2), (0, 4)), []),
    ],
)
def test_what_is_read_of_a_file(tmp_path, shape, box, reads, bytes_read):
    whole = numbered(*shape)
    path = write(
        tmp_path, {"model.safetensors": safetensors({"a": entry("U16", shape, 0, whole.nbytes)}, whole.tobytes())}
    )
    checkpoint = open_checkpoint(path)
    bytes_read.clear()
    np.testing.assert_array_equal(read_region(checkpoint, "a", box), whole[slices_of(box)])
    assert bytes_read == reads
    assert open_files() == []


def test_rows_that_several_parts_share_are_read_once(tmp_path, bytes_read):
    whole = numbered(6, 4096)
    path = write(
        tmp_path, {"model.safetensors": safetensors({"a": entry("U16", whole.shape, 0, whole.nbytes)}, whole.tobytes())}
    )
    checkpoint = open_checkpoint(path)
    bytes_read.clear()
    boxes = [((low, low + 2), (left, left + 1024)) for low in (1, 3) for left in range(0, 4096, 1024)]
    parts = [Region(whole.shape, box, np.empty((2, 1024), np.uint16)) for box in boxes]
    list(checkpoint.stream_regions([{"a"}], lambda _: parts))
    for box, part in zip(boxes, parts, strict=True):
        np.testing.assert_array_equal(part.out, whole[slices_of(box)])
    assert bytes_read == [4 * 8192]  # rows 1 to 4
    assert len(list(pieces_of(parts, gap_bytes=4096))) == 2  # two rows for four parts, and not row by row for each


def test_large_rows_go_through_a_bounded_buffer():
    rows = 3 * STAGING_BYTES // 8192 + 1
    part = Region((rows, 4096), ((0, rows), (0, 4095)), np.empty((rows, 4095), np.uint16))
    sizes = [piece.num_bytes for piece in pieces_of([part], 4096)]
    assert sizes == [STAGING_BYTES - 2] * 3 + [8190]
    experts = Region((2, 3, STAGING_BYTES), ((0, 2), (0, 3), (0, 9)), np.empty((9, 3, 2), np.uint16).T)
    assert max(piece.num_bytes for piece in pieces_of([experts], 1 << 40)) <= STAGING_BYTES


@pytest.mark.parametrize(
    "index", [(slice(0, 2),), (slice(0, 3, 2), slice(None)), (slice(0, 4), slice(None)), (0, slice(None))]
)
def test_an_index_that_is_no_part_is_a_value_error(index):
    with pytest.raises(ValueError, match=r"expected a slice without a step for each axis of \(3, 2\)"):
        box_of(index, (3, 2))


def test_a_destination_that_does_not_fit_is_a_value_error(tmp_path):
    path = write(tmp_path, {"model.safetensors": safetensors({"a": entry("U8", [4], 0, 4)}, b"abcd")})
    wrong = Region((4,), ((0, 2),), np.empty(3, np.uint8))
    with pytest.raises(ValueError, match=r"goes to uint8 \(3,\), expected uint8 \(2,\)"):
        list(open_checkpoint(path).stream_regions([{"a"}], lambda _: [wrong]))


def test_a_file_that_changed_is_an_error_also_of_a_slice(tmp_path):
    files = {"model.safetensors": safetensors({"a": entry("U8", [4], 0, 4)}, b"abcd")}
    checkpoint = open_checkpoint(write(tmp_path, files))
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        read_region(checkpoint, "a", ((0, 2),))
    assert open_files() == []


def test_a_file_that_changes_while_a_slice_is_read_is_an_error(tmp_path, monkeypatch):
    files = {"model.safetensors": safetensors({"a": entry("U8", [4], 0, 4)}, b"abcd")}
    checkpoint = open_checkpoint(write(tmp_path, files))
    plain = LocalFile.scatter_into

    def disturbed(self, outs, position):
        plain(self, outs, position)
        os.utime(tmp_path / "model.safetensors", ns=(1, 1))

    monkeypatch.setattr(LocalFile, "scatter_into", disturbed)
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        read_region(checkpoint, "a", ((0, 2),))
    assert open_files() == []


def test_bools_of_a_slice_are_ones_that_numpy_knows(tmp_path):
    path = write(tmp_path, {"model.safetensors": safetensors({"a": entry("BOOL", [4], 0, 4)}, b"\0\2\1\7")})
    found = read_region(open_checkpoint(path), "a", ((1, 4),))
    assert found.tobytes() == b"\1\1\1"


E, M, D = 4, 6, 10


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    "box", [((1, 3), (0, 2), (0, M), (0, D)), ((1, 3), (0, 2), (3, 6), (0, D)), ((0, 4), (1, 2), (2, 4), (5, 10))]
)
def test_a_shard_of_fused_experts_is_a_slice_of_their_tensor(is_transposed, box):
    param = numbered(E, 2, M, D)
    fused = param.reshape(E, 2 * M, D)
    stored = np.ascontiguousarray(fused.transpose(0, 2, 1)) if is_transposed else fused
    spec = ParamSpec("p", param.shape, (), (Placement("t"),), stored.shape, is_transposed=is_transposed)
    shard = np.empty(sizes_of(box), np.uint16)
    part = region_of(spec, spec.placements[0], box, shard)
    assert part is not None
    part.take(stored)
    np.testing.assert_array_equal(shard, param[slices_of(box)])


def test_an_expert_of_another_device_has_nothing_for_a_shard():
    spec = ParamSpec("p", (E, 2, M, D), (), (Placement("t", 3, 1),), (M, D))
    shard = np.zeros((2, 2, M, D), np.uint16)
    assert region_of(spec, Placement("t", 3, 1), ((0, 2), (0, 2), (0, M), (0, D)), shard) is None
    part = region_of(spec, Placement("t", 3, 1), ((2, 4), (0, 2), (0, M), (0, D)), shard)
    assert part is not None
    part.take(numbered(M, D))
    np.testing.assert_array_equal(shard[1, 1], numbered(M, D))
    assert not shard[0].any()
    assert not shard[1, 0].any()


def halves(spec, half):
    """The first axis that can be cut in two, cut in two; all of what cannot be."""
    cut = next((axis for axis, size in enumerate(spec.shape) if size % 2 == 0 and size > 2), None)
    ends = [(0, size) for size in spec.shape]
    if cut is not None:
        size = spec.shape[cut] // 2
        ends[cut] = half * size, (half + 1) * size
    return [tuple(ends)]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3_5-moe", "qwen3_vl-moe", "gemma3"])
@pytest.mark.slow_unless("qwen3_vl-moe-False", "qwen3-moe-True")
def test_halves_of_every_parameter_are_read_at_half_the_price(name, quantize, tmp_path, bytes_read, monkeypatch):
    monkeypatch.setattr(LocalDirectory, "gap_bytes", 0)  # rows of these models are shorter than a page
    path = make_checkpoint(name, tmp_path / "it", **(block_sizes(name) if quantize else {}))
    checkpoint = quantized(open_checkpoint(path)) if quantize else open_checkpoint(path)
    plan = plan_load(checkpoint, Stage())
    whole = {spec.name: param.copy() for spec, param in read_whole(Filling(plan))}
    for half in range(2):
        bytes_read.clear()
        filling = Filling(plan.within(None, staged=True, boxes_of=partial(halves, half=half)))
        expected = 0
        for spec, shards in read_shards(filling):
            ((box, shard),) = shards.items()
            expected += shard.nbytes
            assert shard.tobytes() == whole[spec.name][slices_of(box)].tobytes(), spec.name
        filling.finish()
        if not quantize:  # else matrices are read whole: their scale is of all of them
            assert expected <= sum(bytes_read) < 1.01 * expected


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-tied"])
def test_a_budget_is_of_what_is_held_here(name, tmp_path):
    """A host that holds half of a model needs memory for half of its largest parameter, and uses no more."""
    shipped = {"ship_tied_head": True} if name == "qwen3-tied" else {}
    checkpoint = open_checkpoint(make_checkpoint(name, tmp_path / "it", vocab_size=208, **shipped))
    plan = plan_load(checkpoint, Stage())
    sizes = [sum(checkpoint.tensors[one.tensor].num_bytes for one in spec.placements) for spec in plan.specs]
    for boxes_of, budget in ((None, max(sizes)), (partial(halves, half=1), max(sizes) // 2)):
        with pytest.raises(ValueError, match=rf"={budget - 1} is less than .*, the largest {budget} bytes"):
            plan.within(budget - 1, staged=True, boxes_of=boxes_of)
        filling = Filling(plan.within(budget, staged=True, boxes_of=boxes_of))
        with counted() as memory:
            before = memory.start()
            for _ in (read_whole if boxes_of is None else read_shards)(filling, staging=Staging()):
                pass
            assert 0 < memory.most - before <= budget
        filling.finish()


@pytest.mark.parametrize("half", [0, 1])
def test_a_redundant_tied_tensor_is_held_against_the_part_that_is_here(half, tmp_path):
    path = make_checkpoint("qwen3-tied", tmp_path / "it", vocab_size=208, ship_tied_head=True)
    info = open_checkpoint(path).tensors["lm_head.weight"]
    with open(path / info.file, "r+b") as file:
        file.seek(info.offsets[1] - 1)  # of the last row
        last = file.read(1)
        file.seek(info.offsets[1] - 1)
        file.write(bytes([last[0] ^ 1]))
    plan = plan_load(open_checkpoint(path), Stage())
    filling = Filling(plan.within(None, staged=True, boxes_of=partial(halves, half=half)))
    for _ in read_shards(filling):
        pass
    if half == 0:
        filling.finish()
        return
    with pytest.raises(CheckpointError, match="'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        filling.finish()


def test_a_scale_that_cannot_be_is_told_of_a_shard_too(tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "it", quantization=ZooQuantization(), **block_sizes("qwen3"))
    name = "model.layers.1.mlp.up_proj.weight_scale_2"
    info = open_checkpoint(path).tensors[name]
    with open(path / info.file, "r+b") as file:
        file.seek(info.offsets[0])
        file.write(np.float32(-1).tobytes())
    plan = plan_load(open_checkpoint(path), Stage())
    filling = Filling(plan.within(None, staged=True, boxes_of=partial(halves, half=0)))
    for _ in read_shards(filling):
        pass
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is -1.0, expected a scale above zero"):
        filling.finish()
