"""Regular expressions of files: what is tried ends in time, and what is usual is allowed."""

from __future__ import annotations

import re
import time

import pytest

from loaders.regexes import regex_problem

NAME = "model.language_model.layers.17.mlp.experts.103.down_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        r".*layers\.(0|1|[2-9]\d*)\..*",
        r"model\.layers\.\d+\.mlp\..*",
        r"^(?!.*lm_head).*$",
        r".*(q|k|v)_proj$",
        r"([^.]+\.)*mlp\..*",
        r"(?:\w+[.])+down_proj",
        r"([a-z0-9]+_)*proj",
        r"(?:a{0,5}b){0,3}",
        r".*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?",
        r"(?i)MODEL\..*",
        # as Unsloth writes target_modules of models that see
        r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj|qkv|proj|linear_fc1|linear_fc2).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
        r"^(?=.*layers)(?!.*(lm_head|output|emb)).*\.(self_attn|mlp)\..*(q_proj|k_proj)$",
        "|".join(rf"model\.layers\.{layer}\.mlp" for layer in range(200)),
        "a" * 20_000 + ".*",
    ],
)
def test_what_exporters_write_is_fine_and_quick(pattern):
    started = time.perf_counter()
    assert regex_problem(pattern) is None
    re.match(pattern, NAME + "!")
    assert time.perf_counter() - started < 5  # the others would take years


@pytest.mark.parametrize(
    "pattern",
    ["([a-z_.0-9]+)+!", "(a|aa)*b", "(?=(a+)+)b", "(a*)*?c", r"(?:[\w.]+\.)*z", r"(\w+\.?)*mlp", "((ab)+c?)*"]
    + ["(?:.{1,2})*!", "(?:.{1,2})+!", "(?:.?.?)*!", "(?:.{1,2}){0,60}!", r"(?:\w.?)*!"],
)
def test_what_might_never_end_is_refused(pattern):
    assert (
        regex_problem(pattern) == "it repeats without end what itself repeats, or is a choice, and might never be done"
    )


@pytest.mark.parametrize(
    "pattern",
    [
        ".*" * 12 + "x",
        ".*?" * 12 + "x!",
        ".*.*.*.*.*.*!",
        "(.{0,16}){16}!",
        "((.{0,4}){0,4}){0,16}!",
        "(a|.){0,16}(.|b){0,16}(c|.){16}!",
        "(?:.?){0,16}(?:.?){0,16}(?:.?){0,16}!",
        "(?:.*){2,16}!",
        "(?=.*.*.*.*.*.*!)",
        "(?i:.*.*.*)(?P<x>.*.*.*)!",
    ],
)
def test_what_might_take_hours_is_refused(pattern):
    assert "too many repetitions or choices one after the other" in regex_problem(pattern)


@pytest.mark.parametrize("pattern", [".*.*.*.*!", "(?:.*){4}!", "(?:.?){0,16}!", ".*a.*b.*c.*d.*", r"(\w+\.){0,16}x"])
def test_what_is_taken_is_done_soon(pattern):
    assert regex_problem(pattern) is None
    started = time.perf_counter()
    re.fullmatch(pattern, NAME)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("pattern", ["(", "*", "a{5,2}", "(?P<1>a)", "(" * 5000])
def test_what_is_no_expression_is_said_to_be_none(pattern):
    assert regex_problem(pattern).startswith("it is no regular expression: ")
