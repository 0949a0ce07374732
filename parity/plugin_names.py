"""Names of files that a test leaves behind: its own, as far as a file system takes them."""

from __future__ import annotations

import hashlib
import re

MOST_LETTERS = 150  # with an ending a file system takes 255 bytes


def file_name(text: str) -> str:
    """A name for files of a test, or of something in it; other texts have other names.

    ``TestA::test_same[float32]`` is ``TestA-test_same-float32``. What has other signs, or is long, gets a digest too.
    """
    plain = re.sub(r"::|\[|\]", "-", text)
    name = re.sub(r"[^a-zA-Z0-9_.-]+", "-", plain).strip("-")
    if name == plain.strip("-") and len(name) <= MOST_LETTERS:
        return name
    return f"{name[:MOST_LETTERS]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
