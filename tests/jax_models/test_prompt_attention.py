"""The kernel for long prompts on TPUs, interpreted, against ``attend`` in float32 over the same bfloat16 values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_models
from jax_models.batch import Batch
from jax_models.kernels.prompt_attention import LEAST_TOKENS, _kernel, attend_prompt, takes
from jax_models.layers.attention import attend, attend_alone
from jax_models.layers.step import Step, visible
from parity.zoo import make_checkpoint

WIDTH = 128
EPS = 2**-8  # of bfloat16


def case(tokens: int, heads: int, kv_heads: int, rows: int = 3, width: int = WIDTH) -> tuple[jax.Array, ...]:
    """Queries, keys and values, and which tokens are real: all, padded on the left, padded on the right."""
    rng = np.random.default_rng(tokens + heads)
    sizes = [(rows, tokens, count, width) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in sizes)
    mask = np.ones((rows, tokens), bool)
    mask[1 % rows, : tokens // 3] = False
    mask[2 % rows, tokens - 90 :] = False
    return 2 * q, k, v, jnp.asarray(mask)  # scores that choose, as those of trained models do


def error(found: jax.Array, given: tuple[jax.Array, ...], scale: float, softcap: float | None, window: Any) -> float:
    """The largest error at a real token, in roundings of the largest value."""
    *qkv, mask = given
    seen = visible(mask, 0, mask.shape[1], window)
    expected = attend(*(x.astype(jnp.float32) for x in qkv), seen, scale=scale, softcap=softcap)
    wrong = np.where(mask[..., None, None], np.asarray(found, np.float32) - expected, 0)
    assert np.isfinite(np.asarray(found, np.float32)).all()
    return float(abs(wrong).max() / EPS / abs(expected).max())


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "softcap", "window"),
    [
        (512, 4, 2, None, None),
        (700, 3, 1, None, None),
        (515, 2, 2, 2.0, 100),
        (600, 5, 5, None, 384),
        (640, 4, 1, 5.0, 1),
    ],
    ids=["even", "odd", "capped-window", "odd-heads", "itself"],
)
@pytest.mark.parametrize("scale", [WIDTH**-0.5, 2**-3.0])
def test_it_says_what_attention_says(
    tokens: int, heads: int, kv_heads: int, softcap: float | None, window: int | None, scale: float
) -> None:
    given = case(tokens, heads, kv_heads)
    options: Any = {"scale": scale, "softcap": softcap, "window": window}
    found = attend_prompt(*given, **options, mesh=None, interpret=True)
    assert (found.shape, found.dtype) == (given[0].shape, jnp.bfloat16)
    assert error(found, given, scale, softcap, window) < 1.25


@pytest.mark.parametrize("window", [None, 1, 700, 5000])
def test_its_tables_are_those_of_jaxs_own_masks(window: int | None) -> None:
    length, group = 4096, 3
    shape = (length, length)
    theirs = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    ours = _kernel(group, length, None, window, False)
    sizes = ours.kwargs["block_sizes"]
    found = splash.make_splash_mqa_single_device(masks.MultiHeadMask([theirs] * group), block_sizes=sizes)
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(found)))
    assert len(jax.tree.leaves(ours)) > 3


def test_tables_made_while_a_program_is_traced_serve_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(512, 2, 1)
    made: list[Any] = []
    real = splash.make_splash_mqa_single_device
    monkeypatch.setattr(splash, "make_splash_mqa_single_device", lambda *x, **y: made.append(x) or real(*x, **y))
    _kernel.cache_clear()
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    options: Any = {"scale": 0.1, "softcap": None, "window": None, "interpret": True, "mesh": mesh}
    for factor in (1, 2):
        found = jax.jit(lambda *x, factor=factor: factor * attend_prompt(*x, **options))(*given)
        assert np.isfinite(np.asarray(found, np.float32)).all()
    assert len(made) == 1


def test_gradients_are_those_of_attention() -> None:
    *qkv, mask = case(512, 2, 1, rows=1)
    seen = visible(mask, 0, 512, None)

    def by_kernel(*qkv: jax.Array) -> jax.Array:
        options: Any = {"scale": 0.125, "softcap": None, "window": None, "mesh": None, "interpret": True}
        return jnp.sum(attend_prompt(*qkv, mask, **options).astype(jnp.float32) ** 2 * mask[..., None, None])

    def by_xla(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(attend(*(x.astype(jnp.float32) for x in qkv), seen, scale=0.125) ** 2 * mask[..., None, None])

    for found, expected in zip(*(jax.grad(way, argnums=(0, 1, 2))(*qkv) for way in (by_kernel, by_xla)), strict=True):
        wrong = abs(found.astype(jnp.float32) - expected.astype(jnp.float32)).max()
        assert wrong < 2 * EPS * abs(expected).max()


MESHES = [  # how many parts of the queries there are
    ({"tensor": 2}, 4, 2, 2),
    ({"data": 2, "tensor": 4}, 8, 4, 8),
    ({"expert": 2, "tensor": 4}, 8, 2, 8),  # queries of one key on several devices
    ({"expert": 2, "tensor": 4}, 8, 4, 8),
    ({"tensor": 8}, 8, 2, 8),  # keys everywhere
    ({"tensor": 2}, 6, 3, 2),  # queries of a device ask for parts of keys' groups
    ({"tensor": 4}, 3, 1, 1),  # nothing is cut
    ({"data": 2, "fsdp": 2, "tensor": 2}, 4, 2, 8),
]


@pytest.mark.parametrize(("axes", "heads", "kv_heads", "parts"), MESHES, ids=str)
def test_on_a_mesh_it_says_the_same_bits(axes: dict[str, int], heads: int, kv_heads: int, parts: int) -> None:
    count = int(np.prod(list(axes.values())))
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(list(axes.values())), tuple(axes))
    given = case(512, heads, kv_heads, rows=4)
    options: Any = {"scale": 0.1, "softcap": None, "window": None, "interpret": True}
    found = jax.jit(lambda *x: attend_prompt(*x, **options, mesh=mesh))(*given)
    assert np.array_equal(found, attend_prompt(*given, **options, mesh=None))
    assert len({str(shard.index) for shard in found.addressable_shards}) == parts


def test_with_shardings_of_ones_own_xla_attends(tmp_path: Path) -> None:
    """It partitions no kernel, so a program of rows on two devices would not lower for TPUs."""
    model = jax_models.load(make_checkpoint("qwen3", tmp_path / "it", dtype="BF16", head_dim=128), dtype="bfloat16")
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    ids = jax.device_put(np.ones((2, LEAST_TOKENS), np.int32), NamedSharding(mesh, PartitionSpec("rows")))
    weights = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec())), model.weights)
    own = jax.jit(model.apply).trace(weights, ids).lower(lowering_platforms=("tpu",)).as_text()
    whole = (np.ones(ids.shape, kind) for kind in (np.int32, bool, np.int32))
    ours = model.programs.forward.trace(model.weights, Batch(*whole))
    assert "tpu_custom_call" not in own
    assert "tpu_custom_call" in ours.lower(lowering_platforms=("tpu",)).as_text()


def step_of(mask: jax.Array, window: int | None = None) -> Step:
    return Step(mask, mask, visible(mask, 0, mask.shape[1], window), mask, 0, is_first=True, window=window)


@pytest.mark.parametrize(
    ("tokens", "dtype", "width", "is_taken"),
    [
        (LEAST_TOKENS, jnp.bfloat16, 128, True),
        (LEAST_TOKENS, jnp.bfloat16, 256, True),
        (LEAST_TOKENS - 1, jnp.bfloat16, 128, False),
        (LEAST_TOKENS, jnp.float32, 128, False),
        (LEAST_TOKENS, jnp.bfloat16, 72, False),
    ],
)
def test_a_tpu_takes_it_for_long_prompts_in_bfloat16_and_a_cpu_never(
    tokens: int, dtype: Any, width: int, is_taken: bool
) -> None:
    *qkv, mask = case(tokens, 2, 1, rows=1, width=width)
    qkv = [x.astype(dtype) for x in qkv]
    assert takes(qkv[0]) == is_taken
    traced = jax.jit(lambda *x: attend_alone(*x, step_of(mask), None, scale=None, softcap=None)).trace(*qkv)
    lowered = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    calls = {platform: len(re.findall("tpu_custom_call", text)) for platform, text in lowered.items()}
    assert calls == {"cpu": 0, "tpu": int(is_taken)}
