"""Prefill, decode and sampling of the torch backend. That the tokens are the right ones: tests/models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import torch_models
from parity.zoo import make_checkpoint
from torch_models.generate import sample
from torch_models.layers.linear import multiply

STEPS, T = 6, 17
LENGTHS = (17, 9, 4)
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def load(directory: Path, name: str, **config) -> torch_models.Model:
    return torch_models.load(make_checkpoint(name, directory, pad_token_id=5, **config))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> torch_models.Model:
    return load(tmp_path_factory.mktemp("dense") / "a", "qwen3-sliding", sliding_window=5, **TWO_LAYERS)


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> torch_models.Model:
    if request.param == "dense":
        return request.getfixturevalue("dense")
    return load(tmp_path_factory.mktemp("moe") / "a", "qwen3-moe-nonorm", num_hidden_layers=2)


def batch(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of LENGTHS tokens; under the padding stands a token that whoever looks at it sees."""
    rows = [np.random.default_rng(row).integers(0, 211, length) for row, length in enumerate(LENGTHS)]
    ids_BT, mask_BT = np.full((len(rows), T), 7), np.zeros((len(rows), T), np.int64)
    for row, tokens in enumerate(rows):
        place = slice(T - len(tokens), T) if side == "left" else slice(0, len(tokens))
        ids_BT[row, place], mask_BT[row, place] = tokens, 1
    return ids_BT, mask_BT


def relative_error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


def test_every_step_has_the_logits_of_a_full_forward(model: torch_models.Model) -> None:
    ids_BT, mask_BT = batch("right")
    follow_BN = np.random.default_rng(9).integers(0, 211, (len(LENGTHS), STEPS))
    whole_BT = np.pad(ids_BT, ((0, 0), (0, STEPS)))
    whole_mask_BT = np.zeros_like(whole_BT)
    for row, length in enumerate(LENGTHS):
        whole_BT[row, length : length + STEPS] = follow_BN[row]
        whole_mask_BT[row, : length + STEPS] = 1
    want_BTV = np.asarray(model(whole_BT, whole_mask_BT))
    logits_BV, cache = model.prefill(ids_BT, mask_BT, max_new_tokens=STEPS)
    for step in range(STEPS + 1):
        want_BV = np.stack([want_BTV[row, length - 1 + step] for row, length in enumerate(LENGTHS)])
        assert relative_error(logits_BV, want_BV) <= 1e-5, step  # 16 ulp of float32: the sums have another order
        if step < STEPS:
            logits_BV, cache = model.decode(follow_BN[:, step], cache)


def test_the_side_of_the_padding_changes_nothing(model: torch_models.Model) -> None:
    tokens = [np.asarray(model.generate(*batch(side), STEPS, ignore_eos=True)) for side in ("left", "right")]
    np.testing.assert_array_equal(*tokens)
    prefills = [np.asarray(model.prefill(*batch(side), max_new_tokens=STEPS)[0]) for side in ("left", "right")]
    np.testing.assert_array_equal(*prefills)


def test_generation_is_the_argmax_of_every_step(dense: torch_models.Model) -> None:
    ids_BT, mask_BT = batch("left")
    logits_BV, cache = dense.prefill(ids_BT, mask_BT, max_new_tokens=STEPS)
    want = []
    for _ in range(STEPS):
        want.append(np.asarray(logits_BV).argmax(-1))
        logits_BV, cache = dense.decode(want[-1], cache)
    got = dense.generate(ids_BT, mask_BT, STEPS, ignore_eos=True)
    assert got.dtype == torch.int64
    np.testing.assert_array_equal(got, np.stack(want, axis=1))


def test_an_end_token_ends_its_row_and_the_rest_is_filled_with_the_pad_token(
    dense: torch_models.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = np.asarray(dense.generate(*batch("left"), STEPS, ignore_eos=True))
    end = next(int(t) for t in endless[0][1:4] if t not in endless[0][:1] and t != 5)
    ends = [end, int(endless[1][0])]
    checkpoint = dense.checkpoint
    document = checkpoint.generation_document | {"eos_token_id": ends}
    ending = dense
    monkeypatch.setattr(dense, "checkpoint", dataclasses.replace(checkpoint, generation_document=document))
    got = np.asarray(ending.generate(*batch("left"), STEPS))
    want = endless.copy()
    for row in want:
        hits = np.flatnonzero(np.isin(row, ends))
        if len(hits):
            row[hits[0] + 1 :] = 5
    done = [np.flatnonzero(np.isin(row, ends)) for row in endless]
    stop = max(int(hits[0]) + 1 if len(hits) else STEPS for hits in done)
    np.testing.assert_array_equal(got, want[:, :stop])
    assert (got[1][1:] == 5).all()
    np.testing.assert_array_equal(ending.generate(*batch("left"), STEPS, ignore_eos=True), endless)


def test_generation_stops_when_every_row_has_ended(dense: torch_models.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = np.asarray(dense.generate(*batch("left"), 1, ignore_eos=True))
    document = {"eos_token_id": [int(token) for token in first[:, 0]]}
    ending = dense
    monkeypatch.setattr(dense, "checkpoint", dataclasses.replace(dense.checkpoint, generation_document=document))
    np.testing.assert_array_equal(ending.generate(*batch("left"), STEPS), first)


def test_a_step_reads_no_slots_far_beyond_those_in_use_and_goes_on_into_them(dense: torch_models.Model) -> None:
    ids_BT = np.random.default_rng(3).integers(0, 211, (2, 62))
    logits_BV, cache = dense.prefill(ids_BT, max_new_tokens=100)
    assert cache.capacity == 256
    junk = [part[:, :, 128:] for parts in cache.layers.values() for part in parts.values()]
    for part in junk:
        part.fill_(torch.nan)  # what a mask hides is still multiplied by 0, and 0 NaN is NaN
    tokens_BT = torch.from_numpy(ids_BT)
    for _ in range(4):  # the third lies beyond the first 64
        token_B = logits_BV.argmax(-1)
        tokens_BT = torch.cat([tokens_BT, token_B[:, None]], dim=1)
        logits_BV, cache = dense.decode(token_B, cache)
        torch.testing.assert_close(logits_BV, dense(tokens_BT)[:, -1], rtol=1e-4, atol=1e-4)
    assert cache.length == int(cache.slot) == tokens_BT.shape[1]


@pytest.mark.parametrize("rows", [1, 2, 7, 256, 257])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("size", [40, 41])
@pytest.mark.parametrize("is_intel", [False, True])
def test_a_product_is_the_same_in_parts_and_whichever_operand_comes_first(
    rows: int, size: int, has_bias: bool, is_intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_models.layers.linear._is_intel", lambda: is_intel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, weight, bias = torch.randn(1, rows, 48), torch.randn(size, 48), torch.randn(size) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    got = multiply(x, weight, bias)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


def test_caches_of_the_same_memory_count_their_slots_together(dense: torch_models.Model) -> None:
    cache = dense.empty_cache(4, 256)
    dense.prefill_into(dense.checked_prompt(*batch("left")), cache.first_rows(3))
    assert cache.length == int(cache.slot) == T
    part = cache.with_room(1)
    assert (part.capacity, part.length) == (64, T)
    dense.decode([1, 2, 3, 4], part)
    assert cache.length == int(cache.slot) == T + 1
    cache.reset()
    assert part.length == 0


def test_what_a_step_returns_may_be_written_to_and_so_may_its_cache(dense: torch_models.Model) -> None:
    _, cache = dense.prefill(*batch("left"), max_new_tokens=STEPS)
    logits_BV, cache = dense.decode([1, 2, 3], cache)
    logits_BV[:, 5] = -torch.inf  # as whoever forbids a token does; a tensor of inference mode refuses it
    cache.reset()
    assert not logits_BV[:, 5].isfinite().any()
    assert cache.length == 0


def test_a_cache_of_old_weights_is_refused(dense: torch_models.Model) -> None:
    _, cache = dense.prefill(*batch("left"), max_new_tokens=STEPS)
    embed, _ = (half.detach().clone() for half in dense.get_embed_and_head())
    newer = dense.set_embed_and_head(embed * 2)
    with pytest.raises(ValueError, match=rf"version {newer.version - 1}; the model is at {newer.version}\)"):
        newer.decode([1, 2, 3], cache)
    dense.set_embed_and_head(embed)
    with pytest.raises(ValueError, match="Run prefill again"):  # a version never comes back, though its weights may
        dense.decode([1, 2, 3], cache)


def test_a_full_cache_is_refused(dense: torch_models.Model) -> None:
    _, cache = dense.prefill(*batch("left"), max_new_tokens=STEPS)
    for _ in range(cache.capacity - T):
        _, cache = dense.decode([1, 2, 3], cache)
    with pytest.raises(ValueError, match=r"the cache is full at 32 tokens\. Give prefill a larger max_new_tokens"):
        dense.decode([1, 2, 3], cache)


def test_a_cache_of_other_rows_is_refused(dense: torch_models.Model) -> None:
    _, cache = dense.prefill(*batch("left"), max_new_tokens=STEPS)
    with pytest.raises(ValueError, match="2 tokens for a cache of 3 rows"):
        dense.decode([1, 2], cache)
    with pytest.raises(ValueError, match="outside"):
        dense.decode([1, 2, 211], cache)


def test_a_row_without_tokens_is_refused(dense: torch_models.Model) -> None:
    ids_BT, mask_BT = batch("left")
    mask_BT[1] = 0
    with pytest.raises(ValueError, match=r"rows \[1\] have no real token"):
        dense.generate(ids_BT, mask_BT)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_a_choice_of_one_is_greedy(dense: torch_models.Model, options: dict) -> None:
    greedy = dense.generate(*batch("left"), STEPS, ignore_eos=True)
    got = dense.generate(*batch("left"), STEPS, **({"temperature": 1.7} | options), seed=3, ignore_eos=True)
    np.testing.assert_array_equal(got, greedy)


def test_the_seed_decides(dense: torch_models.Model) -> None:
    first, again, other = (
        np.asarray(dense.generate(*batch("left"), STEPS, temperature=1.5, seed=seed, ignore_eos=True))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(set(map(tuple, first))) == 3  # rows draw on their own


def test_every_bad_option_is_named_at_once(dense: torch_models.Model) -> None:
    with pytest.raises(ValueError, match="max_new_tokens=0") as caught:
        dense.generate(*batch("left"), 0, temperature=-1.0, top_k=0, top_p=1.5)
    for word in ("max_new_tokens=0", "temperature=-1.0", "top_k=0", "top_p=1.5"):
        assert word in str(caught.value)
    for bad in ({"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            dense.generate(*batch("left"), **bad)


DRAWS = 8000


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.6, None, None), (2.0, 5, None), (1.0, None, 0.7), (1.5, 6, 0.8), (1.0, 400, 1.0)],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits_V = np.random.default_rng(4).normal(0, 1.5, 23)
    want_V = expected_probability(logits_V, temperature, top_k, top_p)
    logits_BV = torch.from_numpy(logits_V).float().expand(DRAWS, 23)
    drawn_B = sample(logits_BV, torch.Generator().manual_seed(1), temperature, top_p or 1.0, top_k)
    assert drawn_B.dtype == torch.int64
    count_V = np.bincount(np.asarray(drawn_B), minlength=23)
    assert_drawn_from(count_V, want_V)


def expected_probability(
    logits_V: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """By the definition, in float64: cut to the best k, renormalise, then to the fewest that reach p."""
    weight_V = np.exp(logits_V / temperature)
    order = np.argsort(-weight_V)[: top_k or len(weight_V)]
    share = weight_V[order] / weight_V[order].sum()
    kept = order[: int(np.searchsorted(np.cumsum(share), top_p)) + 1] if top_p and top_p < 1 else order
    out_V = np.zeros_like(weight_V)
    out_V[kept] = weight_V[kept] / weight_V[kept].sum()
    return out_V


def assert_drawn_from(count_V: np.ndarray, want_V: np.ndarray) -> None:
    assert not count_V[want_V == 0].any(), "a token was drawn that the options exclude"
    expected = want_V[want_V > 0] * count_V.sum()
    chi_square = ((count_V[want_V > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    # mean and variance of chi-square are k and 2k; 5 sigma, and the seed is fixed
    assert abs(chi_square - freedom) <= 5 * np.sqrt(2 * freedom), (chi_square, freedom)


def test_a_wrong_temperature_is_seen_by_the_check_above() -> None:
    logits_V = np.random.default_rng(4).normal(0, 1.5, 23)
    count_V = np.round(DRAWS * expected_probability(logits_V, 1.1, None, None)).astype(int)
    with pytest.raises(AssertionError):
        assert_drawn_from(count_V, expected_probability(logits_V, 1.0, None, None))
