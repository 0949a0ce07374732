"""What ``tandem plan`` refuses before anything is compiled, and what it hands the compiler."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
from pathlib import Path

import pytest

from parity.cli import main
from parity.commands.plan import DOES_NOT_FIT
from parity.planning.environment import compiler_environment, deep_stack
from parity.planning.meshes import parse_mesh
from parity.planning.subject import planned
from parity.zoo import make_checkpoint

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"


def test_a_checkpoint_may_be_named_by_any_address(tmp_path):
    directory = make_checkpoint("qwen3", tmp_path / "c")
    assert planned(f"direct://{directory}", None) == planned(str(directory), None)


@pytest.mark.parametrize("text", ["model=4", "tensor", "tensor=0", "tensor=2,tensor=2"])
def test_a_mesh_that_is_not_understood_is_refused(text):
    with pytest.raises(ValueError, match="not understood"):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--chip", "v9"], "expected one of v5e"),
        (["--topology", "3x3"], "no topology '3x3'"),
        (["--batch", "0", "--context", "0"], "--batch is 0, expected at least 1; --context is 0"),
        (["--context", str(10**20)], f"--context is {10**20}, expected at most"),
        (["--batch", str(10**20)], f"--batch is {10**20}, expected at most"),
        (["--context", "64", "--prompt", "65"], "at most the 64 slots"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(options, said, capsys):
    assert main(["plan", str(CONFIGS / "qwen3-8b.json"), *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        (["--context", str(2**24)], "Use another chip or a smaller --batch or --context\n"),
        (["--context", "905000"], "Use another chip or a smaller --batch or --context or --quant nvfp4\n"),
        (["--quant", "nvfp4", "--context", str(2**24)], "Use another chip or a smaller --batch or --context\n"),
    ],
)
def test_what_no_slice_holds_does_not_fit_and_it_says_what_would_make_it_smaller(options, ways, capsys, monkeypatch):
    monkeypatch.setattr("parity.planning.environment.check_installed", lambda: None)
    assert main(["plan", str(CONFIGS / "qwen3-8b.json"), *options]) == DOES_NOT_FIT
    told = capsys.readouterr().err
    assert "it does not fit on any slice of v5e: on 16x16" in told
    assert told.endswith(ways)


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", str(CONFIGS / "qwen3-8b.json"), "--topology", "2x2"]) == 5
    assert "pip install '.[jax,tpu-compiler]'" in capsys.readouterr().err


def test_the_compiler_may_use_all_the_stack_there_is_and_we_as_before():
    before = resource.getrlimit(resource.RLIMIT_STACK)
    with deep_stack():
        shown = subprocess.run(["sh", "-c", "ulimit -Ss; ulimit -Hs"], capture_output=True, text=True, check=True)
    soft, hard = shown.stdout.split()
    assert soft == hard
    assert resource.getrlimit(resource.RLIMIT_STACK) == before


def test_flags_that_are_given_reach_libtpu_beside_ours():
    ours = compiler_environment({})["LIBTPU_INIT_ARGS"]
    both = compiler_environment({"LIBTPU_INIT_ARGS": "--theirs=1", "HOME": "/home"})
    assert both["LIBTPU_INIT_ARGS"].split() == [*ours.split(), "--theirs=1"]
    assert both["HOME"] == "/home"


def test_published_configs_are_json_that_loads():
    assert sorted(path.stem for path in CONFIGS.glob("*.json"))
    for path in CONFIGS.glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_json_that_could_not_be_written_is_refused_before_anything_is_compiled(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "none" / "plan.json")
    for name, why in {
        ".": "is a directory, expected a file",
        "none/plan.json": f"there is no directory {tmp_path / 'none'}; make it first",
        "link": f"there is no directory {tmp_path / 'none'}; make it first",
        "file/plan.json": f"there is no directory {tmp_path / 'file'}; make it first",
    }.items():
        path = tmp_path / name
        assert main(["plan", str(CONFIGS / "qwen3-8b.json"), "--json", str(path)]) == 2
        error = capsys.readouterr().err
        assert f"--json: {path}" in error
        assert why in error


@pytest.fixture
def nobody():
    """Without the privileges of root, which may write anywhere."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    yield
    os.seteuid(was)


@pytest.mark.parametrize("name", ["plan.json", "new.json"])
def test_so_is_json_that_may_not_be_written(name, nobody, monkeypatch, capsys):
    monkeypatch.setattr("parity.planning.plan._compiled", lambda *_: pytest.fail("compiled"))
    with tempfile.TemporaryDirectory() as directory:  # pytest's are for their owner alone
        where = Path(directory)
        (where / "plan.json").touch(mode=0o444)
        where.chmod(0o555)
        assert main(["plan", str(CONFIGS / "qwen3-8b.json"), "--json", str(where / name)]) == 2
        assert f"--json: {where / name} may not be written" in capsys.readouterr().err
        where.chmod(0o755)


def test_json_that_can_be_written_is_left_alone_until_it_is(tmp_path, capsys):
    old = tmp_path / "plan.json"
    old.write_text("old", encoding="utf-8")
    for path in (old, tmp_path / "new.json", Path("/dev/null")):
        assert main(["plan", str(CONFIGS / "qwen3-8b.json"), "--batch", "0", "--json", str(path)]) == 2
        assert "--json" not in capsys.readouterr().err
    assert old.read_text(encoding="utf-8") == "old"
    assert not (tmp_path / "new.json").exists()
