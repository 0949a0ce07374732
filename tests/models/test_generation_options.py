"""What is given to generation: numbers of any library are taken, what is none is refused by name, on both backends."""

import json
from decimal import Decimal
from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from planted import PACKAGES, TWO_LAYERS
from safetensors.numpy import load_file, save_file

from loaders import CheckpointError
from parity.zoo import make_checkpoint
from parity.zoo.draft import make_drafting_checkpoint
from torch_models.generate import sample

IDS = np.array([[3, 14, 15, 92, 65, 35], [89, 79, 32, 38, 46, 26]])
FURTHER = np.array([7, 3])


@pytest.fixture(scope="module", params=PACKAGES)
def package(request):
    return PACKAGES[request.param]


@pytest.fixture(scope="module")
def model(package, tmp_path_factory):
    return package.load(make_checkpoint("qwen3", tmp_path_factory.mktemp("it") / "it", num_hidden_layers=1))


@pytest.mark.parametrize(
    ("token_ids", "words"),
    [
        (FURTHER + 2**32, "token_ids holds 2 ids outside"),  # of 32 bits they would be others
        (FURTHER + 0.9, "token_ids is float64"),
        ([True, False], "token_ids is bool"),
        (["7", "3"], "token_ids is <U1"),
        (None, "token_ids is object"),
        ([7, 3, 1], "3 tokens for a cache of 2 rows"),
        ([[7, 3]], r"2 tokens for a cache of 2 rows, as \(1, 2\)"),
        ([-1, 7], "token_ids holds 1 ids outside"),
    ],
    ids=["wide", "fractions", "bools", "words", "none", "others", "a row", "negative"],
)
def test_tokens_that_are_none_are_refused_and_the_cache_is_as_it_was(model, token_ids, words):
    _, cache = model.prefill(IDS)
    with pytest.raises(ValueError, match=words):
        model.decode(token_ids, cache)
    logits, _ = model.decode(FURTHER, cache)
    expected, _ = model.decode(FURTHER, model.prefill(IDS)[1])
    assert np.array_equal(np.asarray(logits), np.asarray(expected))


@pytest.mark.parametrize(
    "token_ids",
    [list(FURTHER), FURTHER[:, None], FURTHER.astype(np.uint8), jnp.asarray(FURTHER), torch.from_numpy(FURTHER)],
    ids=["list", "column", "uint8", "jax", "torch"],
)
def test_integers_are_tokens_whoever_made_them(model, token_ids):
    logits, _ = model.decode(token_ids, model.prefill(IDS)[1])
    expected, _ = model.decode(FURTHER, model.prefill(IDS)[1])
    assert np.array_equal(np.asarray(logits), np.asarray(expected))


@pytest.mark.parametrize("max_new_tokens", [-30, 2.0, "2", True, None], ids=str)
def test_room_for_no_number_of_tokens_is_refused(model, max_new_tokens):
    for start in (model.prefill, model.generate):
        with pytest.raises(ValueError, match=r"max_new_tokens=.*, expected an integer, at least \d"):
            start(IDS, max_new_tokens=max_new_tokens)


@pytest.mark.parametrize(
    "option",
    [
        {"top_k": 2.5},
        {"top_k": True},
        {"top_p": "0.5"},
        {"temperature": "1"},
        {"temperature": None},
        {"temperature": float("nan")},
        {"temperature": 10**400},
        {"temperature": 1e39},
        {"seed": 1.5},
        {"seed": 2**70},
        {"seed": -1},
        {"ignore_eos": "no"},
        {"ignore_eos": None},
    ],
    ids=str,
)
def test_an_option_of_another_kind_is_refused_by_name(model, option):
    ((name, _),) = option.items()
    with pytest.raises(ValueError, match=f"^{name}=[^;]*, expected [^;]*$"):
        model.generate(IDS, **{"temperature": 1.0} | option)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"input_ids": [[1, 2], [3]]}, "input_ids has rows of different lengths, .* Pad them to one length"),
        ({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1]]}, "attention_mask has rows of different"),
    ],
    ids=["tokens", "mask"],
)
def test_rows_of_different_lengths_are_told_to_be_padded(model, given, told):
    for call in (model, model.prefill, model.generate):
        with pytest.raises(ValueError, match=told):
            call(**given)


def test_a_cache_that_is_none_is_refused(model):
    with pytest.raises(ValueError, match="cache is a NoneType, expected what prefill or the last step returned"):
        model.decode(FURTHER, None)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-sliding", "qwen3_5"])
def test_a_cache_says_what_all_tokens_at_once_do_or_the_mask_is_refused(package, name, tmp_path):
    """A masked token among a row's others: windows count it, and a delta net's convolution; a cache leaves it out."""
    model = package.load(make_checkpoint(name, tmp_path / "it"))
    mask = np.ones(IDS.shape, np.int64)
    mask[0, 2:4] = 0
    whole = np.asarray(model(IDS, mask))[:, -1]
    if name == "qwen3":
        np.testing.assert_allclose(np.asarray(model.prefill(IDS, mask)[0]), whole, rtol=1e-4, atol=1e-4)
        return
    told = "attention_mask masks 2 tokens among real ones, the first in row 0 at 2"
    for call in (model.prefill, model.generate, lambda ids, mask: model.with_taps(ids, mask, decode=1)):
        with pytest.raises(ValueError, match=told):
            call(IDS, mask)
    mask[0] = (0, 0, 1, 1, 1, 0)  # padding on both sides is none
    np.testing.assert_allclose(
        np.asarray(model.prefill(IDS, mask)[0])[0], np.asarray(model(IDS, mask))[0, 4], rtol=1e-3, atol=1e-3
    )


def test_numbers_of_numpy_are_those_numbers(model):
    plain = model.generate(IDS, None, 3, 0.8, top_k=5, top_p=0.9, seed=4, ignore_eos=True)
    of_numpy = {"top_k": np.int32(5), "top_p": np.float64(0.9), "seed": np.int64(4)}
    found = model.generate(IDS, None, np.int64(3), np.float64(0.8), **of_numpy, ignore_eos=True)
    assert np.array_equal(np.asarray(found), np.asarray(plain))


@pytest.mark.parametrize(
    "kind",
    [float, np.float32, Decimal, Fraction, jnp.float32, torch.tensor],
    ids=["float", "numpy", "decimal", "fraction", "jax", "torch"],
)
def test_numbers_of_any_library_are_those_numbers_with_a_draft_too(package, kind, tmp_path):
    model = package.load(make_drafting_checkpoint("qwen3_5", tmp_path / "it", **TWO_LAYERS), mtp=True)
    for draft in (None, model.draft):
        plain = model.generate(IDS, max_new_tokens=3, temperature=0.5, top_p=0.75, seed=4, draft=draft)
        found = model.generate(IDS, max_new_tokens=3, temperature=kind(0.5), top_p=kind(0.75), seed=4, draft=draft)
        assert np.array_equal(np.asarray(found), np.asarray(plain))


def test_the_best_token_always_stays(model):
    greedy = np.asarray(model.generate(IDS, max_new_tokens=3, ignore_eos=True))
    for top_p in (1e-3, 1e-46, 5e-324):
        found = model.generate(IDS, max_new_tokens=3, temperature=0.01, top_p=top_p, ignore_eos=True)
        assert np.array_equal(np.asarray(found), greedy)


def test_of_equal_tokens_torch_keeps_the_lowest():
    """As a draft's verification does, and JAX's top_k by its contract; torch's promises nothing of the kind."""
    for size in (8, 40, 211, 2000):
        logits = torch.zeros(1, size)
        logits[0, 5] = 1.0
        drawn = {int(sample(logits, torch.Generator().manual_seed(seed), 1.0, 1.0, 3)) for seed in range(60)}
        assert drawn == {0, 1, 5}


def test_a_draft_that_is_none_is_refused(package, tmp_path):
    model = package.load(make_drafting_checkpoint("qwen3_5", tmp_path / "it", **TWO_LAYERS), mtp=True)
    with pytest.raises(ValueError, match="draft='a draft' is no draft"):
        model.generate(IDS, draft="a draft")
    with pytest.raises(ValueError, match=r"draft_tokens=1\.5, expected an integer, at least 1"):
        model.generate(IDS, draft=model.draft, draft_tokens=1.5)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 3, "top_p": 0.9}], ids=str)
def test_nothing_is_said_of_logits_that_are_no_numbers(package, how, value, tmp_path):
    """Any token would do, and nobody who reads it would know."""
    model = package.load(make_drafting_checkpoint("qwen3_5", tmp_path / "it", **TWO_LAYERS), mtp=True)
    embed = np.array(np.asarray(model.get_embed_and_head()[0]))
    embed[IDS[1, -1], 3] = value
    model = model.set_embed_and_head(embed=embed)
    for draft in (None, model.draft):
        with pytest.raises(FloatingPointError, match=r"the model gives rows \[1\] logits that are NaN or infinite"):
            model.generate(IDS, draft=draft, **how)
    assert model.generate(IDS[:1], max_new_tokens=1, **how).shape == (1, 1)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}], ids=["best", "sampled"])
def test_a_draft_whose_logits_are_no_numbers_is_told_to_be_the_one(package, how, tmp_path):
    path = make_drafting_checkpoint("qwen3_5", tmp_path / "it", **TWO_LAYERS)
    tensors = load_file(path / "model.safetensors")
    tensors["mtp.norm.weight"][0] = np.nan
    save_file(tensors, path / "model.safetensors")
    model = package.load(path, mtp=True)
    with pytest.raises(FloatingPointError, match=r"the draft gives rows \[0, 1\] logits that are NaN"):
        model.generate(IDS, draft=model.draft, **how)
    assert model.generate(IDS, max_new_tokens=1, **how).shape == (2, 1)  # which does without


def test_every_bit_of_a_seed_counts(model):
    """Generators on a CPU look at 32 of them."""
    seeds = [7, 7, 7 + 2**32, 7 + 5 * 2**32, 2**63 - 1]
    first, again, *others = (
        np.asarray(model.generate(IDS, max_new_tokens=12, temperature=5.0, seed=seed, ignore_eos=True)).tolist()
        for seed in seeds
    )
    assert again == first
    assert len({str(found) for found in (first, *others)}) == 4


@pytest.mark.parametrize(("tokens", "room", "slots"), [(6, 4, 32), (130, 4, 384), (257, 1, 512)])
def test_a_prompt_is_padded_a_little_and_not_to_the_next_power_of_two(model, package, tokens, room, slots):
    ids = np.arange(2 * tokens).reshape(2, tokens) % 89
    _, cache = model.prefill(ids, max_new_tokens=room)
    torch_slots = {6: 16, 130: 256, 257: 384}  # which pads no prompt
    assert cache.capacity == (slots if package.__name__ == "jax_models" else torch_slots[tokens])


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "torch.bfloat16", torch.bfloat16, jnp.bfloat16, jnp.dtype("bfloat16"), ml_dtypes.bfloat16],
    ids=str,
)
def test_a_dtype_may_be_of_any_library(package, dtype, tmp_path):
    model = package.load(make_checkpoint("qwen3", tmp_path / "it", num_hidden_layers=1), dtype)
    assert str(model.dtype).removeprefix("torch.") == "bfloat16"


@pytest.mark.parametrize("value", [None, "x", ["a"]], ids=str)
def test_what_cannot_be_handed_in_is_refused_by_name(model, value):
    with pytest.raises(ValueError, match=r"cannot inject: model\.layers\.0"):
        model.with_taps(IDS, inject={"model.layers.0": value})


def test_what_is_handed_in_may_be_a_list(model):
    _, taps = model.with_taps(IDS)
    found = np.asarray(taps["model.layers.0"])
    out, _ = model.with_taps(IDS, inject={"model.layers.0": (2 * found).tolist()})
    expected, _ = model.with_taps(IDS, inject={"model.layers.0": 2 * found})
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))
    with pytest.raises(ValueError, match=r"inject is a list"):
        model.with_taps(IDS, inject=[found])
    with pytest.raises(ValueError, match=r"cannot inject: model\.layers\.0 is \(1, 1\)"):
        model.with_taps(IDS, inject={"model.layers.0": [[0.0]]})


@pytest.mark.parametrize("steps", [1.5, "2", True])
def test_steps_that_are_no_number_of_tokens_are_refused(model, steps):
    with pytest.raises(ValueError, match="decode="):
        model.with_taps(IDS, decode=steps)


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 2**40 + 7])
def test_a_filler_of_more_than_32_bits_is_refused(package, where, token, tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "it", num_hidden_layers=1)
    document = json.loads((path / where).read_text()) if where == "config.json" else {}
    (path / where).write_text(json.dumps(document | {"pad_token_id": token}))
    with pytest.raises(CheckpointError, match=f"{where}: pad_token_id is {token}, expected an integer of 32 bits"):
        package.load(path)
