"""Which modules a list of names means: whole names, wildcards and regular expressions, as exporters write them.

Consumers read the patterns in different ways; here a name is matched in any of them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Iterator

# modules that other engines fuse, whose fused names get into documents
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
# a whole name: nothing of another before it, but perhaps the \b of a regular expression
_WHOLE = {name: re.compile(rf"(?:(?<![a-z_])|(?<=\\b)){name}(?![a-z_])") for name in FUSED}

Matches = Callable[[Iterable[str]], bool]  # whether any of a module's names is meant


def everything(names: Iterable[str]) -> bool:
    """Every module."""
    return True


def numbers_experts(pattern: str) -> bool:
    """Whether it may mean some experts of a layer and not others."""
    return re.search(r"experts.*\d|^\d", pattern) is not None


def is_exact(pattern: str) -> bool:
    """Whether it is a name, and no regular expression or one with wildcards."""
    return not pattern.startswith("re:") and not any(sign in pattern for sign in "*?[")


def patterns(given: Iterable[str], *, is_prefix: bool = True) -> Matches:
    """Whether a module is named by any of ``given``.

    A pattern is a whole name, ``re:`` and a regular expression that its beginning must match, or has wildcards. With
    ``is_prefix`` a name also stands for every module below it and, as engines read it, for parts of a longer one:
    ``lm_head``, ``self_attn.q_proj``; and what is below a module stands for it too: ``q_proj.*``. Fused names are
    expanded first.
    """
    exact: set[str] = set()
    wild: list[str] = []
    # not joined into one: flags and references to groups mean something only in an expression of their own
    regexes: list[re.Pattern[str]] = []
    expanded = _expanded(given)
    if is_prefix:
        expanded += [one.removesuffix(".*") for one in expanded if one.endswith(".*") and not one.startswith("re:")]
    for pattern in expanded:
        if pattern.startswith("re:"):
            regexes.append(re.compile(pattern.removeprefix("re:")))
        elif is_exact(pattern):
            exact.add(pattern)
        else:
            wild.append(fnmatch.translate(pattern))
    if wild:
        regexes.append(re.compile("|".join(wild)))

    sizes = {name.count(".") + 1 for name in exact}

    def is_named(name: str) -> bool:
        if name in exact or (is_prefix and not exact.isdisjoint(_within(name, sizes))):
            return True
        return any(regex.match(name) for regex in regexes)

    def matches(names: Iterable[str]) -> bool:
        return any(is_named(name) for name in names)

    return matches


def _expanded(given: Iterable[str]) -> list[str]:
    """Every pattern once for each combination of parts of the fused names in it."""
    found = list(given)
    for name, parts in FUSED.items():
        whole = _WHOLE[name]
        found = [whole.sub(part, one) for one in found for part in (parts if whole.search(one) else parts[:1])]
    return found


def _within(name: str, sizes: Collection[int]) -> Iterator[str]:
    """Every run of so many dotted parts in a name."""
    parts = name.split(".")
    for size in sizes:
        for start in range(len(parts) - size + 1):
            yield ".".join(parts[start : start + size])
