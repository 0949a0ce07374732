"""Two object stores and several streams in one process, which the streamer's library is not made for.

In processes of their own: the library stays with the servers it first met.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import ENVIRONMENT

from loaders.sources import library
from parity.zoo import make_checkpoint

PREPARE = """
import os, sys
from pathlib import Path
import gs_server, s3_server
from loaders import CheckpointError, open_checkpoint
from loaders.reading import memory
from loaders.digest import digests
from loaders.sources import gs, runai

directories = [Path(path) for path in sys.argv[1:]]
google, amazon = gs_server.Server(), s3_server.Server()
os.environ |= {gs.ENDPOINT: google.url, "AWS_ENDPOINT_URL": amazon.url}
"""

IN_TURN = """
expected = [digests(open_checkpoint(path).stream()) for path in directories]
assert expected[0] != expected[1]
addresses = amazon.put(directories[0], "same/key"), google.put(directories[1], "same/key")
for turn in (FIRST, 1 - FIRST, FIRST):
    assert digests(open_checkpoint(addresses[turn]).stream()) == expected[turn], addresses[turn]
local = open_checkpoint(f"runai://{directories[0]}")
assert digests(local.stream()) == expected[0]
"""

ONE_IS_CLOSED = """
memory.STAGING_BYTES = runai.STAGING_BYTES = 1 << 14  # so that much is on its way
checkpoint = open_checkpoint(STORE.put(directories[0], "x"))
expected = digests(checkpoint.stream())
for _ in range(3):
    first, second = checkpoint.stream(), checkpoint.stream()
    next(first)
    begun = [next(second)]
    first.close()
    assert digests(begun + list(second)) == expected
"""


FORKED = """
def child(read):
    pid = os.fork()
    if not pid:
        sys.exit(0 if read() else 3)  # and what is to be done at exit, is
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def refused():
    try:
        read()
    except CheckpointError as error:
        return "get_context('spawn')" in str(error)

expected = digests(open_checkpoint(directories[0]).stream())
address = ADDRESS
read = lambda: digests(open_checkpoint(address).stream()) == expected
open_checkpoint(address).files.session().close()  # the library is here, and has asked for nothing yet
child(lambda: True)
assert read()
child(refused if address.startswith("s3") else read)
assert read()
"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp("stores")
    return [make_checkpoint("qwen3", path / str(seed), seed=seed, num_hidden_layers=2) for seed in (1, 2)]


def run(script: str, directories: list[Path]) -> None:
    places = str(Path(__file__).parent), os.environ["PYTHONPATH"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", PREPARE + script, *map(str, directories)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_each_store_is_read_from_whichever_came_first(directories: list[Path], first: int) -> None:
    """Also where both have an object of the same name: the library would take the first store's in silence."""
    run(f"FIRST = {first}\n{IN_TURN}", directories)


@pytest.mark.parametrize("store", ["amazon", pytest.param("google", marks=pytest.mark.slow)])
def test_a_stream_that_is_closed_leaves_others_of_its_store_alone(directories: list[Path], store: str) -> None:
    run(f"STORE = {store}\n{ONE_IS_CLOSED}", directories)


@pytest.mark.parametrize(
    "address",
    [
        'amazon.put(directories[0], "x")',
        pytest.param('google.put(directories[0], "x")', marks=pytest.mark.slow),
        pytest.param('f"runai://{directories[0]}"', marks=pytest.mark.slow),
    ],
)
def test_a_forked_process_leaves_its_parents_library_alone(directories: list[Path], address: str) -> None:
    """And reads too, or says at once why it cannot."""
    run(FORKED.replace("ADDRESS", address), directories)


def test_where_no_copy_can_be_loaded_it_says_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> int:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match=r"s3:// is read through a copy .* Operation not permitted\. .*\(TMPDIR\)"):
        library._load.__wrapped__(library.find_library("s3"), "s3")
    assert list(tmp_path.iterdir()) == []
