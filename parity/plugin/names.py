"""Names of files that a test leaves behind: its own, as far as a file system takes them."""

from __future__ import annotations

import hashlib
import re

MOST_LETTERS = 150  # with a digest and an ending; a file system takes 255 bytes
# a test inside of its file, and what a thing of it is called; or a name that somebody gave
_PLAIN = re.compile(r"(?:\w+::)*\w+(?:\[[\w.-]*\])?(?:@[\w.-]+)?|[\w.-]+", re.ASCII)


def file_name(text: str) -> str:
    """A name for files of a test, or of something in it; no two tests of one file have the same.

    ``TestA::test_same[float32]`` is ``TestA.test_same-float32``: names of Python have neither sign. What has others but
    one ``@``, or is long, gets a digest.
    """
    if _PLAIN.fullmatch(text) and len(text) <= MOST_LETTERS:
        return text.replace("::", ".").replace("[", "-").replace("]", "")
    kept = re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-")
    return f"{kept[:MOST_LETTERS]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
