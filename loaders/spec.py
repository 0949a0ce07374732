"""Checkpoint tensors <-> parameters, as data with an inverse.

A family writes one table of ``Rule``; ``loaders.expand`` turns it, for a configuration and a pipeline stage, into one
``ParamSpec`` per parameter. Everything else reads those: load, reload, export, sharding, cross-backend comparison.
A tensor's place in a parameter is an index into leading stack axes, so reading that index is writing's inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from loaders.quantization.schemes import BLOCK, Quantization, Scheme

if TYPE_CHECKING:
    from loaders.vision import VisionConfig


@dataclass(frozen=True, slots=True)
class Dim:
    """Size of a named axis, where it comes from (for errors), and in how many whole units it may be cut."""

    size: int
    origin: str
    units: int | None = None  # heads of a [N*H] axis; None: any divisor of the size will do
    segments: tuple[Dim, ...] = ()  # what lies one after the other along it; none: it is one thing


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
    def max_position_embeddings(self) -> int: ...
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
    def is_recurrent(self) -> bool:
        """Whether a layer keeps a state that a prompt changes chunk by chunk, rather than its keys and values."""
        ...

    @property
    def needs_whole_rows(self) -> bool:
        """Whether masking a token differs from leaving it out: a window counts it, a recurrent state steps over it."""
        ...

    @property
    def num_mtp_layers(self) -> int:
        """Layers of the multi-token-prediction draft; 0: the family has none."""
        ...

    @property
    def vision(self) -> VisionConfig | None:
        """The vision tower; None: the model reads text alone."""
        ...

    @property
    def quantization(self) -> Quantization | None:
        """How the checkpoint's modules are quantised; None: they are not."""
        ...

    def dims(self) -> dict[str, Dim]: ...


def dim_of(axis: str, dims: dict[str, Dim]) -> Dim:
    """An axis by its letter. ``D/16`` are the blocks of D, ``D/2`` its bytes of codes: both are cut between blocks."""
    if axis.isdigit():
        return Dim(int(axis), axis)
    letter, _, parts = axis.partition("/")
    dim = dims[letter]
    if not parts:
        return dim
    blocks = dim.size // BLOCK
    is_whole = dim.units is not None and dim.size % (dim.units * BLOCK) == 0  # a head is so many blocks
    units = blocks if dim.units is None else dim.units if is_whole else 1
    return Dim(dim.size // int(parts), dim.origin, units)


def shape_of(axes: str, dims: dict[str, Dim]) -> tuple[int, ...]:
    """Sizes of axes written as in a rule, ``"E 2 M D/16"``."""
    return tuple(dim_of(axis, dims).size for axis in axes.split())


Form = Literal["fused", "fused transposed", "per expert"]  # how an exporter writes the experts of a layer


def always(config: Any, layer: int) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a family's table.

    ``tensor`` and ``into`` may hold ``{text}`` (the path of the text model), ``{layer}`` and ``{expert}``; ``dims``
    names the tensor's axes by the letters of ``config.dims()``. ``into`` is the parameter, by default of the tensor's
    own name. ``{expert}`` and ``shard_id`` stack tensors along new leading axes of it, in that order. ``on`` says which
    pipeline stages hold it; ``mtp`` tensors are held by a last stage that has the draft, and count its own layers;
    ``visual`` tensors by a first stage that has the vision tower, and count its blocks, ``deepstack`` ones its levels.
    In a tied model the parameter of a rule with ``tied_to`` does not exist: a file that ships the tensor anyway is
    verified, never written.

    Rules of one parameter may differ in ``form``: exporters fuse experts or they do not, and a checkpoint has one form
    of each parameter. A fused tensor is the parameter itself with some axes merged; ``param_dims`` are those unmerged.
    Of a fused transposed one the last two axes are the other way round as well: inputs first.
    ``zero_centred`` marks a norm whose weight w stands for 1 + w, ``is_router`` a matrix that no exporter quantises,
    ``is_gate`` one so small that recipes leave it alone, ``is_table`` one whose rows are looked up. ``dtype`` is the
    one safetensors dtype it may have; None: any float.
    """

    tensor: str
    dims: str
    into: str | None = None
    shard_id: int | None = None
    when: Callable[[Any, int], bool] = always
    on: Literal["layer", "embedding", "head", "last", "mtp", "visual", "deepstack"] = "layer"
    tied_to: str | None = None
    form: Form | Literal[""] = ""
    param_dims: str | None = None
    zero_centred: bool = False
    is_router: bool = False
    is_gate: bool = False
    is_table: bool = False
    dtype: str | None = None

    @property
    def parameter(self) -> str:
        return self.into or self.tensor

    @property
    def is_fused(self) -> bool:
        """Whether its tensor holds all the experts of a layer."""
        return self.form in ("fused", "fused transposed")

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix of a linear layer or of an expert, which exporters may quantise."""
        is_matrix = self.tensor.endswith(".weight") and len(self.dims.split()) == 2
        return is_matrix and self.on != "embedding" and not self.is_router and not self.is_table

    @property
    def is_visual(self) -> bool:
        """Whether it belongs to the vision tower."""
        return self.on in ("visual", "deepstack")

    def count(self, config: ModelConfig) -> int:
        """How many there are of what ``{layer}`` numbers: decoder layers, the draft's, the tower's blocks or levels."""
        if self.on == "mtp":
            return config.num_mtp_layers
        if not self.is_visual:
            return config.num_hidden_layers
        tower = config.vision
        return 0 if tower is None else tower.depth if self.on == "visual" else len(tower.deepstack_visual_indexes)


@dataclass(frozen=True, slots=True)
class Placement:
    """A checkpoint tensor and its place in a parameter: ``parameter[index]``."""

    tensor: str
    expert_id: int | None = None
    shard_id: int | None = None

    @property
    def index(self) -> tuple[int, ...]:
        first = () if self.expert_id is None else (self.expert_id,)
        return first if self.shard_id is None else (*first, self.shard_id)


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter: its name, axes and the checkpoint tensors it is made of.

    ``axes`` are the letters of ``config.dims()``, stack axes first: ``E`` for experts, ``2`` (a number) for shards.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    placements: tuple[Placement, ...]
    tensor_shape: tuple[int, ...]  # of each of its checkpoint tensors; of a fused one with axes of ``shape`` merged
    dtype: str | None = None  # the one safetensors dtype it may have; None: any float
    is_transposed: bool = False  # the last two axes of its tensor are the other way round


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
    schemes: dict[str, Scheme]  # module path -> how it is quantised; others are not
    rivals: dict[str, tuple[str, Placement]]  # tensors of forms the checkpoint does not have -> parameter, place

    def __iter__(self) -> Iterator[ParamSpec]:
        return iter(self.params)

    def tensors(self) -> set[str]:
        """Every checkpoint tensor that belongs here, written or verified."""
        placed = {placement.tensor for spec in self.params for placement in spec.placements}
        return placed | {tied.tensor for tied in self.tied}
