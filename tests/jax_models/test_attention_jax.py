"""Attention over a cache has two forms, one per kind of hardware: each against ``attend`` over keys in one piece.

The form for accelerators is what ``jax.lax.platform_dependent`` takes anywhere but on a CPU, so no test of whole models
runs it here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_models.layers.attention import attend, attend_cached, in_turn
from jax_models.layers.cached_attention import Given, attend_apart, attend_written, written
from jax_models.layers.step import Step, visible

ROWS, SLOTS, HEADS, KV_HEADS, WIDTH = 3, 13, 6, 2, 8


def case(tokens: int, window: int | None) -> Given:
    """Queries, keys and values of ``tokens`` tokens from slot 5 on, what they see, and a cache with junk behind it."""
    rng = np.random.default_rng(tokens)
    start = 5

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q = drawn(ROWS, tokens, HEADS, WIDTH)
    k, v = drawn(ROWS, tokens, KV_HEADS, WIDTH), drawn(ROWS, tokens, KV_HEADS, WIDTH)
    held = [drawn(ROWS, KV_HEADS, SLOTS, WIDTH).at[:, :, start:].set(1e3) for _ in "kv"]
    key_mask = np.zeros((ROWS, SLOTS), bool)
    key_mask[:, : start + tokens] = True
    key_mask[1, :3] = key_mask[2, start + tokens - 1 :] = False  # padded on the left; its last token is none
    return Given(q, k, v, jnp.int32(start), visible(jnp.asarray(key_mask), jnp.int32(start), tokens, window), *held)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "capped"])
@pytest.mark.parametrize("window", [None, 4], ids=["full", "window"])
@pytest.mark.parametrize("tokens", [1, 3], ids=["one", "several"])
@pytest.mark.parametrize("form", [attend_apart, attend_written], ids=["apart", "written"])
def test_both_forms_say_what_attention_over_all_keys_says(form, tokens, window, softcap):
    q, k, v, start, seen, k_held, v_held = given = case(tokens, window)
    whole = [written(part, new, start).swapaxes(1, 2) for part, new in ((k_held, k), (v_held, v))]
    expected = attend(q, *whole, seen, scale=0.3, softcap=softcap)
    np.testing.assert_allclose(form(given, scale=0.3, softcap=softcap), expected, rtol=2e-5, atol=2e-6)


def test_a_cpu_writes_first_and_anything_else_keeps_the_parts_apart():
    q, k, v, start, seen, k_held, v_held = case(1, None)
    step = Step(q, q, seen, seen[:, :, 0], start)
    with_cache = jax.jit(lambda *kv: attend_cached(q, k, v, step, dict(zip(("key", "value"), kv, strict=True)), None))
    lowered = {p: with_cache.trace(k_held, v_held).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    writes = {platform: text.count("dynamic_update_slice") for platform, text in lowered.items()}
    assert writes["cpu"] >= 2
    assert writes["tpu"] == 0


def test_on_a_tpu_one_token_looks_nothing_up_to_see_itself():
    form = jax.jit(lambda given: attend_apart(given, scale=None, softcap=None))
    assert "dynamic_slice" not in form.trace(case(1, None)).lower(lowering_platforms=("tpu",)).as_text()


def test_a_slot_is_written_where_the_cache_says_with_no_look_at_its_sign():
    _, k, _, start, _, k_held, _ = case(1, None)
    lowered = jax.jit(written).trace(k_held, k, start).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.select" not in lowered  # a number computed for that would lie in HBM to the end of the program


@pytest.mark.parametrize("is_first", [False, True], ids=["decode", "prefill"])
def test_a_tpu_reads_the_cache_then_writes_it_and_then_goes_on_and_prefill_as_it_likes(is_first):
    q, k, v, start, seen, k_held, v_held = case(1, None)
    step = Step(q, q, seen, seen[:, :, 0], start, is_first=is_first)
    both = jax.jit(lambda out, k, v, key, value: in_turn(out, k, v, step, {"key": key, "value": value}))
    traced = both.trace(q, k, v, k_held, v_held)
    lowered = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    barriers = {platform: text.count("optimization_barrier") for platform, text in lowered.items()}
    assert barriers == {"cpu": 0, "tpu": 0 if is_first else 2}
