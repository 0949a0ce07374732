"""The checker itself, on functions that tell the truth and functions that lie."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from shape_suffixes import checked_shape_suffixes, lies, suffix_of

from loaders import open_checkpoint
from parity.zoo import ZOO, make_checkpoint

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("jax_models", "torch_models") for path in ROOT.glob(f"{package}/**/*.py"))


def rms_that_tells_the_truth(x_BTD):
    rms_BT1 = (x_BTD**2).mean(-1)[:, :, None] ** 0.5
    return x_BTD / rms_BT1


def rms_of_a_rank_it_has_not(x_BTD):
    rms_BT = (x_BTD**2).mean(-1)[:, :, None] ** 0.5
    return x_BTD / rms_BT


def width_that_changes(x_BTD):
    half_BTD = x_BTD[:, :, ::2]
    return half_BTD + 1


def one_that_is_two(x_BTD):
    first_BT1 = x_BTD[:, :, :2]
    return first_BT1 + 1


def fails_after_lying(x_BTD):
    width_that_changes(x_BTD)
    return 1 // 0


@pytest.fixture(params=["jax", "jax under jit", "torch"])
def run(request):
    """Call a function with ones of a shape, in a framework."""
    name = request.param.split()[0]
    framework = importlib.import_module(name)
    ones = importlib.import_module("jax.numpy").ones if name == "jax" else framework.ones
    wrap = framework.jit if "jit" in request.param else lambda function: function
    return lambda function, shape: wrap(function)(ones(shape))


def test_suffixes_that_tell_the_truth_pass(run):
    with checked_shape_suffixes(__name__):
        run(rms_that_tells_the_truth, (2, 5, 8))


@pytest.mark.parametrize(
    ("liar", "complaint"),
    [
        (rms_of_a_rank_it_has_not, "rms_BT has shape (2, 5, 1), expected 2 axes"),
        (width_that_changes, "half_BTD has shape (2, 5, 4), expected D=8 as in x_BTD"),
        (one_that_is_two, "first_BT1 has shape (2, 5, 2), expected 1=1 as in its name"),
    ],
)
def test_a_suffix_that_lies_is_named_with_its_function_and_its_shape(run, liar, complaint):
    with pytest.raises(AssertionError) as raised, checked_shape_suffixes(__name__):
        run(liar, (2, 5, 8))
    assert str(raised.value) == f"{__name__}.{liar.__name__}: {complaint}"


def test_only_the_named_packages_are_looked_at():
    with checked_shape_suffixes("test_shape", "elsewhere"):
        width_that_changes(np.ones((2, 5, 8)))


def test_an_error_inside_the_block_is_not_replaced_by_the_lies_before_it():
    with pytest.raises(ZeroDivisionError), checked_shape_suffixes(__name__):
        fails_after_lying(np.ones((2, 5, 8)))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("x_BTD", "BTD"), ("rms_BT1", "BT1"), ("weight_D", "D"), ("gate_up_E2MD", "E2MD")]
    + [(name, None) for name in ("x", "x32", "x_1", "_B", "num_layers", "from_JSON", "BYTES_B", "x_")],
)
def test_a_suffix_is_the_last_part_if_it_is_all_letters_of_the_glossary(name, suffix):
    assert suffix_of(name) == suffix


def test_what_is_no_array_has_no_shape_to_lie_about():
    assert lies({"x_BT": None, "y_BTD": (1, 2), "z_D": "text"}) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_letter_the_models_use_is_in_the_glossary(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name | ast.arg):
            names.add(node.id if isinstance(node, ast.Name) else node.arg)
    looks_like_one = [name for name in names if name.rpartition("_")[2].isupper() and not name.isupper()]
    unknown = sorted(name for name in looks_like_one if "_" in name and suffix_of(name) is None)
    assert unknown == []


@pytest.mark.parametrize(
    "package",
    [
        "jax_models",
        "torch_models",
    ],
)
def test_the_models_tell_the_truth_in_forward_and_generate(package, tmp_path):
    models = importlib.import_module(package)
    # a sparse layer and a dense one, and a vocabulary whose programs no other test has traced
    checkpoint = make_checkpoint("qwen3-moe", tmp_path / "checkpoint", num_hidden_layers=2, vocab_size=109)
    model = models.load(checkpoint)
    ids_BT = np.arange(33).reshape(3, 11)
    mask_BT = np.arange(11) < np.array([[11], [7], [4]])
    with checked_shape_suffixes("jax_models", "torch_models") as seen:
        model(ids_BT, mask_BT)
        model.generate(ids_BT, mask_BT, max_new_tokens=2, temperature=0.7, top_k=5, top_p=0.9)
    method = "__call__" if package == "jax_models" else "forward"
    expected = {"generate.sample", f"layers.attention.Attention.{method}", f"layers.mlp.MLP.{method}"}
    expected |= {f"layers.moe.Experts.{method}", f"layers.decoder.Decoder.{method}"}
    assert {f"{package}.{name}" for name in expected} <= seen


@pytest.mark.parametrize("name", ZOO)
def test_every_axis_of_a_parameter_is_in_the_glossary(name, tmp_path):
    known = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")))
    assert open_checkpoint(make_checkpoint(name, tmp_path / "it")).config.dims().keys() <= known
