"""Where in the sequence the error sits: tokens by tensors, coloured by the share of its limit that each token uses."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Sequence

import numpy as np

from parity.comparison.outcome import Comparison
from parity.wording import TOKEN_LIMIT, short_name, told_share

LEVELS = (0.25, 0.5, 0.75, 1.0, 2.0, 8.0)  # shares of the limit; above 1 fails
LABELS = ("up to ¼ of a token's limit", "to ½", "to ¾", "to the limit", "over, up to 2x", "up to 8x", "more")
COLUMNS, ROWS, STRIPS = 160, 40, 12  # cells drawn; longer ones show the worst of several tokens or tensors
LABELLED = 16  # lines named along the edge, at most
WIDTH, LEFT, RIGHT, CELL = 1040, 82, 14, 11
TICK = 36.0  # pixels between two numbers along the positions, at least
GLYPHS = "\u00b7\u2591\u2592\u2593xX# "  # by level; the last, level -1, is what was not judged
TEXT_COLUMNS = 96


def heat_map(comparison: Comparison) -> str:
    """The strips of all batch rows, and tensor by tensor the row with the worst token; empty without any token."""
    named = {comparison.module_of(name): array for name, array in comparison.token_used.items()}
    used = {name: array for name, array in named.items() if array.size and array.shape[1]}
    worst = comparison.worst_token
    if not used or worst is None:
        return ""
    width = max(array.shape[1] for array in used.values())
    padded = {name: _pad(array, width) for name, array in used.items()}
    batch = next(iter(padded.values())).shape[0]
    overall = np.fmax.reduce(list(padded.values()))
    chosen = [row for row in range(batch) if row < STRIPS or row == worst.row] if batch > 1 else []
    lines = [(f"row {row}", overall[row]) for row in chosen]
    strips = len(lines)
    lines += _by_tensor({name: array[worst.row] for name, array in padded.items()})
    rows = "every row, then " if batch > 1 else ""
    title = f"<h3>Tokens: share of {TOKEN_LIMIT} that each uses, {rows}row {worst.row} module by module</h3>"
    css = "mark-text" if worst.margin < 0 else "calm"
    module = comparison.module_of(worst.tensor)
    line = strips + list(padded).index(module) // _group(padded)
    starts = decode_starts(comparison)
    since = [starts[row] for row in [*chosen, *[worst.row] * (len(lines) - strips)]]
    drawn = _svg(lines, strips, (line, worst.position), css, since)
    where = f"<p class='key'>Across: positions. Framed: position {worst.position} in {html.escape(module)}, which uses"
    most = "the most of any single token" + (" there" if css == "mark-text" else "")
    where += f" {told_share(1 - worst.margin, TOKEN_LIMIT)}, {most}.{_since_key(since)}</p>"
    return f'<div class="heat">{title}{drawn}{where}{_legend(has_router=comparison.routing is not None)}</div>'


def decode_starts(comparison: Comparison) -> list[int | None]:
    """The first position of every row that was decoded, by its own step, in either trace; None where none was."""
    case = comparison.case
    batch = max((used.shape[0] for used in comparison.token_used.values()), default=0)
    steps = max((int(facts.get("decode") or 0) for facts in comparison.meta[:2]), default=0)
    if case is None or not steps:
        return [None] * batch
    real = [np.flatnonzero(row) for row in case.mask()]
    return [int(row[-steps]) if len(row) >= steps else None for row in real]


def _since_key(since: Sequence[int | None]) -> str:
    return "" if not any(one is not None for one in since) else " Behind the upright line: decoded one at a time."


def _group(tensors: Collection[str]) -> int:
    """How many neighbouring tensors share a line."""
    return -(-len(tensors) // ROWS)


def heat_of(name: str, used_BT: np.ndarray, *, starts: Sequence[int | None] = (), has_router: bool = False) -> str:
    """One tensor: a line for each row of the batch; of a large batch the worst rows. Empty without any token.

    ``starts``: of ``decode_starts``. ``has_router``: whether tokens may be left out because of one.
    """
    if not used_BT.size or np.isnan(used_BT).all():
        return ""
    row, position = worst_place(used_BT)
    order = np.argsort(-np.nan_to_num(np.fmax.reduce(used_BT, axis=1), nan=-1.0), kind="stable")
    chosen = sorted(order[:ROWS].tolist())
    lines = [(f"row {index}", used_BT[index]) for index in chosen]
    css = "mark-text" if used_BT[row, position] > 1 else "calm"
    title = f"<h3>{html.escape(name)}: share of {TOKEN_LIMIT} that each token uses</h3>"
    most = told_share(float(used_BT[row, position]), TOKEN_LIMIT)
    since = [starts[index] for index in chosen] if starts else []
    where = f"<p class='key'>Across: positions. Framed, the worst: row {row}, position {position}, {most}."
    where += f" {len(order) - len(chosen)} rows that use less are left out." if len(order) > ROWS else ""
    drawn = _svg(lines, 0, (chosen.index(row), position), css, since)
    return f'<div class="heat">{title}{drawn}{where}{_since_key(since)}</p>{_legend(has_router=has_router)}</div>'


def heat_text(name: str, used_BT: np.ndarray) -> str:
    """The same in characters, one for each token or, of long rows, for the worst of several."""
    if not used_BT.size or np.isnan(used_BT).all():
        return f"{name}: no token was judged"
    row, position = worst_place(used_BT)
    group = -(-used_BT.shape[1] // TEXT_COLUMNS)
    head = f"{name}: worst at row {row}, position {position}, {told_share(float(used_BT[row, position]), TOKEN_LIMIT)}"
    lines = ["".join(GLYPHS[level] for level in _levels(values, group)) for values in used_BT[:ROWS]]
    key = "  ".join(f"{glyph} {label}" for glyph, label in zip(GLYPHS, LABELS, strict=False))
    each = "" if group == 1 else f"  (a character is the worst of {group} positions)"
    return "\n".join([head, *(f"row {i:<4}{line}" for i, line in enumerate(lines)), f"{key}{each}"])


def worst_place(used_BT: np.ndarray) -> tuple[int, int]:
    """Row and position of the token that uses most."""
    row, position = np.unravel_index(int(np.nanargmax(used_BT)), used_BT.shape)
    return int(row), int(position)


def _by_tensor(tensors: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """One line per tensor, or per group of neighbouring tensors of a deep model."""
    names = list(tensors)
    group = _group(names)
    parts = [names[i : i + group] for i in range(0, len(names), group)]
    return [(html.escape(short_name(part[0])), np.fmax.reduce([tensors[name] for name in part])) for part in parts]


def _pad(array: np.ndarray, width: int) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=np.nan)


def _svg(
    lines: list[tuple[str, np.ndarray]],
    strips: int,
    worst: tuple[int, int],
    css: str,
    since: Sequence[int | None] = (),
) -> str:
    """``worst``: line and position of the token to mark; ``since``: of each line, a position to mark the start of."""
    position = worst[1]
    length = len(lines[0][1])
    group = -(-length // COLUMNS)
    columns = -(-length // group)
    size = min((WIDTH - LEFT - RIGHT) / columns, 26)
    paths: dict[int, list[str]] = {}
    texts, y, ring, marks = [], 14, "", []
    every = -(-len(lines) // LABELLED)
    for index, (label, values) in enumerate(lines):
        y += 10 if index == strips and strips else 0  # a gap between the rows of the batch and the tensors of one row
        levels = _levels(values, group)
        if index < strips or (index - strips) % every == 0 or index == len(lines) - 1:
            texts.append(f'<text x="{LEFT - 8}" y="{y + CELL - 2}" text-anchor="end">{label}</text>')
        for start, end, level in _runs(levels):
            paths.setdefault(level, []).append(
                f"M{LEFT + start * size:.1f} {y}h{(end - start) * size - 0.7:.1f}v{CELL - 1}"
            )
            paths[level].append(f"h{-((end - start) * size - 0.7):.1f}z")
        if index == worst[0]:
            kind, x = "frame over" if css == "mark-text" else "frame", LEFT + (position // group) * size - 1
            box = f'x="{x:.1f}" y="{y - 1}" width="{size + 1.3:.1f}" height="{CELL + 1}" rx="2"'
            ring = f'<rect class="halo" {box}/><rect class="{kind}" {box}/>'  # to be seen on pale and on dark cells
        if since and (start := since[index]) is not None:
            marks.append(f"M{LEFT + (start // group) * size - 0.6:.1f} {y - 1}v{CELL}")
        y += CELL
    ring += f'<path class="since" d="{"".join(marks)}"/>' if marks else ""
    drawn = "".join(f'<path class="h{level}" d="{"".join(parts)}"/>' for level, parts in sorted(paths.items()))
    at = LEFT + (position // group + 0.5) * size
    width = LEFT + columns * size + RIGHT  # a short sequence is drawn small, not stretched
    near_end = at > width - 30  # the number goes where it has room
    x, side = (at + 4, "end") if near_end else (at - 4, "start")
    told = f"{position} \u25be" if near_end else f"\u25be {position}"
    mark = f'<text class="{css}" x="{x:.1f}" y="10" text-anchor="{side}">{told}</text>'
    texts += _ticks(length, group, size, y)
    head = f'<svg viewBox="0 0 {width:.0f} {y + 18}" style="max-width:{width:.0f}px" role="img"'
    head += ' aria-label="heat map of tokens">'
    return f'<div class="scroll">{head}{mark}{"".join(texts)}{drawn}{ring}</svg></div>'


def _ticks(length: int, group: int, size: float, y: int) -> list[str]:
    """Numbers of positions under the cells, as many as there is room for."""
    step = next((s for s in (1, 2, 4, 8, 16, 32, 64) if s / group * size >= TICK), 0)
    step = step or 128 * math.ceil(TICK * group / size / 128)
    parts = []
    for position in range(0, length, step):
        x = LEFT + (position // group + 0.5) * size
        parts.append(f'<path class="grid" d="M{x:.1f} {y + 1}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 14}" text-anchor="middle">{position}</text>')
    return parts


def _levels(values: np.ndarray, group: int) -> np.ndarray:
    """Level of each column, the worst of its tokens; -1 where none was judged."""
    padded = np.pad(values.astype(np.float64), (0, -len(values) % group), constant_values=np.nan).reshape(-1, group)
    worst = np.fmax.reduce(padded, axis=1)
    return np.where(np.isnan(worst), -1, np.searchsorted(LEVELS, np.nan_to_num(worst, posinf=1e9), side="left"))


def _runs(levels: np.ndarray) -> list[tuple[int, int, int]]:
    """(start, end, level) of equal neighbours, without those not judged: a calm strip costs a few bytes."""
    edges = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(levels)]
    return [(i, j, int(levels[i])) for i, j in zip(edges, edges[1:], strict=False) if levels[i] >= 0]


def _legend(*, has_router: bool) -> str:
    keys = "".join(f'<span><i class="dot h{level}"></i>{text}</span>' for level, text in enumerate(LABELS))
    blank = "padding" + (", or after a token that a router sent to other experts" if has_router else "")
    return f'<div class="legend">{keys}<span>blank: {blank}</span></div>'
