"""What the command writes to, and the exit codes of what goes wrong there or was never foreseen."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

from parity import backends
from parity.cli import main
from parity.trace import Trace
from parity.zoo import make_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("outputs") / "it", num_hidden_layers=1)


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A directory of its own, with a checkpoint at ``it``, whose weights are elsewhere as in a cache of the hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path / "it")
    (tmp_path / "it" / "vocab.txt").touch()
    (tmp_path / "it" / "linked").symlink_to(tmp_path / "blob")
    (tmp_path / "lr=3").symlink_to(tmp_path)
    return tmp_path


RECORD = ["record", "it", "--backend", "torch", "-o"]


def test_a_pipe_is_written_to_and_stays_one(here):
    os.mkfifo(here / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((here / "pipe").read_bytes()), daemon=True)
    reader.start()
    assert main([*RECORD, "pipe"]) == 0
    reader.join(20)
    assert (here / "pipe").is_fifo()
    (here / "file").write_bytes(found[0])
    assert Trace.load(here / "file").backend == "torch"


def test_a_link_is_followed_and_nobodys_file_is_lost(here):
    (here / "target").touch()
    (here / "link").symlink_to("target")
    (here / "link.partial").write_text("mine")
    assert main([*RECORD, "link"]) == 0
    assert (here / "link").is_symlink()
    assert Trace.load(here / "target").backend == "torch"
    assert (here / "target").stat().st_mode == (here / "link.partial").stat().st_mode
    assert (here / "link.partial").read_text() == "mine"
    assert {path.name for path in here.iterdir()} == {"it", "lr=3", "link", "link.partial", "target"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*RECORD, "it/model.safetensors"], "it/model.safetensors is a file of it, which is read"),
        (["record", "direct://it", "--backend", "torch", "-o", "it/config.json"], "is a file of direct://it"),
        (["weights", "jax:it", "it", "--json", "it/vocab.txt"], "is a file of"),
        ([*RECORD, "blob"], "blob is a file of it"),
        (["record", "lr=3/it", "--backend", "torch", "-o", "lr=3/it/config.json"], "is a file of lr=3/it"),
        (["generate", "it", "--prompt-ids", "1", "--adapter", "x=it", "--draft-tokens", "2"], "goes with --draft"),
        (["compare", "a", "b", "--html", "a"], "a is read"),
        (["compare", "a", "b", "--json", "./b"], "b is read"),
        (["compare", "a", "b", "--json", "c", "--junit", "c"], "c is to be written twice"),
        ([*RECORD, "x" * 300], "File name too long"),
        (["weights", "it", "it", "--json", "x" * 300], "File name too long"),
        (["demo", "-o", "."], "is a directory, expected a file"),
        (["demo", "-o", "none/page.html"], "make it first"),
        (["mutate", "--profiles", "none/profiles.json"], "make it first"),
        (["mutate", "--list", "--only", "zzz"], "no mutant is called zzz"),
        (["generate", "it", "--prompt-ids", ""], "expected token ids"),
        (["generate", "it", "--prompt-ids", "1", "--adapter", "none=x"], "is the base alone"),
        (["generate", "it", "--prompt-ids", "1", "--max-new-tokens", "9" * 20], "at most 2147483647"),
    ],
)
def test_what_would_write_over_what_is_read_or_means_nothing_is_refused(here, arguments, words, capsys):
    for name in ("a", "b", "blob"):
        (here / name).write_bytes(b"mine")
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert {(here / name).read_bytes() for name in ("a", "b", "blob")} == {b"mine"}
    assert {path.name for path in here.iterdir()} == {"it", "lr=3", "a", "b", "blob"}


def test_another_name_of_what_is_read_is_refused(here, capsys):
    (here / "a").write_bytes(b"mine")
    os.link("a", "b")
    os.link("it/model.safetensors", "c")
    assert main(["compare", "a", "a", "--json", "b"]) == 2
    assert main([*RECORD, "c"]) == 2
    said = capsys.readouterr().err
    assert f"b is another name of {here}/a, which is read" in said
    assert f"c is another name of {here}/it/model.safetensors" in said
    assert (here / "b").read_bytes() == b"mine"


def test_a_result_asked_for_where_is_printed_is_there_alone_and_behind_what_was_there(here):
    program = [sys.executable, "-m", "parity.cli"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*arguments, stdout):
        done = subprocess.run(
            [*program, *arguments], stdout=stdout, stderr=subprocess.PIPE, env=environment, check=True, timeout=120
        )
        return done.stdout, done.stderr.decode()

    trace, said = run(*RECORD, "/dev/stdout", stdout=subprocess.PIPE)
    (here / "a").write_bytes(trace)
    assert Trace.load(here / "a").backend == "torch"
    assert said.startswith("wrote /dev/stdout: ")
    (here / "log").write_text("before\n")
    with open("log", "a") as log:
        _, said = run("compare", "a", "a", "--json", "/dev/stdout", stdout=log)
    before, _, found = (here / "log").read_text().partition("\n")
    assert (before, "schema" in json.loads(found)) == ("before", True)
    assert "PASS" in said
    with open("new", "w") as new:
        run("compare", "a", "a", "--json", "new", stdout=new)
    assert (here / "new").read_text().startswith("{")


@pytest.mark.parametrize(
    ("second", "sinks", "code"),
    [
        ("a", ">&-", 0),
        ("a", "> /dev/full", 2),
        ("a", "--json /dev/stdout 2> /dev/full", 2),
        ("none", "2> /dev/full", 2),
    ],
)
def test_where_nothing_can_be_said_the_code_tells_all_the_same(second, sinks, code, here):
    """Python's own would be 1, which is "differs", or 120."""
    assert main([*RECORD, "a"]) == 0
    command = f"{shlex.quote(sys.executable)} -m parity.cli compare a {second} {sinks}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    assert (b"schema" in done.stdout) == ("--json" in sinks)


def test_what_is_named_like_an_option_is_a_file_like_others(here):
    for name in ("torch", "record", "torch"):
        assert main([*RECORD, name]) == 0
    assert Trace.load(here / "torch").backend == "torch"


def test_a_pipe_that_has_no_name_is_written_to(here):
    """As of ``-o >(program)``: the link there leads to no path."""
    reading, writing = os.pipe()
    found = []
    with open(reading, "rb") as pipe:
        reader = threading.Thread(target=lambda: found.append(pipe.read()), daemon=True)
        reader.start()
        assert main([*RECORD, f"/proc/self/fd/{writing}"]) == 0
        os.close(writing)
        reader.join(20)
    (here / "file").write_bytes(found[0])
    assert Trace.load(here / "file").backend == "torch"


def test_a_full_disk_is_a_sentence_and_leaves_nothing(here, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        assert main([*RECORD, "large"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "large cannot be written" in capsys.readouterr().err
    assert {path.name for path in here.iterdir()} == {"it", "lr=3"}


def test_a_report_that_a_full_disk_breaks_off_leaves_the_old_one(here, capsys):
    assert main([*RECORD, "a"]) == 0
    (here / "report").write_text("old")
    (here / "report").chmod(0o600)
    for size, code, kept in ((1 << 10, 2, True), (1 << 30, 0, False)):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            assert main(["compare", "a", "a", "--html", "report"]) == code
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert ((here / "report").read_text() == "old") == kept
        assert ("File too large: 'report'" in capsys.readouterr().err) == kept
        assert (here / "report").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in here.iterdir()} == {"it", "lr=3", "a", "report"}


@pytest.mark.parametrize("what", ["another name", "another's", "beside nothing"])
def test_a_file_whose_place_cannot_be_taken_is_written_in(here, what, monkeypatch):
    """A hard link would go on naming the old content; another's file would become ours."""
    (here / "there").mkdir()
    trace = here / "there" / "trace"
    trace.write_text("old")
    if what == "another name":
        os.link(trace, here / "name")
    elif what == "another's":
        monkeypatch.setattr(os, "geteuid", lambda: trace.stat().st_uid + 1)
    else:
        refused = os.fspath(trace.parent)
        monkeypatch.setattr(os, "access", lambda path, mode, *, effective_ids=False: os.fspath(path) != refused)
    inode = trace.stat().st_ino
    assert main([*RECORD, str(trace)]) == 0
    assert Trace.load(here / "name" if what == "another name" else trace).backend == "torch"
    assert trace.stat().st_ino == inode
    assert [path.name for path in trace.parent.iterdir()] == ["trace"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 241591910400 bytes.\nat line 3"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 241 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=str,
)
def test_more_than_memory_holds_is_a_sentence(here, error, monkeypatch, capsys):
    """As torch and JAX say it, each in exceptions of its own."""

    def fails(*_):
        raise error

    monkeypatch.setattr(backends, "open_backend", fails)
    assert main([*RECORD, "trace"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tandem record: there is not enough memory.")
    assert said.count("\n") == 1


def test_a_path_may_have_letters_that_the_terminal_lacks(here):
    (here / "it").rename("\u6f22")
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "parity.cli", "inspect", "\u6f22"]
    found = subprocess.run(command, env=ascii_only, capture_output=True, text=True, check=False, cwd=here)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("\\"), found.stdout  # how, depends on what the system's own encoding is


def test_a_device_that_holds_nothing_is_none(here, capsys):
    assert main(["generate", "it", "--backend", "torch", "--device", "meta", "--prompt-ids", "1"]) == 5
    assert "torch has no device 'meta'" in capsys.readouterr().err


def test_tokens_that_are_all_padding_cannot_be_compared(here, capsys):
    ids = np.array([[1, 2, 3]])
    save_file({"input_ids": ids, "attention_mask": 0 * ids}, here / "padding")
    assert main(["bisect", "it", "--a", "torch", "--b", "torch", "--inputs", "padding"]) == 3
    assert main(["run", "it", "--a", "torch", "--b", "torch", "--inputs", "padding", "-q"]) == 3
    assert "no position carries a meaning" in capsys.readouterr().err


def test_a_crash_is_told_whole_and_is_no_verdict(here, monkeypatch, capsys):
    """Python's own exit code for it is 1, which says that two backends differ."""
    monkeypatch.setattr(backends, "open_backend", lambda *_: 1 // 0)
    assert main([*RECORD, "trace"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "tandem record: integer division or modulo by zero" in said


def test_an_interrupt_is_told_in_a_line(here, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(backends, "open_backend", interrupted)
    assert main([*RECORD, "trace"]) == 130
    assert capsys.readouterr().err == "tandem record: interrupted\n"
    assert not (here / "trace").exists()


def test_a_process_that_is_interrupted_ends_as_such(here):
    """A shell says 130, and ends the loop that it is in."""
    code = (
        "import parity.commands.record as it, parity.cli as cli\ndef stop(*_): raise KeyboardInterrupt\nit.run = stop"
    )
    command = [sys.executable, "-c", f"{code}\nimport sys\nsys.exit(cli.main())", *RECORD, "trace"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, env=environment, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "tandem record: interrupted\n")
    assert not (here / "trace").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--top-k", "3"], "--top-k: goes with a --temperature above 0"),
        (["--top-p", "1.0", "--seed", "0"], "--top-p and --seed: goes with"),
    ],
)
def test_what_has_no_part_in_the_best_token_is_refused(here, capsys, given, told):
    words = ["generate", "it", "--backend", "torch", "--prompt-ids", "1,2", "--max-new-tokens", "2"]
    assert main([*words, *given]) == 2
    assert told in capsys.readouterr().err
    assert main([*words, *given, "--temperature", "0.5"]) == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_report_is_written_though_nobody_reads_what_is_printed(here, unbuffered):
    assert main([*RECORD, "a"]) == 0
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "parity.cli", "compare", "a", "a", "--json", "found.json"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (2, "tandem compare: [Errno 32] Broken pipe\n")
    assert (here / "found.json").read_text().startswith("{")
