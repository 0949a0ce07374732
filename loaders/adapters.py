"""LoRA adapters in PEFT's format: opened, checked against a model, and read whole, before anything changes.

    delta = scaling * B @ A                      added to a weight [out, in]; of an embedding to its transpose
    scaling = alpha / r, or alpha / sqrt(r)      with the ranks and alphas of the module's patterns

Values are widened to float32, exactly. Source: peft 0.21; checked against PEFT itself in tests/parity/test_lora.py.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from loaders.adapter_config import AdapterConfig, read_adapter_config
from loaders.adapter_files import AdapterFiles, open_adapter_files
from loaders.adapter_keys import Key, Nested, parse_key
from loaders.adapter_sites import Site, Sites, sites_of
from loaders.digest import root_digest, tensor_digest
from loaders.errors import CheckpointError
from loaders.plan import FLOATS
from loaders.spec import ModelConfig

ReadBase = Callable[[str], np.ndarray]
_ROWS = 8192  # compared at once


@dataclass(frozen=True)
class LowRank:
    """One update: ``a`` [..., r, in] and ``b`` [..., out, r] float32, of experts with axes of experts and parts before.

    Of an embedding ``in`` is the vocabulary and ``out`` the model's width.
    """

    site: Site
    a: np.ndarray
    b: np.ndarray
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def delta(self, rows: slice = slice(None)) -> np.ndarray:
        """Rows of scaling * B @ A, float32 [..., out, in]."""
        return np.float32(self.scaling) * (self.b[..., rows, :] @ self.a)


@dataclass(frozen=True)
class Adapter:
    """One adapter, all of it on the host.

    Attributes:
        source: where it was read from.
        low_rank: by site, see ``loaders.adapter_sites``.
        whole: tensors that replace the model's own, by name, in the dtypes they were saved in.
        left_out: the base's own tensors that PEFT writes beside an adapted embedding; they were found equal.
        digest: of everything it computes with.
    """

    source: str
    low_rank: dict[str, LowRank]
    whole: dict[str, np.ndarray]
    left_out: tuple[str, ...] = ()
    digest: str = field(default="", compare=False)

    @property
    def rank(self) -> int:
        """The largest of its ranks; 0: it replaces tensors only."""
        return max((update.rank for update in self.low_rank.values()), default=0)

    @functools.cached_property
    def is_nothing(self) -> bool:
        """Whether it changes no output: every update has a half of zeros, as adapters begin."""
        return not self.whole and not any(one.a.any() and one.b.any() for one in self.low_rank.values())


def open_adapter(uri: str | os.PathLike[str], config: ModelConfig, *, read_base: ReadBase | None = None) -> Adapter:
    """Open an adapter directory and check all of it against a model.

    Args:
        uri: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        config: of the model it is for.
        read_base: a parameter of that model by name, on the host. PEFT writes the base's embedding beside an adapted
            one, and loads it over the base's: it must be the same. None: it is left out unseen.
    Raises:
        CheckpointError: listing options that are not implemented, tensors that are missing, unexpected or of the wrong
            shape or dtype, halves without the other, ranks that are not what the config says, values that are no
            numbers, and base tensors that differ.
    """
    files, problems = open_adapter_files(uri)
    adapter_config, found = read_adapter_config(files.document) if files.document is not None else (None, [])
    problems += found
    if adapter_config is None or problems:
        raise CheckpointError(uri, problems)
    reading = _Reading(files, adapter_config, sites_of(config), config, read_base)
    adapter = reading.adapter()
    if reading.problems:
        raise CheckpointError(uri, reading.problems)
    return adapter


class _Reading:
    """One adapter being matched; every problem is kept."""

    def __init__(
        self,
        files: AdapterFiles,
        config: AdapterConfig,
        sites: Sites,
        model: ModelConfig,
        read_base: ReadBase | None,
    ) -> None:
        self.files, self.config, self.sites, self.read_base = files, config, sites, read_base
        self.problems: list[str] = []
        self.text = model.text_paths[0]
        keys = {name: parse_key(name, model.text_paths) for name in files.tensors}
        self.problems += [
            f"tensor {name!r} is unexpected: it is no name that PEFT gives" for name, key in keys.items() if key is None
        ]
        self.keys: dict[str, Key] = {name: key for name, key in keys.items() if key is not None}
        self.spelled = next((key.spelled for key in self.keys.values() if key.spelled), self.text)
        self.taken: set[str] = set()

    def adapter(self) -> Adapter:
        low_rank = {path: update for path, site in self.sites.low_rank.items() if (update := self._low_rank(site))}
        whole = self._whole()
        left_out = self._left_out()
        self._unnamed()
        self._unclaimed()
        if not self.problems and not low_rank and not whole:
            self.problems.append("it changes nothing: no tensor of it is an update")
        arrays = {
            f"{path}.{half}": value for path, one in low_rank.items() for half, value in (("a", one.a), ("b", one.b))
        }
        digests = {name: tensor_digest(array) for name, array in (arrays | whole).items()}
        digests |= {f"{path}.scaling": str(one.scaling) for path, one in low_rank.items()}
        return Adapter(str(self.files.source), low_rank, whole, left_out, root_digest(digests))

    def _spell(self, name: str) -> str:
        """A name of ours as the adapter's model has it."""
        prefix = f"{self.text}."
        return f"{self.spelled}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name

    def _low_rank(self, site: Site) -> LowRank | None:
        if site.kind == "experts":
            return self._fused_experts(site) or self._single_experts(site)
        name = self._spell(site.path)
        is_wanted = self.config.targets(name, is_table=site.is_table)
        is_wanted |= site.kind == "linear" and self.config.targets_parameter(f"{name}.weight")
        if not is_wanted:
            return None
        halves = self._halves(Nested(site.path), site.kind == "embedding")
        if halves is None:
            return None
        out, inner = site.shape
        rank = self.config.rank(name)
        a, b = self._read(halves[0], (rank, inner), "r"), self._read(halves[1], (out, rank), "r")
        return None if a is None or b is None else LowRank(site, a, b, self.config.scaling(name))

    def _fused_experts(self, site: Site) -> LowRank | None:
        """An update of a stack as transformers has it, [E, parts * out, in], by ``target_parameters``."""
        module, _, leaf = site.path.rpartition(".")
        stacks = [path for path in self.sites.low_rank if path.rpartition(".")[0] == module]
        named = [path for path in stacks if self.config.targets_parameter(self._spell(path))]
        if site.path not in named:
            return None
        level = len(named) - 1 - named.index(site.path)  # PEFT wraps in this order, so the last is the outermost
        halves = self._halves(Nested(module, level), False)
        if halves is None:
            return None
        name = self._spell(site.path)
        rank, (out, inner), E = self.config.rank(name), site.shape, site.lead[0]
        parts = int(np.prod(site.lead[1:]))
        a = self._read(halves[0], (rank * E, inner), f"r * num_experts of {leaf}")
        b = self._read(halves[1], (parts * out, rank * E), f"r * num_experts of {leaf}")
        if a is None or b is None:
            return None
        a, b = a.reshape(E, rank, inner), b.reshape(parts, out, rank, E).transpose(3, 0, 1, 2)
        if len(site.lead) == 1:
            return LowRank(site, a, np.ascontiguousarray(b[:, 0]), self.config.scaling(name))
        shared = np.ascontiguousarray(np.broadcast_to(a[:, None], (*site.lead, rank, inner)))
        return LowRank(site, shared, np.ascontiguousarray(b), self.config.scaling(name))

    def _single_experts(self, site: Site) -> LowRank | None:
        """Updates of experts one by one, as transformers had them before it fused them."""
        module, _, leaf = site.path.rpartition(".")
        names = ("gate_proj", "up_proj") if len(site.lead) == 2 else (leaf,)
        places = {
            (expert, part)[: len(site.lead)]: f"{module}.{expert}.{name}"
            for expert in range(site.lead[0])
            for part, name in enumerate(names)
        }
        present = {place: path for place, path in places.items() if self._has(Nested(path))}
        if not present:
            return None
        wanted = {place: path for place, path in places.items() if self.config.targets(self._spell(path))}
        rank = max((self.config.rank(self._spell(path)) for path in wanted.values()), default=1)
        out, inner = site.shape
        a, b = np.zeros((*site.lead, rank, inner), np.float32), np.zeros((*site.lead, out, rank), np.float32)
        for place, path in wanted.items():
            halves = self._halves(Nested(path), False)
            name = self._spell(path)
            r = self.config.rank(name)
            a_half = self._read(halves[0], (r, inner), "r") if halves else None
            b_half = self._read(halves[1], (out, r), "r") if halves else None
            if a_half is not None and b_half is not None:
                a[place][:r], b[place][:, :r] = a_half, np.float32(self.config.scaling(name)) * b_half
        return LowRank(site, a, b, 1.0)

    def _has(self, place: Nested) -> bool:
        return any(key.place == place and key.half for key in self.keys.values())

    def _halves(self, place: Nested, is_embedding: bool) -> tuple[str, str] | None:
        """Names of A and B of a target; None when one or both are not there."""
        halves = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
        found = {key.half: name for name, key in self.keys.items() if key.place == place and key.half in halves}
        if len(found) == 2:
            return found[halves[0]], found[halves[1]]
        nested = ".base_layer" * place.level
        if found:
            (half, name), missing = next(iter(found.items())), next(iter(set(halves) - set(found)))
            self.taken.add(name)
            self.problems.append(f"{missing} of {place.path + nested!r} is missing, {half} is there. Save it whole.")
        else:
            self.problems.append(f"{halves[0]} and {halves[1]} of {place.path + nested!r}, a target, are missing")
        return None

    def _read(self, name: str, shape: tuple[int, ...], what: str) -> np.ndarray | None:
        """A tensor in float32; None when it is not what it must be."""
        self.taken.add(name)
        info = self.files.tensors[name]
        before = len(self.problems)
        if info.shape != shape:
            trained = (
                f"trained on {self.config.base_model_name_or_path!r}, " if self.config.base_model_name_or_path else ""
            )
            self.problems.append(
                f"tensor {name!r} has shape {info.shape}, expected {shape} from {what} and the model's sizes."
                f" The adapter was {trained}which may be another model."
            )
        if info.dtype not in FLOATS:
            self.problems.append(f"tensor {name!r} is {info.dtype}, expected one of {', '.join(FLOATS)}")
        if len(self.problems) > before:
            return None
        value = self.files.read(name)
        if not np.isfinite(value.astype(np.float32)).all():
            self.problems.append(f"tensor {name!r} holds values that are not finite")
        return value.astype(np.float32)

    def _whole(self) -> dict[str, np.ndarray]:
        """Tensors of ``modules_to_save``."""
        found: dict[str, np.ndarray] = {}
        by_path = {key.place.path: name for name, key in self.keys.items() if not key.half and not key.place.level}
        for tensor, shape in self.sites.whole.items():
            if not self.config.saves(self._spell(tensor)):
                continue
            name = by_path.get(tensor)
            if name is None:
                self.problems.append(f"tensor {tensor!r} is missing: modules_to_save names its module")
            elif self._read(name, shape, "the model's sizes") is not None:
                found[tensor] = self.files.read(name)
        return found

    def _left_out(self) -> tuple[str, ...]:
        """The base's own tensors, written beside an update."""
        found = []
        for name, key in self.keys.items():
            site = self.sites.low_rank.get(key.place.path.removesuffix(".weight"))
            if name in self.taken or key.half or site is None or site.kind == "experts":
                continue
            self.taken.add(name)
            found.append(name)
            info, rows = self.files.tensors[name], self.sites.whole[key.place.path]
            if info.shape != rows or info.dtype not in FLOATS:
                self.problems.append(f"tensor {name!r} is {info.dtype} {info.shape}, expected the base's own {rows}")
            elif self.read_base is not None and not _equal(self.files.read(name), self.read_base(site.parameter)):
                self.problems.append(
                    f"tensor {name!r} differs from the model's {site.parameter!r}, which it was written beside: the"
                    f" adapter is of another base, {self.config.base_model_name_or_path!r}"
                )
        return tuple(found)

    def _unnamed(self) -> None:
        """Names in the config that no module has."""
        modules = [self._spell(path) for path in self.sites.low_rank]
        modules += [self._spell(path.rpartition(".")[0]) for path in self.sites.whole]
        experts = {key.place.path for key in self.keys.values() if key.half}
        modules += [self._spell(path) for path in experts]
        if isinstance(self.config.target_modules, tuple):
            leaves = (
                {"gate_proj", "up_proj", "down_proj"} if any(s.lead for s in self.sites.low_rank.values()) else set()
            )
            for name in self.config.target_modules:
                if name not in leaves and not any(one == name or one.endswith(f".{name}") for one in modules):
                    self.problems.append(
                        f"adapter_config.json: target_modules names {name!r}, which no module is called"
                    )
        for name in self.config.modules_to_save:
            if not any(self.config.saves(self._spell(tensor)) and name in tensor for tensor in self.sites.whole):
                self.problems.append(
                    f"adapter_config.json: modules_to_save names {name!r}, which is no module that can be replaced"
                )

    def _unclaimed(self) -> None:
        for name, key in self.keys.items():
            if name in self.taken:
                continue
            site = self.sites.low_rank.get(key.place.path)
            why = "adapter_config.json does not target it" if site else "the model has no such module to adapt"
            self.problems.append(f"tensor {name!r} is unexpected: {why}")


def _equal(saved: np.ndarray, base: np.ndarray) -> bool:
    """Whether two tables hold the same numbers; one may have been saved in a wider or narrower dtype."""
    narrow = min(saved.dtype, base.dtype, key=lambda dtype: dtype.itemsize)
    return all(
        np.array_equal(saved[row : row + _ROWS].astype(narrow), base[row : row + _ROWS].astype(narrow))
        for row in range(0, len(base), _ROWS)
    )
