"""Few layers that stand for many: what a program costs is linear in how often a pattern of layers repeats.

A compiler takes minutes over a hundred unrolled layers, and every repetition of them is compiled alike. So two shallow
programs are compiled, one with some repetitions more, and the rest is their difference. What is not alike (leading
dense layers, a pattern cut short at the end) is in both.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from loaders.spec import ModelConfig
from loaders.stage import Stage
from parity.planning.meshes import specs_for

LEAST_LAYERS = 4  # in the shallower program: the first and the last few are not like the others


@dataclass(frozen=True, slots=True)
class Shallow(Stage):
    """The whole model, but for decoder layers from ``depth`` on."""

    depth: int = 1

    def layers(self, num_hidden_layers: int) -> range:
        """The first of them."""
        return range(min(self.depth, num_hidden_layers))


@dataclass(frozen=True, slots=True)
class Depths:
    """Which depths to compile, and how often the second has what the first has not before the model is complete.

    ``weight``: value(model) = value(shallow) + weight * (value(deeper) - value(shallow)); 0: the first is the model.
    """

    shallow: int
    deeper: int
    weight: float


def depths_of(config: ModelConfig, *, is_exact: bool = False) -> Depths:
    """Depths whose layers are the model's, in its proportions."""
    count = config.num_hidden_layers
    kinds = layer_kinds(config)
    start, period = pattern(kinds)
    rest = start + (count - start) % period
    first = rest + -(-max(LEAST_LAYERS - rest, 1) // period) * period
    second = first + -(-LEAST_LAYERS // period) * period
    if is_exact or second >= count:
        return Depths(count, count, 0.0)
    return Depths(first, second, (count - first) / (second - first))


def layer_kinds(config: ModelConfig) -> list[Hashable]:
    """What each decoder layer is made of: equal where two compile alike."""
    path = f"{config.text_paths[0]}.layers."
    found: list[list[Hashable]] = [[] for _ in range(config.num_hidden_layers)]
    for spec in specs_for(config, Stage()):
        if spec.name.startswith(path):
            layer, _, leaf = spec.name.removeprefix(path).partition(".")
            found[int(layer)].append((leaf, spec.shape, spec.dtype))
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
