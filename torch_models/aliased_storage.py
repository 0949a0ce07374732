"""What the storage of a source holds: the bytes that were loaded, or those of a derived tensor that lodges there.

Written down beside the parameter itself, so that all modules that share it see the same, and it goes with copies of
them. Whoever loads all of a source says so and is believed. What is written without a word is told by the bytes: of
those that were left there, small runs and columns are remembered as hashes. They are outside the census, take a
sixteenth of a large source at most and half a KiB of a small one, and ``remembered_bytes`` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

_RUN_BYTES, _FEWEST_RUNS = (4, 128), 64  # shortest and longest; of a small source there are at least so many
_PIECE = 1 << 20  # bytes hashed at once
_ODD = -0x61C8864680B583EB  # 2^64 over the golden ratio


@dataclass
class Lodger:
    """A derived tensor in its source's storage."""

    is_outside_census = True

    name: str
    is_there: bool = False  # False: the source was loaded since
    form: tuple[torch.Size, torch.dtype] | None = None  # of what it left there
    hashes: tuple[torch.Tensor, ...] = ()  # likewise; int32, on the host

    def moved_in(self, source: torch.Tensor) -> None:
        """Take note that the storage holds the derived tensor."""
        self.is_there, self.form, self.hashes = True, (source.shape, source.dtype), _hashes(source)


class Lodgings:
    """The lodgers that a module brought in, by source, and the names that it calls them by."""

    is_outside_census = True

    def __init__(self) -> None:
        self.of_source: dict[str, tuple[nn.Parameter, Lodger]] = {}
        self.names: set[str] = set()


def lodger_of(module: nn.Module, name: str) -> Lodger | None:
    """What lodges in the storage of parameter ``name``, whoever brought it in; None: nothing ever did."""
    source = getattr(module, name, None)
    if not isinstance(source, nn.Parameter):
        return None
    found = vars(source).get("_lodger")
    if found is None:  # copies of a module have parameters without attributes
        kept, lodger = _lodgings(module).of_source.get(name, (None, None))
        if kept is source and lodger is not None:
            found = vars(source)["_lodger"] = lodger
    return found


def move_in(module: nn.Module, source_name: str, derived_name: str) -> None:
    """Take note that the storage of a source holds, from now on, a derived tensor. Done before it is registered."""
    source, lodger = module.get_parameter(source_name), lodger_of(module, source_name)
    if lodger is None:
        lodger = vars(source)["_lodger"] = Lodger(derived_name)
    lodger.name = derived_name
    lodger.moved_in(source)
    lodgings = vars(module).setdefault("_lodgings", Lodgings())
    lodgings.of_source[source_name] = source, lodger
    lodgings.names.add(derived_name)


def is_lodger(module: nn.Module, name: str) -> bool:
    """Whether ``name`` is what a derived tensor is called here, and not its source."""
    return name in _lodgings(module).names and lodger_of(module, name) is not None


def mark_source(module: nn.Module, source_name: str) -> None:
    """Say that all of a source was loaded: its storage holds the checkpoint's bytes again."""
    if (lodger := lodger_of(module, source_name)) is not None:
        lodger.is_there = False


def is_derived(module: nn.Module, source_name: str) -> bool:
    """Whether the storage of a source holds what was derived from it, and nothing has been written there since."""
    lodger = lodger_of(module, source_name)
    if lodger is None or not lodger.is_there:
        return False
    changed, pieces = _changed(module.get_parameter(source_name), lodger)
    return changed == 0 and pieces > 0


def holds_derived(module: nn.Module, source_name: str) -> bool:
    """Whether it holds derived bytes: all of them, or none because all of the source was written since.

    Raises:
        RuntimeError: some of them: nobody can say what the source is.
    """
    lodger = lodger_of(module, source_name)
    if lodger is None or not lodger.is_there:
        return False
    changed, pieces = _changed(module.get_parameter(source_name), lodger)
    if 0 < changed < pieces:
        raise RuntimeError(_refusal(source_name, lodger, f"{pieces - changed} of its {pieces} pieces are as they were"))
    return changed == 0


def check_loaded(module: nn.Module, source_name: str, value: torch.Tensor) -> None:
    """See that ``value``, as large as the source and computed from it, was not computed from derived bytes.

    Raises:
        RuntimeError: the source, or a part of it, holds derived bytes, and they would become others.
    """
    source, lodger = module.get_parameter(source_name), lodger_of(module, source_name)
    if lodger is None or not lodger.is_there or lodger.form is None or lodger.form[0] != source.shape:
        return
    if lodger.form[1] != source.dtype:
        raise RuntimeError(_refusal(source_name, lodger, f"they were only cast to {source.dtype}"))
    given = zip(_hashes(source), lodger.hashes, _hashes(value), strict=True)
    stale = [(now == then) & (new != then) for now, then, new in given]
    if found := sum(int(one.sum()) for one in stale):
        pieces = sum(len(one) for one in stale)
        raise RuntimeError(_refusal(source_name, lodger, f"{found} of its {pieces} pieces would be derived twice"))


def remembered_bytes(root: nn.Module) -> int:
    """Bytes that all modules below ``root`` remember of derived tensors."""
    found = {id(one): one for part in root.modules() for _, one in _lodgings(part).of_source.values()}
    return sum(hashes.nbytes for lodger in found.values() for hashes in lodger.hashes)


def _lodgings(module: nn.Module) -> Lodgings:
    return vars(module).get("_lodgings") or Lodgings()


def _refusal(source_name: str, lodger: Lodger, found: str) -> str:
    return (
        f"{source_name} holds bytes of {lodger.name} still, not what was loaded: {found}. Load all of {source_name}"
        " first. Nothing was written."
    )


def _changed(source: torch.Tensor, lodger: Lodger) -> tuple[int, int]:
    """How many pieces have changed since, of how many."""
    if lodger.form != (source.shape, source.dtype):
        return 1, 1
    pairs = [now != then for now, then in zip(_hashes(source), lodger.hashes, strict=True)]
    return sum(int(one.sum()) for one in pairs), sum(len(one) for one in pairs)


def _hashes(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of all short runs of bytes, and of all columns: parts are loaded by rows, by experts or by columns."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    shortest, longest = _RUN_BYTES
    run = shortest
    while run < longest and len(flat) >= 2 * run * _FEWEST_RUNS:
        run *= 2
    columns = tensor.shape[-1] if tensor.ndim > 1 else 0
    if not columns or len(flat) // columns < max(run, 2 * tensor.itemsize):
        return (_hashed(flat, run),)
    by_column = flat.view(-1, columns, tensor.itemsize).transpose(0, 1).reshape(-1)
    return _hashed(flat, run), _hashed(by_column, len(flat) // columns)


def _hashed(flat: torch.Tensor, run: int) -> torch.Tensor:
    """A number for every ``run`` bytes that tells their order too, as a swizzle is but another order."""
    found = []
    for part in flat.split(run * max(1, _PIECE // run)):
        runs = F.pad(part, (0, -len(part) % run)).view(-1, run)
        words = F.pad(runs, (0, -run % 8)).view(torch.int64) * _ODD
        places = torch.arange(1, 2 * words.shape[1], 2, device=flat.device) * _ODD
        sums = ((words ^ words >> 32) * places).sum(1)
        found.append((sums >> 32).int())
    return torch.cat(found).cpu()
