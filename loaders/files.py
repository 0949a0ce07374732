"""Several files of a source, opened, read or asked about at once; what is wrong with each is told in their order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TypeVar

from loaders.errors import CheckpointError
from loaders.sources import Identity, OpenFile, Source, Unreachable

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
            return None, None, [unreadable(name, str(error.strerror or error))]

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


def check_files(source: Source, expected: Mapping[str, Identity], whole: str) -> None:
    """See that files are as they were, asking by name.

    Args:
        source: of the files.
        expected: name -> what each was.
        whole: what was opened of which they are, for messages.
    Raises:
        CheckpointError: with all that are not; or the server does not answer any more.
    """
    if not expected:
        return

    def ask(name: str) -> str | None:
        return change_of(name, partial(source.identity, name), expected[name], whole)

    try:
        problems = [problem for problem in source.in_parallel(ask, expected.keys()) if problem]
    except Unreachable as error:
        raise CheckpointError(source, [str(error)]) from error
    except OSError as error:
        raise CheckpointError(source, [f"it cannot be opened: {error.strerror or error}"]) from error
    if problems:
        raise CheckpointError(source, problems)


def change_of(name: str, ask: Callable[[], Identity], expected: Identity, whole: str) -> str | None:
    """What became of a file; None: nothing. Raises Unreachable: the server does not answer any more."""
    try:
        if ask() == expected:
            return None
    except Unreachable as error:
        raise Unreachable(f"{name} cannot be asked about: {error}") from error
    except OSError as error:
        return f"{name} is gone: {error.strerror or error}"
    return f"{name} changed since {whole} was opened. Open it again once it is complete."
