"""What ``Comparison`` shows in a notebook beside itself: each object as HTML, as text, and as numbers to go on with.

Inline SVG and styles, no scripts, so they are the same in a notebook, in its static copy and on paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.comparison.outcome import Comparison
from parity.comparison.text import tensor_table as tensor_text
from parity.events import EventResult, render_text
from parity.report.chart import chart_key, error_chart
from parity.report.heat import decode_starts, heat_map, heat_of, heat_text
from parity.report.style import framed, standalone_svg
from parity.report.tables import tensor_rows
from parity.report.timeline import timeline_table

if TYPE_CHECKING:
    from pandas import DataFrame  # pyright: ignore[reportMissingImports]


class Table:
    """Every tensor of a comparison under the ruler."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns by name, one value for each tensor in the order of computation; errors are relative L2."""
        rows = self._comparison.rows
        names = ("name", "module", "layer", "e_a", "e_b", "direct", "ratio", "limit", "lid")
        names += ("used", "margin", "token_margin")
        columns = {name: [getattr(row, name) for row in rows] for name in names}
        columns |= {name: [getattr(row, name) for row in rows] for name in ("verdict", "cause", "blame", "tokens")}
        places = [(None, None) if row.worst_token is None else _place(row.worst_token) for row in rows]
        return columns | {"worst_row": [row for row, _ in places], "worst_position": [at for _, at in places]}

    def to_pandas(self) -> DataFrame:
        """The same as a DataFrame.

        Raises:
            ValueError: pandas is not installed; nothing else here needs it.
        """
        try:
            pandas = import_module("pandas")
        except ModuleNotFoundError as error:
            raise ValueError("to_pandas needs pandas: pip install pandas. to_dict() has the same columns.") from error
        return pandas.DataFrame(self.to_dict())

    def __repr__(self) -> str:
        return tensor_text(self._comparison, everything=True) if self._comparison.rows else "no tensor was judged"

    def _repr_html_(self) -> str:
        table = tensor_rows(self._comparison) if self._comparison.rows else "<p>No tensor was judged.</p>"
        return framed(table)


class LayerPlot:
    """Errors by layer on a log scale: both sides, the limit one of them had to stay under, and that of any backend."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison

    def __repr__(self) -> str:
        a, b = self._comparison.labels
        rows = [row for row in self._comparison.rows if row.verdict != "SKIP"]
        return f"errors of {a} and {b} at {len(rows)} tensors; .table() has the numbers"

    def _repr_svg_(self) -> str | None:
        """The chart by itself, styles included: to be saved as a file."""
        chart = error_chart(self._comparison)
        return standalone_svg(chart) if chart else None

    def _repr_html_(self) -> str:
        chart = error_chart(self._comparison)
        return framed(
            f'<div class="scroll">{chart}</div>{chart_key(self._comparison)}'
            if chart
            else "<p>No tensor was judged.</p>"
        )


class Heat:
    """The share of its limit that each token uses, above 1 where it fails.

    Attributes:
        name: the tensor; None: all of them.
        used: float32 [B, T], NaN where nothing was judged: padding, or behind a router flip. Of all tensors the worst.
    """

    def __init__(self, comparison: Comparison, name: str | None = None) -> None:
        known = {one: used for one, used in comparison.token_used.items() if used.size}
        self.name = None if name is None else _tensor(name, known, comparison)
        self._comparison = comparison
        self.used = known[self.name] if self.name else _worst(known)

    def __repr__(self) -> str:
        return heat_text(self._title, self.used)

    @property
    def _title(self) -> str:
        return f"output of {self._comparison.module_of(self.name)}" if self.name else "all modules"

    def _repr_html_(self) -> str:
        told = {"starts": decode_starts(self._comparison), "has_router": self._comparison.routing is not None}
        drawn = heat_map(self._comparison) if self.name is None else heat_of(self._title, self.used, **told)
        return framed(drawn or "<p>No token was judged.</p>")


class Timeline:
    """Events in the life of weights, backends side by side, with a colour for every root digest."""

    def __init__(self, events: Sequence[EventResult]) -> None:
        self.events = tuple(events)

    def __repr__(self) -> str:
        return render_text(self.events, colour=False)

    def _repr_html_(self) -> str:
        return framed(timeline_table(self.events))


def _place(token: Any) -> tuple[int, int]:
    return token.row, token.position


def _worst(known: Mapping[str, np.ndarray]) -> np.ndarray:
    width = max((used.shape[1] for used in known.values()), default=0)
    padded = [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=np.nan) for x in known.values()]
    return np.fmax.reduce(padded) if padded else np.zeros((0, 0), np.float32)


def _tensor(given: str, known: Mapping[str, np.ndarray], comparison: Comparison) -> str:
    """The tensor that is the result of a module, where that is what was given.

    Raises:
        ValueError: nothing by that name was judged.
    """
    modules = {comparison.module_of(name): name for name in known}
    path = given if given in modules else f"{comparison.text_path}.{given}"
    if given in known or path in modules:
        return modules.get(path, given)
    if not modules:
        raise ValueError(f"{given!r} was not judged, and nothing else was. {comparison.summary}")
    layers = [path for path in modules if ".layers." in path]
    span = [f"{layers[0]} to {layers[-1]}"] if len(layers) > 1 else layers
    listed = [*(path for path in modules if path not in layers)]
    listed[1:1] = span
    raise ValueError(f"{given!r} was not judged, expected one of {', '.join(listed)}.")
