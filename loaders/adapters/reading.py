"""The tensors of an adapter, each given its place in a model; everything that does not fit is kept and told at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loaders.adapters.config import AdapterConfig
from loaders.adapters.files import AdapterFiles
from loaders.adapters.keys import COPY, Key, Nested, module_in, parse_key
from loaders.adapters.names import name_problems, tower_problem, whole_problems
from loaders.adapters.sites import Site, sites_of
from loaders.adapters.updates import Adapter, LowRank
from loaders.digest import root_digest, tensor_digest
from loaders.reading.memory import bits
from loaders.reading.plan import FLOATS, specs_of
from loaders.spec import ModelConfig
from loaders.stage import Stage

ReadBase = Callable[[str], np.ndarray | None]
_ROWS = 8192  # compared at once


class Reading:
    """One adapter being matched.

    ``is_partial``: it asks for more than is done, so that tensors which nothing explains may be that.
    """

    def __init__(
        self,
        files: AdapterFiles,
        config: AdapterConfig,
        model: ModelConfig,
        read_base: ReadBase | None,
        *,
        is_partial: bool = False,
    ) -> None:
        self.files, self.config, self.read_base, self.is_partial = files, config, read_base, is_partial
        self.sites = sites_of(model)
        self.quantized = specs_of(model, Stage()).schemes
        self.problems: list[str] = []
        self.text = model.text_paths[0]
        self.of_tower = {name: module_in(name, self.sites.tower) for name in files.tensors} if self.sites.tower else {}
        keys = {name: parse_key(name, model.text_paths) for name in files.tensors if not self.of_tower.get(name)}
        self.keys: dict[str, Key] = {name: key for name, key in keys.items() if key is not None}
        self.halves: dict[Nested, dict[str, str]] = {}  # of every place that has some
        for name, key in self.keys.items():
            if key.half:
                self.halves.setdefault(key.place, {})[key.half] = name
        self.spelled = next((key.spelled for key in self.keys.values() if key.spelled), self.text)
        self.taken: set[str] = set()
        stacks = [site for site in self.sites.low_rank.values() if site.kind == "experts"]
        self.single = {  # leaves of stacks whose experts have updates one by one, in whichever layer
            _leaf(site) for site in stacks if any(Nested(path) in self.halves for path in _single(site).values())
        }

    def adapter(self) -> tuple[Adapter, list[str]]:
        """What was read, and everything that is wrong with it."""
        low_rank = {path: update for path, site in self.sites.low_rank.items() if (update := self._low_rank(site))}
        self._repeated()
        whole = self._whole()
        left_out = self._left_out()
        self.problems += tower_problem(self.sites.tower, [module for module in self.of_tower.values() if module])
        self.problems += name_problems(self.config, self.sites, self._spell, self._paths())
        claimed = {name: key.place.path for name, key in self.keys.items() if not key.half and name not in self.taken}
        self.problems += whole_problems(self.config, self.sites, self._spell, set(claimed.values()))
        self.taken |= {name for name, path in claimed.items() if self.config.saves(self._spell(path))}
        if not self.is_partial:
            self._unclaimed()
        if not self.problems and not self.is_partial and not low_rank and not whole:
            self.problems.append("it changes nothing: no tensor of it is an update")
        arrays = {
            f"{path}.{half}": value for path, one in low_rank.items() for half, value in (("a", one.a), ("b", one.b))
        }
        digests = {name: tensor_digest(array) for name, array in (arrays | whole).items()}
        digests |= {f"{path}.scaling": str(one.scaling) for path, one in low_rank.items()}
        return Adapter(str(self.files.source), low_rank, whole, left_out, root_digest(digests)), self.problems

    def _spell(self, name: str) -> str:
        """A name of ours as the adapter's model has it."""
        prefix = f"{self.text}."
        return f"{self.spelled}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name

    def _low_rank(self, site: Site) -> LowRank | None:
        if site.kind == "experts":
            return self._fused_experts(site) or self._single_experts(site)
        path = self._spell(site.path)
        name = self.config.target(path, is_plain=site.is_plain)
        if name is None:
            return None
        is_turned = site.kind == "embedding" and name != path  # by its weight: B @ A is [V, D] then, as of a linear
        halves = self._halves(Nested(site.path), site.kind == "embedding" and not is_turned)
        if halves is None:
            return None
        out, inner = reversed(site.shape) if is_turned else site.shape
        rank = self.config.rank(name)
        a, b = self._read(halves[0], (rank, inner), "r"), self._read(halves[1], (out, rank), "r")
        if a is None or b is None:
            return None
        a, b = (np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)) if is_turned else (a, b)
        return LowRank(site, a, b, self.config.scaling(name))

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
        """Updates of experts one by one, as transformers had them before it fused them.

        Where there are some of a stack, every layer that is targeted has them. Where there are none, the names are of
        other modules, as a shared expert's.
        """
        if _leaf(site) not in self.single:
            return None
        places = _single(site)
        wanted = {place: path for place, path in places.items() if self.config.targets(self._spell(path))}
        if not wanted:
            return None
        if not any(Nested(path) in self.halves for path in wanted.values()):
            self.problems.append(
                f"lora_A and lora_B of all experts of {site.path!r}, a target, are missing; other layers have theirs"
            )
            return None
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

    def _halves(self, place: Nested, is_embedding: bool) -> tuple[str, str] | None:
        """Names of A and B of a target; None when one or both are not there."""
        halves = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
        found = {half: name for half, name in self.halves.get(place, {}).items() if half in halves}
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
        value = self._stored(name, shape, what)
        return None if value is None else value.astype(np.float32)

    def _stored(self, name: str, shape: tuple[int, ...], what: str) -> np.ndarray | None:
        """A tensor as it is in the file; None when it is not what it must be."""
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
        return value

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
            elif (value := self._stored(name, shape, "the model's sizes")) is not None:
                found[tensor] = value
        return found

    def _repeated(self) -> None:
        """Tensors of ``modules_to_save`` that are there by another name, too."""
        for name in [name for name in self.files.tensors if COPY in name]:
            first = name.replace(COPY, ".")
            if first not in self.files.tensors:
                continue  # nothing explains it
            self.taken.add(name)
            ours, theirs = self.files.tensors[first], self.files.tensors[name]
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) or not np.array_equal(
                bits(self.files.read(first)), bits(self.files.read(name))
            ):
                self.problems.append(f"tensor {name!r} differs from {first!r}, and both are of one module to save")
            self.keys.pop(name, None)

    def _left_out(self) -> tuple[str, ...]:
        """The base's own tensors, written beside an update."""
        found = []
        for name, key in self.keys.items():
            site = self.sites.low_rank.get(key.place.path.removesuffix(".weight"))
            rows = self.sites.whole.get(key.place.path)
            if name in self.taken or key.half or site is None or site.kind == "experts" or rows is None:
                continue
            self.taken.add(name)
            found.append(name)
            info = self.files.tensors[name]
            if info.shape != rows or info.dtype not in FLOATS:
                self.problems.append(f"tensor {name!r} is {info.dtype} {info.shape}, expected the base's own {rows}")
            elif (base := self._base(site)) is not None and not _equal(self.files.read(name), base):
                self.problems.append(
                    f"tensor {name!r} differs from the model's {site.parameter!r}, which it was written beside: the"
                    f" adapter is of another base, {self.config.base_model_name_or_path!r}"
                )
        return tuple(found)

    def _base(self, site: Site) -> np.ndarray | None:
        """What the adapter was trained over; None where it is not here, or not as it was: rounded to codes."""
        if self.read_base is None or self.is_partial or site.module in self.quantized:
            return None
        return self.read_base(site.parameter)

    def _paths(self) -> set[str]:
        """Whatever the file has updates of, or whole, spelled as its own model has it."""
        named = {key.place.path for key in self.keys.values()}
        of_tower = {module for module in self.of_tower.values() if module}
        return {self._spell(path) for path in named} | of_tower

    def _unclaimed(self) -> None:
        """Tensors that nothing explains."""
        self.problems += [
            f"tensor {name!r} is unexpected: it is no name that PEFT gives"
            for name in self.files.tensors
            if name not in self.keys and name not in self.taken and not self.of_tower.get(name)
        ]
        for name, key in self.keys.items():
            if name in self.taken:
                continue
            site = self.sites.low_rank.get(key.place.path)
            why = "adapter_config.json does not target it" if site else "the model has no such module to adapt"
            self.problems.append(f"tensor {name!r} is unexpected: {why}")


def _leaf(site: Site) -> str:
    return site.path.rpartition(".")[2]


def _single(site: Site) -> dict[tuple[int, ...], str]:
    """Place in a stack of experts -> the module that it was before transformers fused them."""
    module, _, leaf = site.path.rpartition(".")
    names = ("gate_proj", "up_proj") if len(site.lead) == 2 else (leaf,)
    return {
        (expert, part)[: len(site.lead)]: f"{module}.{expert}.{name}"
        for expert in range(site.lead[0])
        for part, name in enumerate(names)
    }


def _equal(saved: np.ndarray, base: np.ndarray) -> bool:
    """Whether two tables hold the same numbers; one may have been saved in a wider or narrower dtype."""
    narrow = min(saved.dtype, base.dtype, key=lambda dtype: dtype.itemsize)
    return all(
        np.array_equal(saved[row : row + _ROWS].astype(narrow), base[row : row + _ROWS].astype(narrow))
        for row in range(0, len(base), _ROWS)
    )
