"""The pytest plugin, as somebody else's tests have it: each case is a small suite of its own, run from outside."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import jax  # noqa: F401  (a session inside this one forgets what it imported, and no framework can be imported twice)
import pytest
import torch

import parity.compare
import parity.plugin.fixtures
import parity.plugin.report
import parity.report.page  # noqa: F401
from parity.plugin.names import file_name
from parity.plugin.needs import lacking

pytest_plugins = "pytester"
ROOT = Path(__file__).parents[2]

CHECKED = ("-p", "parity.pytest_plugin", "-p", "no:benchmark", "--strict-markers", "--strict-config", "-W", "error")
# two synthetic backends: one is off by so much from decoder layer 2 on
BACKENDS = """
import numpy as np
from parity import BackendInfo

IDS = np.arange(12).reshape(2, 6)
INPUTS = {"input_ids": IDS}

class Made:
    def __init__(self, name, off=0.0, seed=0, weights=None):
        self.info = BackendInfo(name=name, dtype="float32")
        self.off, self.seed, self.held = off, seed, weights

    def run(self, inputs):
        rng = np.random.default_rng(self.seed)
        found = {name: rng.standard_normal((2, 6, 8)) for name in NAMES}
        noise = np.random.default_rng(list(self.info.name.encode()))
        late = NAMES.index("hidden_states.2")
        return {
            name: (x + noise.standard_normal(x.shape) * (1e-7 + self.off * (i >= late))).astype(np.float32)
            for i, (name, x) in enumerate(found.items())
        }

    def weights(self):
        return self.held

NAMES = [*(f"hidden_states.{i}" for i in range(4)), "final_hidden_state", "logits"]
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """``run(source, *options)``: outcome of a suite of one file beside the two synthetic backends."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(made=BACKENDS)

    def run(source, *options, fresh=False):
        pytester.makepyfile(test_it="from made import *\nimport pytest\nfrom parity import assert_parity\n" + source)
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a second sooner
        how = pytester.runpytest_subprocess if fresh else pytester.runpytest_inprocess
        return how(*CHECKED, *options)

    return run


DIFFERS = """
def test_differs():
    assert_parity(Made("ours", off=0.1), Made("peer"), inputs=INPUTS)
"""


def test_a_failed_assertion_is_about_ten_lines_that_say_where_how_much_and_how_to_see_it_again(suite, pytester):
    done = suite(DIFFERS)
    done.assert_outcomes(failed=1)
    told = [line[2:].strip() for line in done.outlines if line.startswith("E ")]
    assert len(told) <= 12
    text = "\n".join(told).removeprefix("AssertionError: ")
    assert text.startswith("parity FAIL (bug): ")
    assert re.search(r"^first +model\.layers\.1, row \d, position \d", text, re.MULTILINE)
    assert re.search(r"^error .* local, .* inherited, so local", text, re.MULTILINE)
    bars = re.search(r"^layers +(\S+)  share of the limit used, model.embed_tokens ... lm_head", text, re.MULTILINE)[1]
    assert [bar in "▁▂▃▄" for bar in bars] == [True, True, False, False, False, False]
    command = re.search(r"^reproduce +tandem (compare .*)$", text, re.MULTILINE)[1]
    assert "def assert_parity" not in done.stdout.str()  # whose code is not the reader's

    from parity.cli import main

    assert main(command.split()) == 1


def test_agreement_passes_and_its_margin_is_a_property_of_junit(suite, pytester):
    source = """
def test_agrees():
    assert assert_parity(Made("ours"), Made("peer"), inputs=INPUTS, title="two of a kind").verdict == "PASS"

def test_measures(ruler):
    assert ruler(Made("ours", off=0.1), Made("peer"), inputs=INPUTS).cause == "bug"
    assert ruler.limits("float32").k == 4
"""
    suite(source, "--junitxml", "junit.xml").assert_outcomes(passed=2)
    cases = ElementTree.parse(pytester.path / "junit.xml").getroot().findall(".//testcase")
    properties = {case.get("name"): {p.get("name"): p.get("value") for p in case.iter("property")} for case in cases}
    assert properties["test_agrees"]["parity.two of a kind.verdict"] == "PASS"
    assert 0.5 < float(properties["test_agrees"]["parity.two of a kind.margin"]) < 1
    assert properties["test_measures"]["parity.ours against peer.verdict"] == "FAIL"
    assert float(properties["test_measures"]["parity.ours against peer.margin"]) < -1000


GOLDEN = """
def test_kept(golden):
    golden(Made("ours"{}), inputs={})
"""


def test_a_golden_is_missing_then_written_then_held(suite, pytester):
    source = GOLDEN.format("", "INPUTS")
    done = suite(source)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*there is no golden at *goldens/test_it/test_kept.trace*", "*--parity-update*"])

    done = suite(source, "--parity-update")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["parity: wrote golden *goldens/test_it/test_kept.trace"])
    suite(source).assert_outcomes(passed=1)

    done = suite(GOLDEN.format(", off=0.1", "INPUTS"))
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*parity FAIL (bug)*", "*test_kept.trace differs. If the change is meant: pytest *"])


@pytest.mark.parametrize(
    ("backend", "inputs", "why"),
    [
        ("", "{'input_ids': IDS + 1}", "input hash differs"),
        (", weights=[('w', IDS + 1)]", "INPUTS", "weights root differs"),
    ],
)
def test_a_golden_of_other_inputs_or_weights_proves_nothing_and_says_so(suite, backend, inputs, why):
    suite(GOLDEN.format(", weights=[('w', IDS)]", "INPUTS"), "--parity-update").assert_outcomes(passed=1)
    done = suite(GOLDEN.format(backend or ", weights=[('w', IDS)]", inputs))
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines([f"*parity INVALID*{why}*", "*is of other inputs, weights or arithmetic*"])


GOLDENS_OF_ONE_NAME = """
class TestA:
    def test_same(self, golden): golden(Made("jax"), inputs=INPUTS)

class TestB:
    def test_same(self, golden): golden(Made("torch", seed=1), inputs=INPUTS)

@pytest.mark.parametrize("case", ["x/y", "x-y", "x" * 220])
def test_case(case, golden): golden(Made("jax", seed=len(case) + (case == "x/y")), inputs=INPUTS)
"""


def test_goldens_of_tests_with_like_names_are_several(suite, pytester):
    suite(GOLDENS_OF_ONE_NAME, "--parity-update").assert_outcomes(passed=5)
    assert len([*pytester.path.glob("goldens/test_it/*.trace")]) == 5
    assert (pytester.path / "goldens/test_it/TestA.test_same.trace").exists()
    suite(GOLDENS_OF_ONE_NAME).assert_outcomes(passed=5)


NAMED_GOLDENS = """
@pytest.mark.parametrize("case", ["a b", "\\xe4"])
def test_named(case, golden):
    golden(Made("jax", seed=ord(case[0])), "prefill", inputs=INPUTS)
    golden(Made("jax"), "decode", inputs=INPUTS)
"""


def test_a_name_is_of_a_tests_own_golden_and_the_command_that_writes_it_does(suite, pytester):
    done = suite(NAMED_GOLDENS)
    done.assert_outcomes(failed=2)
    commands = [line[1:].strip() for line in done.outlines if re.match("E .* --parity-update$", line)]
    assert len(commands) == 2
    for number, command in enumerate(commands, 1):
        program, *arguments = shlex.split(command)
        assert program == "pytest"
        pytester.runpytest_subprocess(*arguments).assert_outcomes(passed=1)
        assert len([*pytester.path.glob("goldens/test_it/*.trace")]) == 2 * number
    suite(NAMED_GOLDENS).assert_outcomes(passed=2)
    assert file_name("test_it@prefill") == "test_it@prefill"


def test_files_of_two_tests_have_two_names_that_a_file_system_takes():
    tests = ["A::b", "A::b[c]", "A[b]", "a_b", "A[b-]", "A[b.c]", "A[b/c]", "A[b::c]", "A[b-c]", "A[b c]", "A[]"]
    tests += ["A[b]@c", "A@b", "A@[b]", "A[b]@" + "c" * 300, "A@b@c", "A@b::c"]
    tests += ["A[ä]", "A[" + "ä" * 300 + "]", "A[" + "b" * 300 + "]", "A[" + "b" * 299 + "c]", "B::A::b"]
    names = [file_name(test) for test in tests]
    assert len({*names}) == len(tests)
    assert all(len(f"{name}.trace".encode()) < 255 and "/" not in name for name in names)
    assert file_name("qwen3-moe") == "qwen3-moe"  # somebody's own


def test_a_test_that_writes_one_golden_twice_is_told_to_name_them(suite):
    twice = """
def test_two(golden):
    golden(Made("jax"), inputs=INPUTS)
    golden(Made("torch", seed=1), inputs=INPUTS)
"""
    done = suite(twice, "--parity-update")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*this test has already written *test_two.trace: give each of its goldens a name"])


def test_a_long_test_id_hides_no_failure(suite):
    done = suite(DIFFERS.replace("def test_differs", f"def test_{'differs' * 40}"))
    done.assert_outcomes(failed=1)
    assert "File name too long" not in done.stdout.str()
    done.stdout.fnmatch_lines(["*tandem compare *"])


def test_a_report_that_cannot_be_written_is_told_and_no_internal_error(suite, pytester):
    assert suite(DIFFERS, "--parity-html", str(pytester.path)).ret == pytest.ExitCode.USAGE_ERROR
    (pytester.path / "file").write_text("")
    done = suite("def test_it(): pass", "--parity-html", "file/report.html")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stdout.fnmatch_lines(["parity: no report could be written: *"])


def test_an_attempt_that_was_run_again_is_not_in_the_report(suite, pytester):
    """As pytest-rerunfailures does: the report of what failed goes out as a rerun, and the test begins anew."""
    pytester.makeconftest("""
import pytest
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    for attempt in range(2):
        for report in runtestprotocol(item, nextitem=nextitem, log=False):
            if report.failed and not attempt:
                report.outcome = "rerun"
            item.ihook.pytest_runtest_logreport(report=report)
            if report.outcome == "rerun":
                break
        else:
            break
    return True

def pytest_report_teststatus(report):
    if report.outcome == "rerun":
        return "rerun", "R", "RERUN"
""")
    flaky = """
ATTEMPTS = []

def test_it():
    ATTEMPTS.append(1)
    assert_parity(Made("jax"), Made("torch", off=len(ATTEMPTS) == 1), inputs=INPUTS)
"""
    suite(flaky, "--parity-html", "report.html")
    page = (pytester.path / "report.html").read_text()
    assert "<details" in page
    assert not re.search(r"\bFAIL\b|tandem compare", page)


EXPECTED = """
@pytest.mark.xfail(strict=True)
def test_known():
    assert_parity(Made("jax"), Made("torch", off=0.1), inputs=INPUTS)

def test_caught():
    for seed in range(2):
        with pytest.raises(AssertionError) as caught:
            assert_parity(Made("jax", seed=seed), Made("torch", seed=seed, off=0.1), inputs=INPUTS)
        print(str(caught.value))
"""


def test_what_a_test_expects_to_fail_is_no_failure_of_the_report(suite, pytester):
    suite(EXPECTED, "--parity-html", "report.html").assert_outcomes(passed=1, xfailed=1)
    page = (pytester.path / "report.html").read_text()
    banner = page[page.index('<div class="banner') :].partition("</div></div>")[0]
    assert "fail" not in banner.lower()
    assert "wrong" not in banner


def test_traces_of_each_of_several_failures_of_a_test_are_kept(suite):
    done = suite(EXPECTED, "-rP")
    kept = re.findall(r"tandem compare (\S+)", done.stdout.str())
    assert len(kept) == len(set(kept)) == 2


def test_a_golden_that_is_no_trace_says_what_to_do(suite, pytester):
    path = pytester.mkdir("goldens") / "test_it"
    path.mkdir()
    (path / "test_kept.trace").write_text("<<<<<<< HEAD")
    suite(GOLDEN.format("", "INPUTS")).stdout.fnmatch_lines(
        ["*not a safetensors file*", "*Have it written anew: pytest *--parity-update*"]
    )


def test_one_report_gathers_what_two_workers_compared(suite, pytester):
    source = (
        DIFFERS
        + """
@pytest.mark.parametrize("seed", range(3))
def test_agrees(seed):
    assert_parity(Made("ours", seed=seed), Made("peer", seed=seed), inputs=INPUTS)

def test_only_measured(ruler):
    ruler(Made("ours", off=0.1), Made("peer"), inputs=INPUTS)
"""
    )
    done = suite(source, "-p", "xdist.plugin", "-n", "2", "--parity-html", "out/report.html", fresh=True)
    done.assert_outcomes(passed=4, failed=1)
    done.stdout.fnmatch_lines(["parity: report in out/report.html"])
    page = (pytester.path / "out/report.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    asserted = [
        f"test_it.py::test_{name}: ours against peer" for name in ("agrees[0]", "agrees[1]", "agrees[2]", "differs")
    ]
    measured = "test_it.py::test_only_measured: ours against peer (measured, not asserted)"
    assert [title for title in titles if "::" in title] == [*asserted, measured]
    assert ">ours and peer differ in model.layers.1, and whose fault it is is unknown without an oracle<" in page
    assert "Comparisons: 3 of 4 pass." in page
    assert "rows of 6 positions" in page
    assert "float32" in page
    index, _, sections = page.partition("<section")
    links = re.findall(r'<a href="#([^"]*)">(.*?)</a>', index)
    assert sorted(title for _, title in links) == sorted([*asserted, measured])
    assert links[0][1].startswith("test_it.py::test_differs")  # what does not pass comes first
    assert [link for link, _ in links if f'id="{link}"' not in page] == []
    alone = re.search(r"<code>(pytest [^<]*)</code>", index)[1]  # above everything, since there is one finding
    assert alone.endswith(" -p xdist.plugin -n 2 test_it.py::test_differs")  # with the options, but no report
    assert "--parity-html" not in alone
    assert page.count("<code>tandem compare ") == 1  # the traces that were kept
    assert not re.findall(r"<(?:script|link|img)|src=|@import", page)  # self-contained


def test_a_report_without_comparisons_is_written_too(suite, pytester):
    suite("def test_nothing(): pass", "--parity-html", "report.html").assert_outcomes(passed=1)
    assert "Nothing could be run" in (pytester.path / "report.html").read_text()


def test_what_a_test_needs_and_lacks_is_why_it_is_skipped(suite):
    source = """
@pytest.mark.needs("tpu", count=9)
def test_tpu(): raise AssertionError

@pytest.mark.needs("torch")
def test_torch(): pass

@pytest.mark.needs("cude")
def test_typo(): pass

@pytest.mark.needs("jax", sm=90)
def test_sm(): pass

@pytest.mark.needs("cuda", 90)
def test_positional(): pass
"""
    done = suite(source, "-rs")
    done.assert_outcomes(passed=1, skipped=1, errors=3)
    done.stdout.fnmatch_lines(["*needs 9 TPU devices, jax * sees *"])
    done.stdout.fnmatch_lines(["*needs('cude'): expected one of cuda, tpu, jax, torch, transformers*"])


def test_a_cuda_device_is_asked_for_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (8, 0)].__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", ["H100", "A100"].__getitem__)
    assert lacking("cuda") is lacking("cuda", sm=90) is lacking("cuda", sm=80, count=2) is None
    assert lacking("cuda", sm=100) == "needs a CUDA device of sm_100 or later: H100 is sm_90, A100 is sm_80"
    assert "2 CUDA devices of sm_90" in lacking("cuda", sm=90, count=2)
    assert "needs 3 CUDA devices, torch" in lacking("cuda", count=3)


def test_markers_register_themselves_and_a_typo_in_parity_is_told(suite):
    source = """
@pytest.mark.parity(models="qwen3")
def test_typo(backend_pair): pass

@pytest.mark.parity(dtype="float23")
def test_dtype(oracle): pass

@pytest.mark.parity(b="torch:cude:1")
def test_device(oracle): pass

@pytest.mark.parity(model="qwen33")
def test_model(oracle): pass
"""
    done = suite(source)
    done.assert_outcomes(errors=4)
    done.stdout.fnmatch_lines(["*'cude' is no kind of device, expected cpu, cuda, *"])
    done.stdout.fnmatch_lines(["*unexpected keyword argument 'models'*", "*float23*expected one of float32*"])
    done.stdout.fnmatch_lines(["*the zoo has no 'qwen33', expected one of qwen3, *"])


REAL = """
@pytest.mark.parity(model="qwen3", a="torch", b="torch")
def test_pair(backend_pair, oracle, tiny_model):
    comparison = assert_parity(*backend_pair, oracle)
    assert comparison.labels == ("torch (a)", "torch (b)")
    assert backend_pair.checkpoint == tiny_model("qwen3", seed=0, dtype="F32")  # made once

@pytest.mark.parity(model="qwen3", a="torch:cuda:99", b="torch")
def test_no_device(backend_pair): raise AssertionError
"""


def test_backends_and_oracle_are_of_the_marked_model(suite):
    done = suite(REAL, "-rs", fresh=True)  # transformers warns of much
    done.assert_outcomes(passed=1, skipped=1)
    done.stdout.fnmatch_lines(["*SKIPPED*torch has no device 'cuda:99'*"])


def test_collecting_imports_no_framework(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others may import what they like
    pytester.makepyfile(
        test_it="""
import pytest

@pytest.mark.parity(model="qwen3")
@pytest.mark.needs("transformers")
def test_nothing_is_imported(): pass
""",
        conftest="""
import json, sys
def pytest_unconfigure():
    heavy = ("jax", "jaxlib", "torch", "transformers", "numpy", "ml_dtypes", "safetensors", "flax")
    print("HEAVY", json.dumps([name for name in heavy if name in sys.modules]))
""",
    )
    for options in ([], ["--collect-only"]):
        done = pytester.runpytest_subprocess(*CHECKED, "-s", *options)
        assert done.ret == 0
        assert json.loads(next(line for line in done.outlines if "HEAVY" in line).split("HEAVY")[1]) == []


def test_the_plugin_is_loaded_once_however_often_it_is_named(pytester):
    """``-p`` beside an installed entry point, which is called the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"parity.pytest_plugin": "parity.pytest_plugin"}
    pytester.makepyfile("def test_it(): pass")
    pytester.runpytest_inprocess(*CHECKED, *CHECKED).assert_outcomes(passed=1)


def test_the_plugin_gets_on_with_the_conftest_of_this_project(pytester):
    done = pytester.runpytest_subprocess(
        "-p",
        "parity.pytest_plugin",
        "-q",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/parity/test_ruler.py"),
    )
    assert done.ret == 0, done.stdout.str()
