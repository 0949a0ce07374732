"""The pytest plugin: parity as fixtures, markers and a report. pip brings it in; nothing has to be configured.

    @pytest.mark.parity(model="qwen3-moe", dtype="bfloat16")
    def test_jax_computes_what_torch_does(backend_pair, oracle):
        assert_parity(*backend_pair, oracle)

Collecting tests imports neither JAX nor torch, nor NumPy: everything is imported by the test that asks for it.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from parity.plugin.names import file_name
from parity.watching import watching

if TYPE_CHECKING:
    from parity.asserting import Held, Oracle
    from parity.events import EventResult
    from parity.plugin.fixtures import BackendPair, Golden, Lifecycle, ParityMark, Ruler, TinyModels

MARKERS = (
    "parity(model='qwen3', a='jax', b='torch', dtype='float32', seed=0): what backend_pair and oracle are of",
    "needs(name, sm=None, count=1): skipped where there is no such device (cuda, tpu) or package",
)
FOUND = pytest.StashKey[list[dict[str, Any]]]()  # of a test: entries of the report that no test report has taken yet
KEPT = pytest.StashKey[Counter[str]]()  # of a test: how many comparisons of a title failed, whose traces are kept
GOLDENS = pytest.StashKey[list[str]]()  # of a test: goldens it wrote, likewise


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity", "parity of models")
    group.addoption("--parity-update", action="store_true", help="write goldens instead of comparing with them")
    group.addoption(
        "--parity-html", metavar="F", type=Path, help="write one self-contained report over all comparisons"
    )
    parser.addini("parity_goldens", "directory of goldens, from a test file's own", default="goldens")


def pytest_configure(config: pytest.Config) -> None:
    path = config.option.parity_html
    if path is not None and path.is_dir():
        raise pytest.UsageError(f"--parity-html {path}: it is a directory, expected a file to write")
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if not hasattr(config, "workerinput"):  # a worker of xdist reports to nobody but its controller
        config.pluginmanager.register(_Collector(config), "parity-collector")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        from parity.plugin.needs import lacking

        try:
            reason = lacking(*mark.args, **mark.kwargs)
        except (TypeError, ValueError) as error:
            pytest.fail(str(error), pytrace=False)
        if reason:
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Be told of every comparison that a test, or one of its fixtures, makes."""
    item.stash[FOUND], item.stash[GOLDENS], item.stash[KEPT] = [], [], Counter()
    with watching(lambda held: _on_comparison(item, held)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Send what was found along with pytest's report of the test: xdist brings it to the process that writes."""
    report = yield
    report.parity = {"entries": item.stash.get(FOUND, []), "goldens": item.stash.get(GOLDENS, [])}
    item.stash[FOUND], item.stash[GOLDENS] = [], []
    return report


class _Collector:
    """Of the process that reports to the user: takes what the tests found, wherever they ran."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._entries: list[dict[str, Any]] = []
        self._goldens: list[str] = []
        self._told = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = getattr(report, "parity", None)  # pytest makes reports of crashed workers without us
        if found and report.outcome != "rerun":  # of pytest-rerunfailures: another attempt says how the test went
            is_expected = report.outcome == "passed" or hasattr(report, "wasxfail")
            # what failed of a test that did as it should was expected to: like what is measured, it is no verdict
            self._entries += [
                entry | {"verdict": None} if is_expected and entry.get("verdict") not in (None, "PASS") else entry
                for entry in found["entries"]
            ]
            self._goldens += found["goldens"]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        path = self._config.option.parity_html
        if path is not None and not self._config.option.collectonly:
            from parity.plugin.report import write

            try:
                write(path, self._entries, command=shlex.join(["pytest", *self._config.invocation_params.args]))
                self._told = f"report in {path}"
            except OSError as error:
                self._told = f"no report could be written: {error}"
                session.exitstatus = session.exitstatus or pytest.ExitCode.USAGE_ERROR

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._told:
            terminalreporter.write_line(f"parity: {self._told}")
        for golden in sorted(self._goldens):
            terminalreporter.write_line(f"parity: wrote golden {golden}")


def _on_comparison(item: pytest.Item, held: Held) -> str | None:
    """Note it for the report and for JUnit; of one that fails keep the traces, and say how to compare them again."""
    found = held.comparison
    margins = [min(row.margin, row.token_margin) for row in found.rows if row.verdict != "SKIP"]
    name = f"parity.{held.title}"
    item.user_properties.append((f"{name}.verdict", found.verdict))
    if margins:
        item.user_properties.append((f"{name}.margin", f"{min(margins):.6g}"))
    again = None if found.verdict == "PASS" or not held.is_asserted else _keep(item, held)
    if item.config.option.parity_html is not None:
        from parity.plugin.report import of_comparison

        item.stash[FOUND].append(of_comparison(held, item.nodeid, again, _alone(item)))
    return again


def _alone(item: pytest.Item) -> str:
    """The command that runs a test by itself, from where this run was started and with its options."""
    config = item.config
    typed = getattr(config, "workerinput", {}).get("mainargv")  # under xdist: of the process that started the workers
    given = list(config.invocation_params.args if typed is None else typed[1:])
    chosen, words = set(getattr(config.option, "file_or_dir", None) or ()), ["pytest"]
    for before, word in zip(["", *given], given, strict=False):
        is_report = "--parity-html" in (before, word.partition("=")[0])  # one test's report is not the session's
        if word not in chosen and not is_report:
            words.append(word)
    path = os.path.relpath(item.path, config.invocation_params.dir)
    return shlex.join([*words, f"{path}::{item.nodeid.partition('::')[2]}"])


def _keep(item: pytest.Item, held: Held) -> str | None:
    """Traces of a comparison that failed, in pytest's cache. None where there is no cache (``-p no:cacheprovider``)."""
    cache: pytest.Cache | None = getattr(item.config, "cache", None)
    if cache is None:
        return None
    kept = item.stash[KEPT]
    kept[held.title] += 1
    number = f"-{kept[held.title]}" if kept[held.title] > 1 else ""  # of those that one test caught, or in its subtests
    directory = cache.mkdir("parity") / file_name(f"{item.nodeid}-{held.title}{number}")
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: trace.save(directory / f"{name}.trace") for name, trace in held.traces.items()}
    options = {"oracle": "--oracle", "oracle_b": "--oracle-b"}
    words = ["tandem", "compare", str(paths["a"]), str(paths["b"])]
    words += [word for name, option in options.items() if name in paths for word in (option, str(paths[name]))]
    return shlex.join(words)


def _mark(request: pytest.FixtureRequest) -> ParityMark:
    """What the nearest ``@pytest.mark.parity`` says; the default without one."""
    from parity.plugin.fixtures import ParityMark

    mark = request.node.get_closest_marker("parity")
    try:
        return ParityMark(*mark.args, **mark.kwargs) if mark else ParityMark()
    except (TypeError, ValueError) as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Checkpoints of the zoo: ``tiny_model("qwen3-moe", seed=1, dtype="BF16")`` is a directory, made once."""
    from parity.plugin.fixtures import TinyModels

    return TinyModels(tmp_path_factory.mktemp)


@pytest.fixture
def backend_pair(request: pytest.FixtureRequest, tiny_model: TinyModels) -> BackendPair:
    """Two backends of one tiny checkpoint, as ``@pytest.mark.parity`` says: ``assert_parity(*backend_pair)``."""
    from parity.errors import DeviceNotFound
    from parity.plugin.fixtures import BackendPair

    mark = _mark(request)
    try:
        return BackendPair.load(mark, _checkpoint(mark, tiny_model))
    except DeviceNotFound as error:
        pytest.skip(str(error))


@pytest.fixture
def oracle(request: pytest.FixtureRequest, tiny_model: TinyModels) -> Oracle:
    """The float64 oracle of the same checkpoint; what it has said about a batch is kept for the session."""
    return tiny_model.oracle(_checkpoint(_mark(request), tiny_model))


@pytest.fixture
def ruler() -> Ruler:
    """``ruler(a, b, oracle)`` is the comparison, whatever its verdict."""
    from parity.plugin.fixtures import Ruler

    return Ruler()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    """``golden(run)`` holds a run against the trace that is kept beside the tests; ``--parity-update`` writes it."""
    from parity.plugin.fixtures import Golden

    item, config = request.node, request.config
    directory = item.path.parent / config.getini("parity_goldens") / item.path.stem
    inside = item.nodeid.partition("::")[2]  # of the file: two classes may have a test of one name
    found = Golden(directory, inside, f"{_alone(item)} --parity-update", updates=config.option.parity_update)
    yield found
    item.stash[GOLDENS] += map(str, found.written)


@pytest.fixture
def lifecycle(request: pytest.FixtureRequest, tmp_path: Path) -> Lifecycle:
    """``lifecycle(a, b)`` takes our models through every event, ``lifecycle.foreign(model, a, b)`` anybody's module."""
    from parity.plugin.fixtures import Lifecycle

    item = request.node

    def told(results: Sequence[EventResult]) -> None:
        for verdict in ("pass", "fail", "skip"):
            count = sum(result.verdict == verdict for result in results)
            item.user_properties.append((f"parity.lifecycle.{verdict}", str(count)))
        if item.config.option.parity_html is not None:
            from parity.plugin.report import of_events

            item.stash[FOUND].append(of_events(results, item.nodeid))

    return Lifecycle(tmp_path, told)


def _checkpoint(mark: ParityMark, tiny_model: TinyModels) -> Path:
    from parity.plugin.fixtures import DTYPES

    return tiny_model(mark.model, seed=mark.seed, dtype=DTYPES[mark.dtype])
