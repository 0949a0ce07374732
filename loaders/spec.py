"""Checkpoint tensors <-> parameters, as data with an inverse.

A family writes one table of ``Rule``; ``expand`` turns it, for a configuration and a pipeline stage, into one
``ParamSpec`` per parameter. Everything else reads those: load, reload, export, sharding, cross-backend comparison.
A tensor's place in a parameter is an index into leading stack axes, so reading that index is writing's inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from loaders.stage import Stage


@dataclass(frozen=True, slots=True)
class Dim:
    """Size of a named axis, where it comes from (for errors), and in how many whole units it may be cut."""

    size: int
    origin: str
    units: int | None = None  # heads of a [N*H] axis; None: any divisor of the size will do


class ModelConfig(Protocol):
    """What shared code may ask of any family's configuration."""

    @property
    def architecture(self) -> str: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def eos_token_id(self) -> tuple[int, ...]: ...
    @property
    def pad_token_id(self) -> int | None: ...
    def dims(self) -> dict[str, Dim]: ...


def _always(config: Any, layer: int) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a family's table.

    ``tensor`` and ``into`` may hold ``{layer}`` and ``{expert}``; ``dims`` names the tensor's axes by the letters of
    ``config.dims()``. ``into`` is the parameter, by default of the tensor's own name. ``{expert}`` and ``shard_id``
    stack tensors along new leading axes of it, in that order. ``on`` says which pipeline stages hold it. In a tied
    model the parameter of a rule with ``tied_to`` does not exist: a file that ships the tensor anyway is verified,
    never written.
    """

    tensor: str
    dims: str
    into: str | None = None
    shard_id: int | None = None
    when: Callable[[Any, int], bool] = _always
    on: Literal["layer", "embedding", "head", "last"] = "layer"
    tied_to: str | None = None

    @property
    def parameter(self) -> str:
        return self.into or self.tensor


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint tensor and its place in a parameter: ``parameter[index]``."""

    tensor: str
    expert_id: int | None = None
    shard_id: int | None = None

    @property
    def index(self) -> tuple[int, ...]:
        return tuple(i for i in (self.expert_id, self.shard_id) if i is not None)


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter: its name, axes and the checkpoint tensors it is made of.

    ``axes`` are the letters of ``config.dims()``, stack axes first: ``E`` for experts, ``2`` (a number) for shards.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    sources: tuple[Source, ...]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each of its checkpoint tensors."""
        return self.shape[len(self.sources[0].index) :]


@dataclass(frozen=True, slots=True)
class TiedSpec:
    """A tensor that a tied checkpoint may ship although its parameter is another one's alias."""

    tensor: str
    same_as: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Specs:
    """What one pipeline stage holds."""

    params: tuple[ParamSpec, ...]
    tied: tuple[TiedSpec, ...]
    embedding: str | None  # the parameter that holds it; None: another stage's
    head: str | None  # in a tied model the embedding's
    origins: dict[str, str]  # axis letter -> which config keys fix its size

    def __iter__(self) -> Iterator[ParamSpec]:
        return iter(self.params)

    def tensors(self) -> set[str]:
        """Every checkpoint tensor that belongs here, written or verified."""
        return {source.tensor for spec in self.params for source in spec.sources} | {tied.tensor for tied in self.tied}


def expand(rules: Sequence[Rule], config: ModelConfig, stage: Stage | None = None) -> Specs:
    """The parameters of ``stage`` (default: the whole model), in the table's order, layer by layer."""
    stage = stage or Stage()
    dims = config.dims()
    layers = list(stage.layers(config.num_hidden_layers))
    sources: dict[str, list[Source]] = {}
    rule_of: dict[str, Rule] = {}
    tied: list[TiedSpec] = []
    for rule in rules:
        if not _on_stage(rule, config, stage):
            continue
        for layer in layers if "{layer}" in rule.tensor else [0]:
            if not rule.when(config, layer):
                continue
            if rule.tied_to is not None and config.tie_word_embeddings:
                tied.append(TiedSpec(rule.tensor, rule.tied_to, _shape(rule, dims)))
                continue
            name = rule.parameter.format(layer=layer)
            rule_of[name] = rule
            experts = range(dims["E"].size) if "{expert}" in rule.tensor else [None]
            sources.setdefault(name, []).extend(
                Source(rule.tensor.format(layer=layer, expert=expert), expert, rule.shard_id) for expert in experts
            )
    params = tuple(_param(name, found, rule_of[name], dims) for name, found in sources.items())
    embedding = next((rule.parameter for rule in rule_of.values() if rule.on == "embedding"), None)
    head = (
        embedding
        if config.tie_word_embeddings
        else next((rule.parameter for rule in rule_of.values() if rule.on == "head"), None)
    )
    return Specs(params, tuple(tied), embedding, head, {letter: dim.origin for letter, dim in dims.items()})


def _on_stage(rule: Rule, config: ModelConfig, stage: Stage) -> bool:
    # a tied head reads the embedding, so the last stage of a tied model holds it too
    holds_embedding = stage.is_first or (stage.is_last and config.tie_word_embeddings)
    return {"layer": True, "embedding": holds_embedding, "head": stage.is_last, "last": stage.is_last}[rule.on]


def _shape(rule: Rule, dims: dict[str, Dim]) -> tuple[int, ...]:
    return tuple(dims[letter].size for letter in rule.dims.split())


def _param(name: str, sources: list[Source], rule: Rule, dims: dict[str, Dim]) -> ParamSpec:
    axes: list[str] = []
    if sources[0].expert_id is not None:
        axes.append("E")
    if sources[0].shard_id is not None:
        axes.append(str(1 + max(source.shard_id or 0 for source in sources)))
    axes += rule.dims.split()
    shape = tuple(int(axis) if axis.isdigit() else dims[axis].size for axis in axes)
    return ParamSpec(name, shape, tuple(axes), tuple(sources))
