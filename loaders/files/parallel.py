"""Several files of a source, opened, read or asked about at once; what is wrong with each is told in their order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from loaders.errors import CheckpointError, reason
from loaders.sources import Identity, OpenFile, Session, Source, Unreachable

Content = TypeVar("Content")


def read_files(
    source: Source,
    names: Collection[str],
    read: Callable[[OpenFile], tuple[Content | None, list[str]]],
    unreadable: Callable[[str, str], str],
) -> tuple[dict[str, Content], dict[str, Identity], list[str]]:
    """What is in files, and what each was when it was opened, by name as far as they could be read; and all problems.

    Args:
        source: of the files.
        names: which.
        read: of an open file, None and what is wrong with it where it makes no sense.
        unreadable: the sentence for a file that cannot be opened or read: its name, and why.
    Raises:
        CheckpointError: the server does not answer any more.
    """

    def one(name: str) -> tuple[Content | None, Identity | None, list[str]]:
        try:
            with source.open(name) as file:
                content, problems = read(file)
                return content, file.opened, problems
        except Unreachable as error:
            raise Unreachable(f"{name} cannot be read: {error}") from error
        except OSError as error:
            return None, None, [unreadable(name, reason(error))]

    contents: dict[str, Content] = {}
    identities: dict[str, Identity] = {}
    problems: list[str] = []
    try:
        results = list(source.in_parallel(one, names))
    except Unreachable as error:
        raise CheckpointError(source, [str(error)]) from error
    for name, (content, identity, found) in zip(names, results, strict=True):
        problems += found
        if content is not None:
            contents[name] = content
        if identity is not None:
            identities[name] = identity
    return contents, identities, problems


@dataclass(frozen=True)
class PinnedFiles:
    """Files of a source as they were when they were read: whoever comes back to them finds the same or is told.

    Holds none open.

    Attributes:
        source: of the files.
        identities: name -> what each was.
        whole: what was opened of which they are, for messages.
    """

    source: Source
    identities: Mapping[str, Identity]
    whole: str = "the checkpoint"

    @property
    def num_bytes(self) -> int:
        return sum(found.num_bytes for found in self.identities.values())

    def open(self, name: str) -> OpenFile:
        """Open one. Raises CheckpointError when it cannot be, or is known to be another than it was."""
        try:
            file = self.source.open(name, self.identities[name])
        except OSError as error:
            raise CheckpointError(self.source, [f"{name} cannot be opened: {reason(error)}"]) from error
        if problem := self._change_of(name, lambda: file.opened):
            file.close()
            raise CheckpointError(self.source, [problem])
        return file

    def session(self) -> Session:
        """What reads many stretches of them at once. Raises CheckpointError."""
        try:
            return self.source.session(self.num_bytes)
        except OSError as error:
            raise CheckpointError(self.source, [f"it cannot be opened: {reason(error)}"]) from error

    def check_open(self, file: OpenFile) -> None:
        """See that an open file is as it was. Raises CheckpointError when it is not, or cannot be asked."""
        if problem := self._change_of(file.name, file.identity):
            raise CheckpointError(self.source, [problem])

    def check(self, names: Iterable[str] | None = None) -> None:
        """See that files, by default all, are as they were, asking by name.

        Raises:
            CheckpointError: with all that are not; or the server does not answer any more.
        """
        chosen = list(self.identities if names is None else names)
        if not chosen:
            return

        def ask(name: str) -> str | None:
            return self._change_of(name, partial(self.source.identity, name))

        try:
            problems = [problem for problem in self.source.in_parallel(ask, chosen) if problem]
        except Unreachable as error:
            raise CheckpointError(self.source, [str(error)]) from error
        except OSError as error:
            raise CheckpointError(self.source, [f"it cannot be opened: {reason(error)}"]) from error
        if problems:
            raise CheckpointError(self.source, problems)

    def _change_of(self, name: str, ask: Callable[[], Identity]) -> str | None:
        """What became of a file; None: nothing. Raises Unreachable: the server does not answer any more."""
        try:
            if ask() == self.identities[name]:
                return None
        except Unreachable as error:
            raise Unreachable(f"{name} cannot be asked about: {error}") from error
        except OSError as error:
            return f"{name} is gone: {reason(error)}"
        return f"{name} changed since {self.whole} was opened. Open it again once it is complete."
