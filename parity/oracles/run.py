"""One pass of an oracle over one batch: what it reads from, what it was given, what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders import Checkpoint, CheckpointError, dtypes
from loaders.adapters.updates import Adapter
from loaders.config import RopeParameters
from parity.oracles.adapted import Adapted
from parity.oracles.fault import Fault
from parity.oracles.quantized import widened
from parity.oracles.rope import rotation
from parity.oracles.taps import Taps

if TYPE_CHECKING:
    from parity.oracles.vision import Sight

EXACT_IN_FLOAT64 = ("F64", "F32", "F16", "BF16")
Saw = Callable[[str, np.ndarray], None]  # a linear layer's name, and its input
HEAD_ROWS = 8192  # rows of the head widened at a time: all of V x D in float64 is four times the stored bf16


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint whose names begin with ``prefix``; called, one of them in float64.

    ``path``: what the models call that prefix, where the checkpoint spells it otherwise; for taps.
    """

    checkpoint: Checkpoint
    prefix: str = ""
    saw: Saw | None = None
    adapted: Adapted | None = None
    taps: Taps | None = None
    path: str = ""
    fault: Fault | None = None

    def __call__(self, name: str, *shape: int) -> np.ndarray:
        """The tensor in float64, every value exact; errors as ``stored``."""
        return self.stored(name, *shape).astype(np.float64)

    def matrix(self, name: str, rows: int, columns: int, x: np.ndarray | None = None) -> np.ndarray:
        """The weight of the linear layer ``name`` in float64, from the codes and scales if it is quantised.

        ``x``: its input, for whoever wants to see it.
        """
        if self.saw is not None and x is not None:
            self.saw(self.prefix + name, x)
        delta = None if self.adapted is None else self.adapted.delta(self.prefix + name)
        base = self._matrix(name, rows, columns)
        return base if delta is None else base + delta

    def _matrix(self, name: str, rows: int, columns: int) -> np.ndarray:
        found = None if self._whole(f"{name}.weight") is not None else widened(self.checkpoint, self.prefix + name)
        if found is None:
            return self(name + ".weight", rows, columns)
        if found.shape != (rows, columns):
            problem = f"the quantised weight of {self.prefix + name!r} is {found.shape}, expected {(rows, columns)}"
            raise CheckpointError(self.checkpoint.source, [f"{problem}. Is config.json from the same checkpoint?"])
        return self._faulty(self.prefix + name, found)

    def stored(self, name: str, *shape: int) -> np.ndarray:
        """The tensor as it is stored, ``shape`` being what config.json asks for; an adapter's, where it brings one.

        Raises:
            CheckpointError: it is missing, has another shape, or a dtype whose values mean nothing without scales.
        """
        whole = self._whole(name)
        name, source = self.prefix + name, self.checkpoint.source
        info = self.checkpoint.tensors.get(name)
        if whole is not None:  # rounded to what it replaces
            is_known = info is not None and info.dtype in EXACT_IN_FLOAT64
            return self._faulty(name, whole.astype(dtypes.to_numpy(info.dtype)) if info and is_known else whole)
        if info is None:
            raise CheckpointError(source, [f"tensor {name!r} is missing. Is config.json from the same checkpoint?"])
        if info.shape != shape:
            problem = f"tensor {name!r} has shape {info.shape}, expected {shape} ({info.file})"
            raise CheckpointError(source, [f"{problem}. Is config.json from the same checkpoint?"])
        if info.dtype not in EXACT_IN_FLOAT64:
            known = ", ".join(EXACT_IN_FLOAT64)
            raise CheckpointError(source, [f"tensor {name!r} is {info.dtype}; the oracle widens {known} only"])
        return self._faulty(name, self.checkpoint.read(name))

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor."""
        return self.prefix + name in self.checkpoint.tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor as it is stored; None: it is not there."""
        info = self.checkpoint.tensors.get(self.prefix + name)
        return None if info is None else info.shape

    def under(self, prefix: str) -> Weights:
        """The tensors whose names go on with ``prefix``."""
        return replace(self, prefix=self.prefix + prefix, path=self.path + prefix)

    def tap(self, name: str, value: np.ndarray) -> np.ndarray:
        """What is to be used for the result of step ``name``: itself, unless another was handed in."""
        return value if self.taps is None else self.taps(self.path + name, value)

    def _faulty(self, name: str, values: np.ndarray) -> np.ndarray:
        """As they are, or with the fault that is tried."""
        return values if self.fault is None else self.fault.applied(name, values)

    def _whole(self, name: str) -> np.ndarray | None:
        return None if self.adapted is None else self.adapted.whole(self.prefix + name)


@dataclass(frozen=True)
class Run:
    """A checkpoint and a batch, checked; ``out`` is what ``parity.oracle.oracle_forward`` returns."""

    checkpoint: Checkpoint
    config: Any
    ids_BT: np.ndarray
    mask_BT: np.ndarray
    positions: np.ndarray  # [B, T] or [3, B, T]
    replayed: Mapping[str, np.ndarray]
    shake: float = 0.0
    draw: int = 0
    shake_angles: float = 0.0
    saw: Saw | None = None
    sight: Sight | None = None  # what the prompt shows
    adapter: Adapter | None = None
    taps: Taps | None = None
    fault: Fault | None = None
    out: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        """Every tensor, by its whole name."""
        return Weights(self.checkpoint, saw=self.saw, adapted=self.adapted, taps=self.taps, fault=self.fault)

    @property
    def text(self) -> Weights:
        """The tensors of the text model, under whichever of its names they are stored."""
        spelled = (f"{path}." for path in self.config.text_paths)
        known = (path for path in spelled if f"{path}embed_tokens.weight" in self.checkpoint.tensors)
        path = f"{self.config.text_paths[0]}."
        return Weights(self.checkpoint, next(known, path), self.saw, self.adapted, self.taps, path, self.fault)

    @property
    def adapted(self) -> Adapted | None:
        """The adapter by the names of this checkpoint; None: there is none."""
        if self.adapter is None:
            return None
        bare = replace(self, adapter=None).text
        return Adapted(self.adapter, bare.prefix.removesuffix("."), self.config.text_paths[0])

    def embedding(self) -> np.ndarray:
        """The embedding that tokens are looked up in, [V, D]; as it is stored unless an adapter adds to it."""
        table_VD = self.text.stored("embed_tokens.weight", self.config.vocab_size, self.config.hidden_size)
        delta_VD = None if self.adapted is None else self.adapted.delta(f"{self.text.prefix}embed_tokens")
        return table_VD if delta_VD is None else table_VD.astype(np.float64) + delta_VD

    def embedded(self) -> np.ndarray:
        """What the first decoder layer takes, float64 [B, T, D]: embeddings, and what is shown in its places."""
        x_BTD = self.embedding()[self.ids_BT].astype(np.float64)
        return x_BTD if self.sight is None else self.sight.placed(x_BTD)

    def rotation(self, rope: RopeParameters, rotary_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine, float64 [B, T, R], by which heads turn; with an error of ``shake_angles``, if any."""
        return rotation(rope, rotary_dim, self.config.max_position_embeddings, self.positions, self.shake_angles)

    def deepened(self, x_BTD: np.ndarray, layer: int) -> np.ndarray:
        """The residual stream after a decoder layer, with what the vision tower adds to it."""
        return x_BTD if self.sight is None else self.sight.deepened(x_BTD, layer)

    def skipped(self, layer: int) -> np.ndarray | None:
        """The residual stream after a decoder layer that need not run; None: it must."""
        return None if self.taps is None else self.taps.skipped(f"{self.text.path}layers.{layer}")

    def residual(self, name: str, x_BTD: np.ndarray) -> np.ndarray:
        """Write down the residual stream and go on from it, with a relative error of ``shake`` if there is any."""
        self.out[name] = x_BTD
        layer = int(name.rpartition(".")[2])
        x_BTD = self.text.tap(f"layers.{layer - 1}" if layer else "embed_tokens", x_BTD)
        if not self.shake:
            return x_BTD
        rng = np.random.default_rng([self.draw, *name.encode()])
        return x_BTD * (1 + self.shake * rng.standard_normal(x_BTD.shape))

    def final(self, x_BTD: np.ndarray) -> np.ndarray:
        """Write down what the final norm says, and go on from it."""
        self.out["final_hidden_state"] = x_BTD
        return self.text.tap("norm", x_BTD)

    def head(self, x_BTD: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] by the head: in a tied model the embedding, without what an adapter adds to lookups."""
        logits_BTV = self._base_head(x_BTD)
        delta_VD = None if self.adapted is None else self.adapted.delta("lm_head")
        return logits_BTV if delta_VD is None else logits_BTV + x_BTD @ delta_VD.T

    def _base_head(self, x_BTD: np.ndarray) -> np.ndarray:
        sizes = self.config.vocab_size, self.config.hidden_size
        is_whole = self.adapted is not None and self.adapted.whole("lm_head.weight") is not None
        is_tied = self.config.tie_word_embeddings
        if not is_tied and not is_whole and (found_VD := widened(self.checkpoint, "lm_head")) is not None:
            return x_BTD @ (found_VD if self.fault is None else self.fault.applied("lm_head", found_VD)).T
        head_VD = replace(self, adapter=None).embedding() if is_tied else self.weights.stored("lm_head.weight", *sizes)
        if is_tied and is_whole:
            assert self.adapted is not None
            head_VD = np.asarray(self.adapted.whole("lm_head.weight")).astype(head_VD.dtype)
        parts = [head_VD[start : start + HEAD_ROWS] for start in range(0, len(head_VD), HEAD_ROWS)]
        return np.concatenate([x_BTD @ part.astype(np.float64).T for part in parts], axis=-1)

    def route(self, name: str, logits_BTE: np.ndarray, experts_BTX: np.ndarray) -> None:
        """Write down what the router of one layer chose; ``name`` is ``routing.i``."""
        self.out[name.replace("routing", "router_logits")] = logits_BTE
        self.out[name] = experts_BTX.astype(np.int32)
