"""Where a model can be adapted: its linear layers, embedding, head, routers and experts, from the family's table."""

from __future__ import annotations

import dataclasses
import os.path
from dataclasses import dataclass
from typing import Any, Literal

from loaders.reading.plan import specs_of
from loaders.spec import ModelConfig, ParamSpec, Rule
from loaders.stage import Stage

HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Site:
    """One module that a low-rank update may be of.

    ``path`` is the module's, of experts the parameter's. ``shape`` is [out, in] of one matrix, ``lead`` the axes of
    experts and parts before it. ``parameter`` is where the weight lives: a tied head's is the embedding.
    """

    path: str
    kind: Literal["linear", "router", "embedding", "experts"]
    shape: tuple[int, int]
    lead: tuple[int, ...]
    parameter: str
    is_head: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether ``all-linear`` names it: not an embedding, a head or a router."""
        return self.kind == "linear" and not self.is_head

    @property
    def module(self) -> str:
        """The layer that has the weight: a tied head's is the embedding."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Sites:
    """All sites of a model by path, and the shape of every tensor that an adapter may replace, by name."""

    low_rank: dict[str, Site]
    whole: dict[str, tuple[int, ...]]
    params: dict[str, ParamSpec]  # all parameters, as if nothing were quantised
    tied: dict[str, str]  # tensor of a tied head -> the parameter it is
    tower: str  # path of the vision tower, which cannot be adapted; empty: there is none
    tower_modules: frozenset[str]  # paths of its modules

    def layer(self, module: str) -> str:
        """The layer that stands for a module: the embedding for a tied head."""
        return self.tied.get(f"{module}.weight", f"{module}.weight").rpartition(".")[0]

    def of_module(self, module: str) -> dict[str, str]:
        """Parameters of a module that an adapter may replace: leaf -> name of the tensor."""
        names = [name for name in self.whole if name.rpartition(".")[0] == module]
        return {name.rpartition(".")[2]: name for name in names}

    def parameter(self, tensor: str) -> ParamSpec:
        """The parameter that a tensor stands for."""
        return self.params[self.tied.get(tensor, tensor)]


def sites_of(config: ModelConfig) -> Sites:
    """The sites of the whole model, whatever is quantised and however it is spread over stages."""
    specs = specs_of(_unquantized(config), Stage())
    found: dict[str, Site] = {}
    whole: dict[str, tuple[int, ...]] = {}
    visual: list[str] = []
    for spec in specs:
        rule = specs.rules[spec.placements[0].tensor]
        if rule.is_visual:
            visual.append(spec.name)
        if rule.on not in ("layer", "embedding", "head", "last"):
            continue
        if site := _site(spec, rule):
            found[site.path] = site
        if spec.axes[:1] != ("E",) or rule.is_router:
            whole[spec.name] = spec.shape
    owners = [name.rpartition(".")[0] for name in whole]
    for name, owner in zip(list(whole), owners, strict=True):
        if any(other.startswith(f"{owner}.") for other in owners):
            del whole[name]  # of a module that has others in it: it cannot be run with another tensor of its own
    for tied in specs.tied:
        path = tied.tensor.removesuffix(".weight")
        found[path] = Site(path, "linear", (tied.shape[0], tied.shape[1]), (), tied.same_as, is_head=True)
        whole[tied.tensor] = tied.shape
    tied = {one.tensor: one.same_as for one in specs.tied}
    tower = os.path.commonprefix(visual).rpartition(".")[0]
    modules = frozenset(name.rpartition(".")[0] for name in visual)
    return Sites(found, whole, {spec.name: spec for spec in specs}, tied, tower, modules)


def _unquantized(config: Any) -> ModelConfig:
    return dataclasses.replace(config, quantization=None)


def _site(spec: ParamSpec, rule: Rule) -> Site | None:
    """The site of a parameter; None where no low-rank update is possible."""
    if spec.axes[:1] == ("E",) and len(spec.axes) > 2:
        return Site(spec.name, "experts", (spec.shape[-2], spec.shape[-1]), spec.shape[:-2], spec.name)
    path, _, leaf = spec.name.rpartition(".")
    if leaf != "weight" or len(spec.shape) != 2:
        return None
    if rule.is_router:
        return Site(path, "router", (spec.shape[0], spec.shape[1]), (), spec.name)
    if rule.on == "embedding":
        return Site(path, "embedding", (spec.shape[1], spec.shape[0]), (), spec.name)  # [D, V]: B is [D, r], A [r, V]
    return Site(path, "linear", (spec.shape[0], spec.shape[1]), (), spec.name, is_head=rule.on == "head")
