"""Few layers that stand for many: every repetition of a pattern of layers costs what those before it do.

A compiler takes minutes over a hundred unrolled layers, and compiles repetitions of them alike, but for the last few:
where no more weights are to be fetched ahead, other things lie in VMEM, and what was changed there is written back
(three or four caches of Qwen3-8B on four v5e, whether it had 8 layers or 36, before ``jax_models.compiling``). So a
program deep enough to have layers before that is compiled, and those are what the missing ones cost. Memory grows with
depth as a whole: a line through it and a shallower program.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loaders.spec import ModelConfig
from loaders.stage import Stage
from parity.planning.meshes import specs_for

LEAST_LAYERS = 4  # in the shallower program
MORE_LAYERS = 12  # in the deeper one
LAST_LAYERS = 8  # of the deeper one, compiled unlike those before


@dataclass(frozen=True, slots=True)
class Shallow(Stage):
    """The whole model, but for decoder layers from ``depth`` on."""

    depth: int = 1

    def layers(self, num_hidden_layers: int) -> range:
        """The first of them."""
        return range(min(self.depth, num_hidden_layers))


@dataclass(frozen=True, slots=True)
class Depths:
    """Which depths to compile, and what of them stands for the layers that are in neither.

    Attributes:
        shallow: layers of the first program.
        deeper: of the second; the same: it is the whole model.
        count: of the model.
        period: layers after which kinds of them repeat.
        typical: layers of the second program, some repetitions, that cost what missing ones do.
    """

    shallow: int
    deeper: int
    count: int
    period: int
    typical: range

    @property
    def is_exact(self) -> bool:
        """Nothing is missing."""
        return self.deeper == self.count

    @property
    def weight(self) -> float:
        """value(model) = value(shallow) + weight * (value(deeper) - value(shallow)), of what grows as a line."""
        return 1.0 if self.is_exact else (self.count - self.shallow) / (self.deeper - self.shallow)

    @property
    def missing(self) -> int:
        """Repetitions that the model has more than the second program."""
        return (self.count - self.deeper) // self.period

    @property
    def repetitions(self) -> list[range]:
        """Those of ``typical``."""
        starts = range(self.typical.start, self.typical.stop, self.period)
        return [range(start, start + self.period) for start in starts]


def depths_of(config: ModelConfig, stored: Mapping[str, str] | None = None, *, is_exact: bool = False) -> Depths:
    """Depths whose layers are the model's, in its proportions.

    ``stored``: dtypes of weights that are not stored as most are, by parameter.
    """
    count = config.num_hidden_layers
    start, period = pattern(layer_kinds(config, stored or {}))
    rest = start + (count - start) % period
    first = rest + -(-max(LEAST_LAYERS - rest, 1) // period) * period
    second = first + -(-MORE_LAYERS // period) * period
    if is_exact or second >= count:
        return Depths(count, count, count, period, range(0))
    stop = second - LAST_LAYERS
    return Depths(first, second, count, period, range(stop - (stop - max(start, 1)) // period * period, stop))


def layer_kinds(config: ModelConfig, stored: Mapping[str, str]) -> list[Hashable]:
    """What each decoder layer is made of: equal where two compile alike."""
    path = f"{config.text_paths[0]}.layers."
    found: list[list[Hashable]] = [[] for _ in range(config.num_hidden_layers)]
    for spec in specs_for(config, Stage()):
        if spec.name.startswith(path):
            layer, _, leaf = spec.name.removeprefix(path).partition(".")
            found[int(layer)].append((leaf, spec.shape, spec.dtype or stored.get(spec.name)))
    attention: Any = config
    return [(*parts, attention.window(layer), attention.rope(layer)) for layer, parts in enumerate(found)]


def pattern(kinds: Sequence[Hashable]) -> tuple[int, int]:
    """Where a repeating pattern begins, and its length: as few layers as can be in both together."""
    count = len(kinds)
    best = (0, count)
    for period in range(1, count):
        start = count - period
        while start > 0 and kinds[start - 1] == kinds[start - 1 + period]:
            start -= 1
        if start + period < sum(best):
            best = (start, period)
    return best
