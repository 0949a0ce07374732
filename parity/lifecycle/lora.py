"""Events of adapters: attach, switch, detach, merge, and changes of the base under them; each against a cold load."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loaders import CheckpointError
from loaders.adapters.sites import sites_of
from parity.events import Skipped
from parity.lifecycle.live_model import LawBroken, LiveModel, differing, expect, same_bits, some
from parity.zoo.adapters import TABLES, make_adapter

_LAYERS = ("q_proj", "v_proj", "down_proj", "in_proj_qkv", "out_proj")
# relative: how far rounding may move logits, of weights that are merged, or of experts, whose products depend on how
# many rows come together
_ROUNDING = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Change = Callable[[Any], Any]


class _Adapted:
    """A live model with adapters, which its own checks know nothing of until the last one is gone."""

    def __init__(self, life: LiveModel) -> None:
        self.life, self.bench = life, life.bench
        self.rows = self.bench.rows

    def path(self, seed: int, *, is_zero: bool = False, tables: bool = True) -> Path:
        """An adapter for this model: linear layers, experts, embedding and head; all of one layout."""
        directory = self.bench.scratch / f"adapter-{seed}{'-zero' if is_zero else ''}{'' if tables else '-layers'}"
        if not directory.exists():
            sites = sites_of(self.life.model.config).low_rank.values()
            names = {site.path.rpartition(".")[2] for site in sites}
            stacks = [f"experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
            make_adapter(
                self.bench.path("A"),
                directory,
                seed=seed,
                targets=[name for name in (*_LAYERS, *(TABLES if tables else ())) if name in names],
                parameters=stacks if any(site.kind == "experts" for site in sites) else (),
                is_zero=is_zero,
            )
        return directory

    @property
    def rounding(self) -> float:
        """How far rounding may move logits."""
        return _ROUNDING[str(self.life.model.dtype).removeprefix("torch.")]

    @property
    def rounding_of_weights(self) -> float:
        """Likewise where matrices are rounded to what they are stored in, as those are that are merged."""
        stored = {info.dtype for info in self.bench.checkpoints["A"].tensors.values() if len(info.shape) > 1}
        return max(self.rounding, *(_ROUNDING[_STORED[dtype]] for dtype in stored if dtype in _STORED))

    def do(self, change: Change) -> None:
        """One published change."""
        self.life.model = change(self.life.model)
        self.life.version += 1
        found = self.life.model.version
        expect(found == self.life.version, f"version is {found}, expected {self.life.version}")

    def logits(self, adapter: Any = None) -> np.ndarray:
        with self.life.live.backend.scope():
            return self.life.live.backend.to_numpy(self.life.model(**self.bench.prompt, adapter=adapter))

    def cold(self, *changes: Change) -> np.ndarray:
        """Logits of a model that was loaded cold and then changed."""
        with self.life.live.backend.scope():
            model = self.bench.load(self.bench.path("A"))
            for change in changes:
                model = change(model)
            return self.bench.logits(model)

    def equals(self, expected: np.ndarray, what: str, adapter: Any = None) -> None:
        expect(same_bits(self.logits(adapter), expected), f"{what}: logits are not a cold load's")

    def clear(self) -> None:
        """No adapter any more: from here on the model is the base again, bit for bit."""
        for name in list(self.life.model.adapters):
            self.do(lambda model, name=name: model.detach_lora(name))
        self.life.rebase()
        self.life.check()


def attach(life: LiveModel) -> str:
    """An adapter of zeros changes no bit; another one changes what a cold load with it computes, and no weight."""
    adapted = _Adapted(life)
    base, weights = adapted.logits(), life.model.digests()
    with life.live.backend.scope():
        _, cache = life.model.prefill(**life.bench.prompt)
    adapted.do(lambda model: model.attach_lora(adapted.path(1, is_zero=True)))
    adapted.equals(base, "an adapter whose B is zero")
    _refused(life, cache)
    adapted.do(lambda model: model.attach_lora(adapted.path(1)))
    expect(not same_bits(adapted.logits(), base), "an adapter changed nothing")
    adapted.equals(adapted.cold(lambda model: model.attach_lora(adapted.path(1))), "an attached adapter")
    adapted.equals(base, "rows without adapter", [None] * adapted.rows)
    changed = differing(weights, life.model.digests())
    expect(not changed, f"an adapter changed weights: {some(changed)}")
    adapted.clear()
    return "zeros change nothing; as cold; rows without it are the base's"


def switch(life: LiveModel) -> str:
    """Several at once, chosen by row; another one under the same name; nothing compiled, moved or left over."""
    adapted = _Adapted(life)
    one, two = (adapted.cold(lambda model, seed=seed: model.attach_lora(adapted.path(seed))) for seed in (1, 2))
    adapted.do(lambda model: model.attach_lora(adapted.path(1), "a"))
    adapted.do(lambda model: model.attach_lora(adapted.path(2), "b"))
    for name, expected in (("a", one), ("b", two), (None, two)):
        adapted.equals(expected, f"of two adapters, {name or 'the last'}", name)
    mixed = adapted.logits(["a", *["b"] * (adapted.rows - 1)])
    alone = np.concatenate([one[:1], two[1:]])
    is_exact = not any(site.kind == "experts" for site in sites_of(life.model.config).low_rank.values())
    error, most = _distance(mixed, alone), 0.0 if is_exact else adapted.rounding
    expect(error <= most, f"rows of a mixed batch are {error:.1e} away from what they are alone, at most {most:.0e}")
    compiled, fixed = life.live.compiled(life.model), life.live.fixed(life.model)
    adapted.do(lambda model: model.detach_lora("a"))
    adapted.equals(two, "one adapter after another is gone")
    adapted.do(lambda model: model.attach_lora(adapted.path(1), "b"))
    adapted.equals(one, "another adapter under the same name")
    adapted.do(lambda model: model.attach_lora(adapted.path(2), "c"))
    adapted.equals(two, "a third one")
    changed = differing(compiled, life.live.compiled(life.model)) + differing(fixed, life.live.fixed(life.model))
    expect(not changed, f"adapters that come and go compiled or moved {some(changed)}")
    adapted.clear()
    return "chosen by row, replaced by name; nothing compiled or moved"


def stale_adapter_cache(life: LiveModel) -> str:
    """A cache of other adapters is refused, whichever way they changed."""
    adapted = _Adapted(life)
    changes: Sequence[Change] = (
        lambda model: model.attach_lora(adapted.path(1)),
        lambda model: model.attach_lora(adapted.path(2)),
        lambda model: model.detach_lora(),
    )
    for change in changes:
        with life.live.backend.scope():
            _, cache = life.model.prefill(**life.bench.prompt)
        adapted.do(change)
        _refused(life, cache)
    adapted.clear()
    return "refused after attach, replacement and detach"


def merge(life: LiveModel) -> str:
    """Merged weights say what the adapter says, within their rounding; undone, they are the base's, bit for bit."""
    adapted = _Adapted(life)
    before = life.model.digests()
    adapted.do(lambda model: model.attach_lora(adapted.path(1, tables=False)))
    separate = adapted.logits()
    if life.bench.specs.schemes:
        _raises(lambda: life.model.merge_lora(), "quantised", "an adapter was merged into quantised weights")
        adapted.clear()
        return "refused: quantised weights would be rounded again"
    adapted.do(lambda model: model.merge_lora())
    error, most = _distance(adapted.logits(), separate), adapted.rounding_of_weights
    expect(error <= most, f"merged weights are {error:.1e} away from the adapter, at most {most:.0e}")
    for what, change in (
        ("a reload", lambda: life.model.update_weights_from_disk(life.bench.path("A"))),
        ("another adapter", lambda: life.model.attach_lora(adapted.path(2), "b")),
    ):
        _raises(change, "merged", f"{what} was mixed into merged weights")
    adapted.do(lambda model: model.unmerge_lora())
    expect(life.model.digests() == before, "weights are not what they were before the merge")
    adapted.equals(separate, "after a merge was undone")
    adapted.clear()
    return f"within {error:.0e}; undone bit for bit"


def reload_under_adapter(life: LiveModel) -> str:
    """The base changes under its adapter, and changes back."""
    adapted = _Adapted(life)
    adapted.do(lambda model: model.attach_lora(adapted.path(1)))
    steps: dict[str, Change] = {
        "a reload": lambda model: model.update_weights_from_disk(life.bench.path("B")),
        "a reload back": lambda model: model.update_weights_from_disk(life.bench.path("A")),
    }
    done: list[Change] = []
    for what, change in steps.items():
        adapted.do(change)
        done.append(change)
        adapted.equals(
            adapted.cold(*done, lambda model: model.attach_lora(adapted.path(1))), f"{what} under an adapter"
        )
    given = {half: value for half in life.bench.halves if (value := life.bench.half(half, "B")) is not None}
    adapted.do(lambda model: model.set_embed_and_head(**given))
    cold = adapted.cold(
        lambda model: model.set_embed_and_head(**given), lambda model: model.attach_lora(adapted.path(1))
    )
    adapted.equals(cold, "a swap under an adapter")
    adapted.do(lambda model: model.update_weights_from_disk(life.bench.path("A")))
    adapted.clear()
    return "as cold loads of the new base with the adapter, after reload and swap"


def draft_with_adapter(life: LiveModel) -> str:
    """The draft is given the adapted embedding, and speaks through the adapted head."""
    if not life.bench.has_draft:
        raise Skipped("the checkpoint holds no draft")
    adapted = _Adapted(life)
    base = life.bench.drafted(life.model)
    adapted.do(lambda model: model.attach_lora(adapted.path(1)))
    with life.live.backend.scope():
        plain, speculative = (life.bench.tokens(life.model, draft) for draft in (None, life.model.draft))
        cold = life.bench.load(life.bench.path("A")).attach_lora(adapted.path(1))
    found, expected = life.bench.drafted(life.model), life.bench.drafted(cold)
    assert base is not None
    assert found is not None
    assert expected is not None
    expect(same_bits(found, expected), "the draft's logits under an adapter are not a cold load's")
    expect(not same_bits(found, base), "the draft does not see the adapter")
    expect(same_bits(plain, speculative), "a draft changes the tokens under an adapter")
    adapted.clear()
    return "sees the adapter; the tokens are the same"


def broken_adapter(life: LiveModel) -> str:
    """Adapters that do not fit are refused, each by name, and nothing changes."""
    adapted = _Adapted(life)
    good = adapted.path(1)
    for name, (spoil, told) in _FAULTS.items():
        bad = life.bench.scratch / f"broken {name}"
        bad.mkdir()
        for file in good.iterdir():
            (bad / file.name).write_bytes(file.read_bytes())
        spoil(bad)
        _raises(lambda bad=bad: life.model.attach_lora(bad), told, f"an adapter with {name} was attached")
        for file in bad.iterdir():
            file.unlink()
        bad.rmdir()
        life.check()
    return f"{len(_FAULTS)} refused by name"


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative; 0 for the same bits alone."""
    difference = float(np.linalg.norm(np.float64(found) - expected) / np.linalg.norm(np.float64(expected)))
    return 0.0 if same_bits(found, expected) else max(difference, 1e-300)


def _refused(life: LiveModel, cache: Any) -> None:
    tokens = np.zeros(life.bench.rows, np.int64)
    with life.live.backend.scope():
        _raises(lambda: life.model.decode(tokens, cache), "adapters", "a cache of other adapters was taken")


def _raises(act: Callable[[], Any], told: str, otherwise: str) -> None:
    try:
        act()
    except (CheckpointError, ValueError) as error:
        expect(told in str(error), f"the error does not speak of {told!r}: {error}")
    else:
        raise LawBroken(otherwise)


def _document(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    path = directory / "adapter_model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


def _without_half(tensors: dict[str, np.ndarray]) -> None:
    del tensors[next(name for name in tensors if name.endswith("lora_B.weight"))]


def _narrower(tensors: dict[str, np.ndarray]) -> None:
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name] = np.ascontiguousarray(tensors[name][:, 1:])


def _renamed(tensors: dict[str, np.ndarray]) -> None:
    name = next(name for name in tensors if name.endswith("_proj.lora_A.weight"))
    tensors[name.replace("_proj.", "_projection.")] = tensors.pop(name)


def _pickled(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing half": (lambda directory: _tensors(directory, _without_half), "is missing"),
    "a wrong rank": (lambda directory: _document(directory, r=3), "has shape"),
    "another base's sizes": (lambda directory: _tensors(directory, _narrower), "another model"),
    "an unknown module": (lambda directory: _tensors(directory, _renamed), "no such module"),
    "a pickle": (_pickled, "pickle"),
    "DoRA": (lambda directory: _document(directory, use_dora=True), "use_dora"),
}

ADAPTER_EVENTS: tuple[tuple[str, Callable[[LiveModel], str]], ...] = (
    ("attach adapter", attach),
    ("switch adapters", switch),
    ("stale adapter cache", stale_adapter_cache),
    ("merge adapter", merge),
    ("reload under adapter", reload_under_adapter),
    ("draft under adapter", draft_with_adapter),
    ("broken adapter", broken_adapter),
)
