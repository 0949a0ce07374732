"""Every event in the life of a weight, on anybody's torch module; each on a fresh one, so that one bug is one failure.

foreign_lifecycle(vllm_style(MyModel, input_ids), checkpoint_a, checkpoint_b)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from parity.events import EventResult, Skipped
from parity.foreign.live import Checkpoint, ForeignLife, ForeignModel, Stream, cold, cold_logits, stream
from parity.lifecycle.live_model import expect, some
from torch_models.storage import same_bits


class _Cut(RuntimeError):
    """The source of an update broke off. Raised by us, inside of what is read."""


class Pair:
    """A subject and two checkpoints of it. ``life`` is a module loaded with A."""

    def __init__(self, subject: ForeignModel, a: Checkpoint, b: Checkpoint) -> None:
        self.subject, self.a, self.b = subject, a, b

    def life(self) -> ForeignLife:
        return ForeignLife(self.subject, self.a)


Event = Callable[[Pair], str]  # does it, checks it, says what was checked


def foreign_lifecycle(
    model: ForeignModel, a: Checkpoint, b: Checkpoint, *, events: Sequence[str] | None = None
) -> list[EventResult]:
    """Take a module through the life of a weight, between two checkpoints of it.

    Args:
        model: how it is made, loaded and run.
        a: checkpoint tensor name -> tensor.
        b: likewise; every tensor another one.
        events: which of ``EVENTS``; default: all.
    Raises:
        ValueError: the checkpoints do not go together, so that nothing could be seen; no event is called so.
    """
    _check(a, b, events)
    chosen = EVENTS if events is None else {name: EVENTS[name] for name in events}
    return [_run(name, event, Pair(model, a, b)) for name, event in chosen.items()]


def _check(a: Checkpoint, b: Checkpoint, events: Sequence[str] | None) -> None:
    problems = []
    if odd := sorted(a.keys() ^ b.keys()):
        problems.append(f"only one of them has {some(odd)}")
    kinds = {name: ((a[name].shape, a[name].dtype), (b[name].shape, b[name].dtype)) for name in a.keys() & b.keys()}
    if odd := sorted(name for name, (one, other) in kinds.items() if one != other):
        problems.append(f"{some(odd)} differ in shape or dtype")
    elif same := sorted(name for name in kinds if same_bits(a[name], b[name])):
        problems.append(f"{some(same)} are the same in both, so nobody would see them kept")
    if problems:
        raise ValueError(f"A and B are not two checkpoints of one model: {'; '.join(problems)}")
    if unknown := sorted(set(events or ()) - EVENTS.keys()):
        raise ValueError(f"no event is called {', '.join(unknown)}, expected among {', '.join(EVENTS)}")


def _run(name: str, event: Event, pair: Pair) -> EventResult:
    started = time.perf_counter()
    try:
        detail, verdict = event(pair), "pass"
    except Skipped as why:
        detail, verdict = str(why), "skip"
    except Exception as error:  # noqa: BLE001  (whatever a broken model raises is what the table is to show)
        detail, verdict = f"{type(error).__name__}: {error}", "fail"
    return EventResult(name, pair.subject.name, verdict, detail, None, None, time.perf_counter() - started)


def load(pair: Pair) -> str:
    """A cold load gives the same twice, what its reference says, and a loop that can be recorded."""
    life = pair.life()
    told = ["twice the same"]
    if pair.subject.reference is not None:
        expected = pair.subject.reference(pair.a)
        error = float((life.logits() - expected).norm() / expected.norm())
        expect(error <= pair.subject.tolerance, f"logits are off by {error:.1e} from the reference")
        told.append("as the reference")
    told.append("recorded" if life.refusal is None else f"not recorded: {life.refusal}")
    return ", ".join(told)


def every_tensor(pair: Pair) -> str:
    """Law 2: what a checkpoint says of each tensor is heard."""
    before = cold_logits(pair.subject, pair.a)
    unread = [n for n in pair.a if same_bits(before, cold_logits(pair.subject, {**pair.a, n: pair.b[n]}))]
    expect(not unread, f"logits do not depend on {some(unread)}: never read, or overwritten by another")
    return f"each of {len(pair.a)} tensors changes the logits"


def refused(make: Callable[[Pair, str], Stream], *, what: str) -> Event:
    """The event of being given a stream with a fault in one tensor: an error that names it, and nothing changed."""

    def event(pair: Pair) -> str:
        for name in (next(iter(pair.a)), list(pair.a)[-1]):
            life = pair.life()
            text = _failure(pair.subject.load, life.model, make(pair, name))
            expect(text is not None, f"{what}: a stream with {name} so was accepted")
            expect(name in (text or ""), f"{what}: the error does not name {name}: {text}")
            _check_whole(life, pair.b)
        return "refused by name; old weights serve on, or none until a good load"

    return event


def _missing(pair: Pair, name: str) -> Stream:
    return stream(pair.b, [one for one in pair.b if one != name])


def _unexpected(pair: Pair, name: str) -> Stream:
    yield from stream(pair.b)
    yield name + "_of_another_model", pair.b[name].clone()


def _repeated(pair: Pair, name: str) -> Stream:
    other = next(one for one in pair.b if one != name)
    return stream(pair.b, [other if one == name else one for one in pair.b])  # as many as there should be


def _misfit(pair: Pair, name: str) -> Stream:
    for one, tensor in stream(pair.b):
        twice = torch.cat if tensor.ndim else torch.stack
        yield one, twice([tensor, tensor]) if one == name else tensor


def any_order(pair: Pair) -> str:
    for names in (list(pair.b)[::-1], sorted(pair.b, key=lambda name: name[::-1])):
        life = pair.life()
        pair.subject.load(life.model, stream(pair.b, names))
        life.holds = dict(pair.b)
        life.check()
    return "backwards and sorted: as in the checkpoint's order"


def lent_buffers(pair: Pair) -> str:
    """Each tensor is overwritten as soon as the next one is asked for, as a streamer's ring buffer is."""

    def lend() -> Stream:
        for name, tensor in pair.b.items():
            lent = tensor.clone()
            yield name, lent
            lent.view(-1).view(torch.uint8).fill_(255)

    life = pair.life()
    pair.subject.load(life.model, lend())
    life.holds = dict(pair.b)
    life.check()
    return "nothing is read after its step"


def buckets(pair: Pair) -> str:
    if pair.subject.buckets is None:
        raise Skipped("buckets are not offered")
    names = list(pair.b)
    for size in (1, 2, len(names) // 2 + 1):
        life = pair.life()
        parts = [stream(pair.b, names[start : start + size]) for start in range(0, len(names), size)]
        pair.subject.buckets(life.model, parts)
        life.holds = dict(pair.b)
        life.check()
    return "one by one, two by two and in halves: as at once"


def reload_b(pair: Pair) -> str:
    pair.life().reload(pair.b)
    return "A to B equals a cold load of B; nothing moved, a replay follows"


def reload_a(pair: Pair) -> str:
    life = pair.life()
    before = life.logits()
    life.reload(pair.b)
    life.reload(pair.a)
    expect(same_bits(life.logits(), before), "A to B to A is not A")
    return "A to B to A equals A"


def reload_twice(pair: Pair) -> str:
    life = pair.life()
    for checkpoint in (pair.a, pair.b, pair.b):
        life.reload(checkpoint)
    return "twice is once"


def poison(pair: Pair) -> str:
    life = pair.life()
    life.poison()
    life.reload(pair.b)
    return "every parameter NaN, then every one written again"


def finish_twice(pair: Pair) -> str:
    """Law 8: deriving from what was derived must not happen."""
    if pair.subject.finish is None:
        raise Skipped("what follows a load cannot be asked for alone")
    life = pair.life()
    pair.subject.finish(life.model)
    life.check()
    life.reload(pair.b)
    pair.subject.finish(life.model)
    life.check()
    return "post-processing twice is once"


def partial(pair: Pair) -> str:
    if pair.subject.partial is None:
        life = pair.life()
        name = next(iter(pair.b))
        text = _failure(pair.subject.load, life.model, stream({name: pair.b[name]}))
        expect(text is not None, f"{name} alone was accepted as a whole checkpoint")
        _check_whole(life, pair.b)
        return "not offered, and refused"
    life = pair.life()
    for name in pair.b:
        pair.subject.partial(life.model, stream({name: pair.b[name]}))
        life.holds[name] = pair.b[name]
        life.check()
    return f"each of {len(pair.b)} tensors alone; all others as they were"


def cut(pair: Pair) -> str:
    """Law 6: an update that breaks off leaves the old version, or none: never a mixture."""

    def until(count: int) -> Stream:
        for index, one in enumerate(stream(pair.b)):
            if index == count:
                raise _Cut("the source broke off")
            yield one

    for count in sorted({0, 1, len(pair.b) // 2, len(pair.b) - 1}):
        life = pair.life()
        text = _failure(pair.subject.load, life.model, until(count))
        expect(text is not None, f"a reload that broke off after {count} tensors was called good")
        _check_whole(life, pair.b)
    return "old weights serve on, or none; the next good reload is whole"


def equal_tensors(pair: Pair) -> str:
    """Law 10: what shares memory is said by the config, never guessed from equal values."""
    alike = dict(pair.a)
    for name, tensor in pair.a.items():
        first = next(one for one, other in pair.a.items() if (other.shape, other.dtype) == (tensor.shape, tensor.dtype))
        alike[name] = pair.a[first]
    life = ForeignLife(pair.subject, alike)
    life.reload(pair.b)
    return "tensors that were equal once are free to differ"


def write(pair: Pair) -> str:
    if (put := pair.subject.write) is None:
        raise Skipped("writing by name is not offered")
    life = pair.life()
    for name in pair.b:
        put(life.model, name, pair.b[name].clone())
        life.holds[name] = pair.b[name]
        life.check()
    return "what is derived follows each of them"


def nap(pair: Pair) -> str:
    if pair.subject.nap is None:
        raise Skipped("pausing is not offered")
    life = pair.life()
    for checkpoint in (pair.b, pair.a):
        pair.subject.nap(life.model)
        life.check()
        life.reload(checkpoint)
    return "nothing lost, nothing moved; reloads go on"


def swap(pair: Pair) -> str:
    if pair.subject.swap is None or pair.subject.halves is None:
        raise Skipped("swapping embedding and head is not offered")
    life = pair.life()
    for checkpoint in (pair.b, pair.b, pair.a):
        embed, head = (checkpoint[name].clone() for name in pair.subject.halves)
        pair.subject.swap(life.model, embed, head)
        life.holds |= {name: checkpoint[name] for name in pair.subject.halves}
        life.check()
    life.reload(pair.b)
    return "twice is once, and back; reloads go on"


def wrappers(pair: Pair) -> str:
    """Law 9."""
    if pair.subject.wrappers is None:
        raise Skipped("nothing wraps anything")
    pairs = list(pair.subject.wrappers(cold(pair.subject, pair.a)))
    lacking = [f"{type(outer).__name__}.{name}" for outer, inner in pairs for name in missing_interface(outer, inner)]
    expect(not lacking, f"wrappers lack what they wrap: {some(lacking)}")
    return f"{len(pairs)} offer all that they wrap"


def missing_interface(wrapper: nn.Module, wrapped: nn.Module) -> list[str]:
    """Public names of the wrapped module, those of every ``nn.Module`` aside, that its wrapper does not have."""
    names = {*dir(wrapped), *wrapped._parameters, *wrapped._buffers} - set(dir(nn.Module))
    names = {name for name in names if not name.startswith("_") and name not in wrapped._modules and name != "training"}
    return sorted(name for name in names if not hasattr(wrapper, name))


def _failure(call: Callable[..., object], *args: object) -> str | None:
    """The error's text; None without one."""
    try:
        with torch.no_grad():
            call(*args)
    except Exception as error:  # noqa: BLE001  (which kind is the model's own business)
        return f"{type(error).__name__}: {error}"
    return None


def _check_whole(life: ForeignLife, good: Checkpoint) -> None:
    """After a refused update: as before bit for bit, or refusing to run; then a good load makes all well."""
    try:
        life.logits()
    except RuntimeError:
        pass  # it would rather not run
    else:
        life.check()
    life.reload(good)


EVENTS: dict[str, Event] = {
    "load": load,
    "every tensor is read": every_tensor,
    "missing tensor": refused(_missing, what="missing"),
    "unexpected tensor": refused(_unexpected, what="unexpected"),
    "repeated tensor": refused(_repeated, what="missing, another twice"),
    "misfit tensor": refused(_misfit, what="of another shape"),
    "any order": any_order,
    "lent buffers": lent_buffers,
    "buckets": buckets,
    "reload B": reload_b,
    "reload A": reload_a,
    "reload twice": reload_twice,
    "poison and reload": poison,
    "finish twice": finish_twice,
    "partial reload": partial,
    "reload that breaks off": cut,
    "equal tensors": equal_tensors,
    "write by name": write,
    "nap": nap,
    "swap embed and head": swap,
    "wrappers": wrappers,
}
