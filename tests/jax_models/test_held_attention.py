"""The kernel that attends over a cache on TPUs, interpreted, against both parts in float32 over the same values."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_models
from jax_models.kernels.heads import left_to_xla
from jax_models.kernels.held_attention import LEAST_SLOTS, MOST_TOKENS, takes
from jax_models.layers.attention import attend_cached
from jax_models.layers.cached_attention import Given, attend_apart, attend_joined
from jax_models.layers.step import Step, visible
from parity.zoo import make_checkpoint

ROOT = Path(__file__).parents[2]
EPS = 2**-8  # of bfloat16


def case(
    tokens: int,
    heads: int,
    kv_heads: int,
    slots: int,
    start: int,
    *,
    rows: int = 3,
    width: int = 128,
    window: int | None = None,
) -> Given:
    """A row padded on the left, a whole one, one with empty slots; junk is not held."""
    rng = np.random.default_rng(slots + heads)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    q = 2 * drawn(rows, tokens, heads, width)  # scores that choose, as those of trained models do
    k, v = drawn(rows, tokens, kv_heads, width), drawn(rows, tokens, kv_heads, width)
    held = [drawn(rows, kv_heads, slots, width).at[:, :, start:].set(1e3) for _ in "kv"]
    mask = np.zeros((rows, slots), bool)
    mask[:, : start + tokens] = True
    mask[0, : start // 2] = mask[2 % rows, start // 3 : start // 2] = False
    return Given(q, k, v, jnp.int32(start), visible(jnp.asarray(mask), jnp.int32(start), tokens, window), *held)


def error(found: jax.Array, given: Given, scale: float | None, softcap: float | None) -> float:
    """The largest, in roundings of the largest value."""
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, given)
    expected = attend_apart(exact, scale=scale, softcap=softcap)
    assert (found.shape, found.dtype) == (given.q_BTNH.shape, jnp.bfloat16)
    return float(abs(found.astype(jnp.float32) - expected).max() / EPS / abs(expected).max())


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 4, 2, 512, 300), {}),
        ((1, 3, 1, 700, 699), {}),
        ((3, 5, 5, 4500, 4400), {}),  # six blocks
        ((MOST_TOKENS, 18, 2, 1000, 990), {"rows": 2}),
        ((2, 2, 1, 20000, 13000), {"window": 300, "rows": 1}),
        ((MOST_TOKENS, 128, 1, 3000, 2900), {"rows": 1}),  # three blocks, for scores would fill VMEM
        ((1, 6, 3, 640, 128), {"width": 256}),
        ((1, 4, 4, 600, 1), {}),
        ((2, 4, 2, 600, 0), {}),
    ],
    ids=["even", "full", "odd-heads", "many-queries", "window", "many-scores", "wide", "one-slot", "nothing"],
)
@pytest.mark.parametrize(("scale", "softcap"), [(None, None), (0.3, 2.0)], ids=["plain", "capped"])
def test_it_says_what_attention_says(sizes: Any, options: Any, scale: float | None, softcap: float | None) -> None:
    given = case(*sizes, **options)
    found = attend_joined(given, scale=scale, softcap=softcap, mesh=None, interpret=True)
    assert error(found, given, scale, softcap) < 1.25


@pytest.mark.parametrize("window", [None, 1000])
def test_a_row_reads_from_the_first_block_it_sees_to_the_last_that_is_filled(window: int | None) -> None:
    """What is read is multiplied by something, so that no number there would make numbers of the row none."""
    block = 4096  # of one key head of 128
    given = case(2, 2, 1, 6 * block, 3 * block + 5, rows=2, window=window)
    first = [3 * block // 2 // block * block, 0] if window is None else [(3 * block - window) // block * block] * 2
    slots = np.arange(6 * block)
    unread = np.stack([(slots < row) | (slots >= 4 * block) for row in first])
    junk_k, junk_v = (jnp.where(unread[:, None, :, None], jnp.nan, part) for part in given[5:])
    junk = given._replace(held_k_BKSH=junk_k, held_v_BKSH=junk_v)
    options: Any = {"scale": None, "softcap": None, "mesh": None, "interpret": True}
    found = attend_joined(junk, **options)
    assert jnp.array_equal(found, attend_joined(given, **options))
    assert error(found, given, None, None) < 1.25
    for row, at in [(0, first[0]), (1, first[1]), (1, 4 * block - 1)]:  # the edges of what is
        missing = junk._replace(held_v_BKSH=junk_v.at[row, :, at].set(jnp.nan))
        assert jnp.isnan(attend_joined(missing, **options)[row]).all()


MESHES = [  # how many parts of queries there are, None: XLA attends
    ({"tensor": 2}, 4, 2, 2),
    ({"data": 2, "tensor": 4}, 8, 4, 8),
    ({"expert": 2, "tensor": 4}, 8, 2, 8),  # one query a device, keys of four on two
    ({"expert": 2, "tensor": 2}, 16, 2, 4),
    ({"tensor": 4}, 8, 2, 4),  # keys everywhere, of which a device asks for one
    ({"tensor": 8}, 8, 1, 8),
    ({"tensor": 2}, 12, 6, 2),
    ({"tensor": 2}, 6, 3, None),  # queries of a device ask for parts of keys' groups
    ({"tensor": 4}, 3, 1, 1),  # nothing is cut
    ({"data": 2, "fsdp": 2, "tensor": 2}, 4, 2, 8),
]


@pytest.mark.parametrize(("axes", "heads", "kv_heads", "parts"), MESHES, ids=str)
def test_on_a_mesh_it_says_the_same_bits(axes: dict[str, int], heads: int, kv_heads: int, parts: int | None) -> None:
    count = int(np.prod(list(axes.values())))
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(list(axes.values())), tuple(axes))
    given = case(2, heads, kv_heads, 600, 520, rows=4)
    assert takes(given.q_BTNH, given.held_k_BKSH, mesh) == (parts is not None)
    if parts is None:
        return
    options: Any = {"scale": 0.1, "softcap": None, "interpret": True}
    found = jax.jit(lambda given: attend_joined(given, **options, mesh=mesh))(given)
    assert jnp.array_equal(found, attend_joined(given, **options, mesh=None))
    assert len({str(shard.index) for shard in found.addressable_shards}) == parts


def test_heads_that_vmem_has_no_room_for_are_left_to_xla() -> None:
    def of(heads: int, kv_heads: int, tokens: int, width: int = 128) -> bool:
        shapes = (1, tokens, heads, width), (1, kv_heads, LEAST_SLOTS, width)
        q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
        return takes(q, k, None)  # pyright: ignore[reportArgumentType]

    assert of(32, 32, MOST_TOKENS)
    assert not of(33, 33, 1)  # 128 slots of their keys
    assert of(64, 8, MOST_TOKENS, 256)
    assert not of(144, 8, MOST_TOKENS, 256)  # of 18 queries each


def calls(lowered: str) -> int:
    return len(re.findall("tpu_custom_call", lowered))


@pytest.mark.parametrize(
    ("tokens", "slots", "width", "dtype", "is_taken"),
    [
        (1, LEAST_SLOTS, 128, jnp.bfloat16, True),
        (MOST_TOKENS, LEAST_SLOTS, 256, jnp.bfloat16, True),
        (MOST_TOKENS + 1, LEAST_SLOTS, 128, jnp.bfloat16, False),
        (1, LEAST_SLOTS - 1, 128, jnp.bfloat16, False),
        (1, LEAST_SLOTS, 72, jnp.bfloat16, False),
        (1, LEAST_SLOTS, 128, jnp.float32, False),
    ],
)
def test_a_tpu_takes_it_for_few_tokens_over_many_slots_in_bfloat16_and_a_cpu_never(
    tokens: int, slots: int, width: int, dtype: Any, is_taken: bool
) -> None:
    q, k, v, start, seen, *held = case(tokens, 2, 1, slots, slots // 2, rows=1, width=width)
    q, k, v, *held = (x.astype(dtype) for x in (q, k, v, *held))
    step = Step(q, q, seen, seen[:, :, 0], start)
    traced = jax.jit(lambda *kv: attend_cached(q, k, v, step, dict(zip(("key", "value"), kv, strict=True)), None))
    lowered = {p: traced.trace(*held).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert takes(q, held[0], None) == is_taken
    assert {platform: calls(text) for platform, text in lowered.items()} == {"cpu": 0, "tpu": int(is_taken)}
    with left_to_xla():
        assert not takes(q, held[0], None)


def test_a_step_of_a_model_takes_it_in_every_layer(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3", tmp_path / "it", dtype="BF16", head_dim=128, num_hidden_layers=3)
    model = jax_models.load(path, dtype="bfloat16")
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    counts = {}
    for slots in (LEAST_SLOTS // 2, LEAST_SLOTS):
        cache = model.programs.empty_cache(rows=2, capacity=slots)
        lowered = model.programs.decode.trace(model.weights, tokens, cache).lower(lowering_platforms=("tpu",))
        text = lowered.as_text()
        counts[slots] = text.count("call @attend_held"), calls(text)
    assert counts == {LEAST_SLOTS // 2: (0, 0), LEAST_SLOTS: (3, 1)}  # one function, which all layers call


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-compiler]'")
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_odd_sizes_compile_for_tpus_and_copy_no_cache(chip: str, tmp_path: Path) -> None:
    """In a process of its own: libtpu cannot be unloaded."""
    result = tmp_path / "found.json"
    script = [sys.executable, str(ROOT / "tests" / "jax_models" / "compile_attention.py"), chip, str(result)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, found in json.loads(result.read_text("utf-8")).items():
        assert found["kernels"] == 1, name
        assert found["temp_bytes"] < 500_000, name
