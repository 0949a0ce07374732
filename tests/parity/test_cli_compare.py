import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from synthetic_traces import add_error, trio

from parity.cli import VERBS, main
from parity.trace import Trace

FORBIDDEN = ("jax", "jaxlib", "torch", "ml_dtypes", "loaders", "flax", "pandas", "scipy")


@pytest.fixture
def traces(tmp_path):
    a, b, oracle = trio()
    return [str(trace.save(tmp_path / f"{name}.trace")) for name, trace in (("a", a), ("b", b), ("oracle", oracle))]


def in_a_process(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_comparing_two_traces_that_agree_prints_pass_and_returns_zero(traces, capsys):
    a, b, oracle = traces
    assert main(["compare", a, b, "--oracle", oracle]) == 0
    assert capsys.readouterr().out.startswith("PASS: jax and torch agree to within rounding")


def test_traces_that_differ_return_one_and_the_answer_is_the_first_line(traces, tmp_path, capsys):
    a, _, oracle = trio()
    add_error(a, oracle, from_layer=3, times=10)
    wrong = str(a.save(tmp_path / "wrong.trace"))
    assert main(["compare", wrong, traces[1], "--oracle", traces[2], "--quiet"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL: jax is wrong in model.layers.2. ")


def test_traces_of_other_inputs_return_three(traces, tmp_path):
    _, b, _ = trio()
    b.meta["input_hash"] = "0" * 64
    assert main(["compare", traces[0], str(b.save(tmp_path / "other.trace"))]) == 3


def test_flips_that_leave_too_little_return_four(tmp_path):
    a, b, oracle = trio(sparse=(1,))
    b.tensors["routing.1"] = b.tensors["routing.1"].copy()
    b.tensors["routing.1"][:, 0] = [[6, 7]]
    oracle.tensors["routing.1"][:, 0] = a.tensors["routing.1"][:, 0] = [[0, 1]]
    paths = [str(t.save(tmp_path / f"{i}.trace")) for i, t in enumerate((a, b, oracle))]
    assert main(["compare", paths[0], paths[1], "--oracle", paths[2]]) == 4
    replayed = [
        Trace(t.tensors, t.meta | {"dtype": "float64"}).save(tmp_path / f"oracle of {i}") for i, t in ((0, a), (1, b))
    ]
    assert main(["compare", *paths[:2], "--oracle", str(replayed[0]), "--oracle-b", str(replayed[1])]) == 0


@pytest.mark.parametrize("content", [None, b"", b"no trace"])
def test_a_missing_or_broken_trace_returns_two_with_a_message_and_no_traceback(content, traces, tmp_path, capsys):
    bad = tmp_path / "bad.trace"
    if content is not None:
        bad.write_bytes(content)
    assert main(["compare", traces[0], str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tandem compare: ")
    assert "bad.trace" in error


@pytest.mark.parametrize("arguments", [[], ["compare"], ["compare", "x"], ["unknown"], ["compare", "x", "y", "--what"]])
def test_wrong_usage_returns_two(arguments, capsys):
    assert main(arguments) == 2


def test_help_returns_zero_and_names_every_verb_and_exit_code(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text and line in " ".join(text.split()) for verb, _, line in VERBS)
    assert "3 not comparable" in " ".join(text.split())
    assert main(["compare", "--help"]) == 0
    assert "--oracle" in capsys.readouterr().out


def test_every_listed_verb_has_a_module_with_both_functions():
    from importlib import import_module

    for _, module, _ in VERBS:
        command = import_module(module)
        assert callable(command.add_arguments)
        assert callable(command.run)


def test_all_four_files_are_written_and_can_be_read(traces, tmp_path):
    a, b, oracle = traces
    files = {kind: tmp_path / f"out.{kind}" for kind in ("html", "junit", "json", "md")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert main(["compare", a, b, "--oracle", oracle, *options]) == 0
    assert files["html"].read_text().startswith("<!doctype html>")
    assert ElementTree.parse(files["junit"]).getroot().tag == "testsuites"
    assert json.loads(files["json"].read_text())["verdict"] == "PASS"
    assert "PASS" in files["md"].read_text()


def test_a_report_of_a_path_that_is_no_text_is_written(traces, tmp_path):
    """It was opened, and so emptied, before it turned out that its name has no UTF-8."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/sch\xf6n.trace")
    os.rename(traces[0], path)
    options = {f"--{kind}": str(tmp_path / f"report.{kind}") for kind in ("html", "md", "json", "junit")}
    assert main(["compare", path, traces[1], *sum(options.items(), ())]) == 0
    for report in options.values():
        assert "trace" in Path(report).read_text(encoding="utf-8")


def test_neither_framework_nor_the_loaders_are_imported_by_a_whole_comparison(traces, tmp_path):
    code = "import sys; from parity.cli import main; code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    a, b, oracle = traces
    outputs = [f"--{kind}={tmp_path / kind}" for kind in ("html", "junit", "json", "md")]
    modules = in_a_process(code, "compare", a, b, "--oracle", oracle, *outputs).splitlines()[-1].split()
    assert "parity.report.page" in modules
    assert not set(FORBIDDEN) & {name.partition(".")[0] for name in modules}


def test_help_imports_neither_numpy_nor_any_verb():
    code = "import sys; from parity.cli import main; main(['--help']); print(*sys.modules)"
    modules = in_a_process(code).splitlines()[-1].split()
    assert not {"numpy", "safetensors", "parity.compare", "parity.commands.compare"} & set(modules)
