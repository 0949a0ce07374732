"""Do something on all processes, and fail on all if it fails on one or they differ. Each backend brings the wire."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

Result = TypeVar("Result")
DONE = "="  # before what was asked for, and before what was made; an error has none
MOST_LETTERS = 500  # of what was made, so that all of it, and words around it, is in a message


def agreed(
    tell: Callable[[str], Mapping[int, str]],
    what: str,
    work: Callable[[], Result],
    say: Callable[[Result], str],
    *,
    words: tuple[str, str],
) -> Result:
    """What ``work`` returns, if it succeeds on every process and they all make the same of it.

    Args:
        tell: gives every process's text, by its number, for this one's; all of them have to call this.
        what: has to be the same, and called the same.
        work: asks the others for nothing, or for the same as they ask, whether it fails or not.
        say: what it has come to here. Of many words some are told, and a digest of all.
        words: what one of them is called, and what several are.
    Raises:
        Exception: as ``work`` does here.
        RuntimeError: it failed on another one only; with what was raised there.
        ValueError: they say different things, or do; so do all of them.
    """
    one, several = words
    result, said, error = None, "", None
    try:
        result = work()
        said = f"{DONE}{what}{DONE}{_told(say(result))}"
    except Exception as raised:  # noqa: BLE001 - it is raised again once the others know
        error, said = raised, f"{type(raised).__name__}: {raised}"
    told = tell(said)
    if error is not None:
        raise error
    if failed := {index: text for index, text in told.items() if not text.startswith(DONE)}:
        where = "; ".join(f"{one} {index}: {text}" for index, text in failed.items())
        raise RuntimeError(f"{len(failed)} of {len(told)} {several} failed, so none goes on. {where}")
    if len(set(told.values())) > 1:
        asked, made = ({index: text.split(DONE, 2)[part] for index, text in told.items()} for part in (1, 2))
        is_alike = len(set(asked.values())) == 1
        differs, texts = (what, made) if is_alike else ("what is called", asked)
        where = "; ".join(f"{text or 'something else'} on {one} {index}" for index, text in texts.items())
        raise ValueError(f"{differs} is not the same on all {several}: {where}. Nothing was changed.")
    return result  # pyright: ignore[reportReturnType]


def _told(text: str) -> str:
    if len(text) <= MOST_LETTERS:
        return text
    return f"{text[:MOST_LETTERS]}... ({len(text)} letters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"
