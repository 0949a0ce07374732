"""Checkpoint tensors <-> parameters, as data with an inverse.

A family writes one table of ``Rule``; ``expand`` turns it, for a configuration and a pipeline stage, into one
``ParamSpec`` per parameter. Everything else reads those: load, reload, export, sharding, cross-backend comparison.
A tensor's place in a parameter is an index into leading stack axes, so reading that index is writing's inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
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
    @property
    def text_paths(self) -> tuple[str, ...]:
        """Module path of the text model, then the paths under which other exporters name the same tensors."""
        ...

    @property
    def is_multi_axis(self) -> bool:
        """Whether a position may be three numbers: time, height and width."""
        ...

    @property
    def num_mtp_layers(self) -> int:
        """Layers of the multi-token-prediction draft; 0: the family has none."""
        ...

    def dims(self) -> dict[str, Dim]: ...


def _always(config: Any, layer: int) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a family's table.

    ``tensor`` and ``into`` may hold ``{text}`` (the path of the text model), ``{layer}`` and ``{expert}``; ``dims``
    names the tensor's axes by the letters of ``config.dims()``. ``into`` is the parameter, by default of the tensor's
    own name. ``{expert}`` and ``shard_id`` stack tensors along new leading axes of it, in that order. ``on`` says which
    pipeline stages hold it; ``mtp`` tensors are held by a last stage that has the draft, and count its own layers. In a
    tied model the parameter of a rule with ``tied_to`` does not exist: a file that ships the tensor anyway is verified,
    never written.

    Rules of one parameter may differ in ``form``: exporters fuse experts or they do not, and a checkpoint has one form
    of each parameter. A fused tensor is the parameter itself with some axes merged; ``param_dims`` are those unmerged.
    ``zero_centred`` marks a norm whose weight w stands for 1 + w.
    """

    tensor: str
    dims: str
    into: str | None = None
    shard_id: int | None = None
    when: Callable[[Any, int], bool] = _always
    on: Literal["layer", "embedding", "head", "last", "mtp"] = "layer"
    tied_to: str | None = None
    form: str = ""
    param_dims: str | None = None
    zero_centred: bool = False

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
    tensor_shape: tuple[int, ...]  # of each of its checkpoint tensors; of a fused one with axes of ``shape`` merged


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
    rules: dict[str, Rule]  # checkpoint tensor -> its line of the table

    def __iter__(self) -> Iterator[ParamSpec]:
        return iter(self.params)

    def tensors(self) -> set[str]:
        """Every checkpoint tensor that belongs here, written or verified."""
        return {source.tensor for spec in self.params for source in spec.sources} | {tied.tensor for tied in self.tied}


def expand(
    rules: Sequence[Rule],
    config: ModelConfig,
    stage: Stage | None = None,
    found: Collection[str] = (),
    forms: Sequence[str] = (),
) -> Specs:
    """The parameters of ``stage`` (default: the whole model), in the table's order, layer by layer.

    Args:
        rules: a family's table.
        config: the configuration.
        stage: which part of the model.
        found: tensors of a checkpoint: they decide how sources are spelled and which form a parameter comes in. The
            parameters themselves never depend on it.
        forms: forms to take where ``found`` does not decide, best first; else the table's first.
    """
    stage = stage or Stage()
    dims = config.dims()
    text = config.text_paths[0]
    spelled = next((path for path in config.text_paths[1:] if any(name.startswith(f"{path}.") for name in found)), text)
    by_form: dict[str, dict[str, list[tuple[Rule, Source]]]] = {}
    tied: list[TiedSpec] = []
    rule_of: dict[str, Rule] = {}
    for rule in rules:
        if not _on_stage(rule, config, stage):
            continue
        for layer in _layers(rule, config, stage):
            if not rule.when(config, layer):
                continue
            if rule.tied_to is not None and config.tie_word_embeddings:
                tensor = rule.tensor.format(text=spelled)
                rule_of[tensor] = rule
                tied.append(TiedSpec(tensor, rule.tied_to.format(text=text), _shape(rule.dims, dims)))
                continue
            sources = by_form.setdefault(rule.parameter.format(text=text, layer=layer), {}).setdefault(rule.form, [])
            experts = range(dims["E"].size) if "{expert}" in rule.tensor else [None]
            for expert in experts:
                tensor = rule.tensor.format(text=spelled, layer=layer, expert=expert)
                sources.append((rule, Source(tensor, expert, rule.shard_id)))
    params: list[ParamSpec] = []
    ends: dict[str, str] = {}
    for name, candidates in by_form.items():
        chosen = _chosen(candidates, found, forms)
        params.append(_param(name, [source for _, source in chosen], chosen[0][0], dims))
        rule_of |= {source.tensor: rule for rule, source in chosen}
        ends.setdefault(chosen[0][0].on, name)
    embedding = ends.get("embedding")
    head = embedding if config.tie_word_embeddings else ends.get("head")
    origins = {letter: dim.origin for letter, dim in dims.items()}
    return Specs(tuple(params), tuple(tied), embedding, head, origins, rule_of)


def _layers(rule: Rule, config: ModelConfig, stage: Stage) -> Sequence[int]:
    if "{layer}" not in rule.tensor:
        return [0]
    return range(config.num_mtp_layers) if rule.on == "mtp" else stage.layers(config.num_hidden_layers)


def _chosen(
    candidates: dict[str, list[tuple[Rule, Source]]], found: Collection[str], forms: Sequence[str]
) -> list[tuple[Rule, Source]]:
    """The form that the checkpoint has something of; the others' tensors are then unexpected."""
    for sources in candidates.values():
        if any(source.tensor in found for _, source in sources):
            return sources
    return next((candidates[form] for form in forms if form in candidates), next(iter(candidates.values())))


def _on_stage(rule: Rule, config: ModelConfig, stage: Stage) -> bool:
    # a tied head reads the embedding, and so does a draft: the last stage holds a copy that every update refreshes
    holds_embedding = stage.is_first or (stage.is_last and (config.tie_word_embeddings or stage.mtp))
    return {
        "layer": True,
        "embedding": holds_embedding,
        "head": stage.is_last,
        "last": stage.is_last,
        "mtp": stage.is_last and stage.mtp,
    }[rule.on]


def _shape(letters: str, dims: dict[str, Dim]) -> tuple[int, ...]:
    return tuple(int(letter) if letter.isdigit() else dims[letter].size for letter in letters.split())


def _param(name: str, sources: list[Source], rule: Rule, dims: dict[str, Dim]) -> ParamSpec:
    stacks: list[str] = []
    if sources[0].expert_id is not None:
        stacks.append("E")
    if sources[0].shard_id is not None:
        stacks.append(str(1 + max(source.shard_id or 0 for source in sources)))
    axes = (*stacks, *(rule.param_dims or rule.dims).split())
    return ParamSpec(name, _shape(" ".join(axes), dims), axes, tuple(sources), _shape(rule.dims, dims))
