"""Every event in the life of a weight, on every backend, each checked against a cold load of what must be there now.

A new event is one function and one line in ``EVENTS``. An event that fails ends that model: the next ones get a fresh
one, so that one bug is one failure.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from loaders import open_checkpoint
from loaders.checkpoint import Checkpoint
from loaders.digest import digests
from loaders.reading.plan import plan_load, plan_reload
from loaders.stage import Stage
from parity.backends import NAMES, open_backend
from parity.events import EventResult, Skipped
from parity.lifecycle.faults import FAULTS, OPENING, Fault
from parity.lifecycle.live_bench import HALVES, NEW_TOKENS, Bench, has_draft
from parity.lifecycle.live_model import LiveModel, differing, expect, same_bits, some
from parity.lifecycle.lora import ADAPTER_EVENTS
from parity.lifecycle.serving import draft, nap, replay, speculate
from parity.ruler import LIMITS

LIVE = {"jax": "parity.lifecycle.live_jax", "torch": "parity.lifecycle.live_torch"}

Event = Callable[[LiveModel], str]  # does it, checks it, says what was checked


def run_lifecycle(
    checkpoint_a: str | os.PathLike[str],
    checkpoint_b: str | os.PathLike[str],
    *,
    backends: Sequence[str] = NAMES,
    scratch: Path,
    device: str | None = None,
) -> list[EventResult]:
    """Take models through every event, from A to B and back.

    Args:
        checkpoint_a: where every model starts.
        checkpoint_b: other weights of the same config.
        backends: among ``jax`` and ``torch``.
        scratch: existing directory for exports and broken checkpoints; needs room for two checkpoints, left empty.
        device: as ``open_backend`` takes it.
    Raises:
        CheckpointError: A or B cannot be used, or are not of one config.
        ValueError: A and B hold the same weights, so that nothing could be seen.
        DeviceNotFound: a backend is not installed.
    """
    pair = {"A": open_checkpoint(checkpoint_a), "B": open_checkpoint(checkpoint_b)}
    check_pair(pair["A"], pair["B"])
    results: list[EventResult] = []
    for name in backends:
        live = import_module(LIVE[name]).live(open_backend(name, device))
        with tempfile.TemporaryDirectory(prefix=f"lifecycle-{name}-", dir=scratch) as directory:
            results += _run(Bench(live, pair, Path(directory)), name)
    return results


def check_pair(a: Checkpoint, b: Checkpoint) -> None:
    """Raises CheckpointError or ValueError unless B can be reloaded over A and shows that it was."""
    stage = Stage(mtp=has_draft(a) and has_draft(b))
    plan = plan_load(a, stage)
    plan_reload(b, a.config, stage, plan.dtypes)
    if digests(a.stream(names=plan.tensors)) == digests(b.stream(names=[n for n in plan.tensors if n in b.tensors])):
        raise ValueError(f"{a.source} and {b.source} hold the same weights: nothing would be seen to change")


def _run(bench: Bench, backend: str) -> list[EventResult]:
    results: list[EventResult] = []
    model: LiveModel | None = None
    for name, event in EVENTS:
        start = time.perf_counter()
        try:
            model = model or LiveModel(bench, "A")
            detail, verdict = event(model), "pass"
            version, root = model.model.version, model.root
        except Skipped as why:
            detail, verdict, version, root = str(why), "skip", None, None
        except Exception as error:  # noqa: BLE001  (whatever a broken backend raises is what the table is to show)
            detail, verdict, version, root = f"{type(error).__name__}: {error}", "fail", None, None
            model = None
        seconds = time.perf_counter() - start
        results.append(EventResult(name, backend, verdict, detail, version, root, seconds))
    return results


def load(life: LiveModel) -> str:
    """Loading has taken place; twice must give the same."""
    again = LiveModel(life.bench, life.base)
    expect(again.root == life.root, "two loads of one checkpoint differ")
    return "weights equal the files', twice"


def export(life: LiveModel) -> str:
    life.export()
    return "tensors equal the files', each in its file"


def generate(life: LiveModel) -> str:
    life.generate()
    return f"{NEW_TOKENS} tokens equal a cold load's"


def swap(life: LiveModel) -> str:
    before = life.model.digests()
    values = _halves_of_a_model(life, "B")
    life.swap("B", values=values)
    allowed = {tensor for half in HALVES for tensor in life.bench.tensors_of_half(half, life.base)}
    changed = set(differing(before, life.model.digests()))
    expect(changed <= allowed, f"a swap changed {some(sorted(changed - allowed))}")
    return f"changed {some(sorted(changed))} alone"


def swap_twice(life: LiveModel) -> str:
    life.swap("B")
    root = life.root
    life.swap("B")
    expect(life.root == root, "swapping twice differs from swapping once")
    same = life.model.set_embed_and_head(*life.model.get_embed_and_head())
    expect(same.version == life.version, "setting what is there already published a version")
    life.model = same
    life.check()
    return "twice is once; setting what is there publishes nothing"


def swap_back(life: LiveModel) -> str:
    for half in HALVES:
        life.swap("B", (half,))
    life.export()
    life.swap("A")
    life.export()
    return "each half alone, then back"


def exchange(life: LiveModel) -> str:
    """Each half is handed the other's live value, both at once: what is written first must not be read after."""
    tensors = [life.bench.tensors_of_half(half, life.base) for half in life.bench.halves]
    if life.model.config.tie_word_embeddings or [len(names) for names in tensors] != [1, 1]:
        raise Skipped("embedding and head are not two parameters that can be swapped")
    (embedding,), (head,) = tensors
    held = life.bench.checkpoints[life.base].tensors
    if (held[embedding].dtype, held[embedding].shape) != (held[head].dtype, held[head].shape):
        raise Skipped(f"embedding and head are {held[embedding].dtype} and {held[head].dtype}: neither fits the other")
    before = life.model.digests()
    crossed = before | {embedding: before[head], head: before[embedding]}

    def there_and_back(model: Any) -> Any:
        for expected in (crossed, before):
            model = model.set_embed_and_head(*reversed(model.get_embed_and_head()))
            expect(model.digests() == expected, "embedding and head handed over crosswise are not each other's")
        return model

    life.change(life.base, there_and_back, versions=2)
    return "handed over crosswise, and back"


def aliases(life: LiveModel) -> str:
    """A tied head is its embedding after every event, and no other head is taken."""
    if not life.model.config.tie_word_embeddings:
        embed, head = life.model.get_embed_and_head()
        expect(embed is not head, "an untied model has one array for embedding and head")
        raise Skipped("tie_word_embeddings is false")
    other = life.bench.half("embed", "B")
    for given in ({"head": other}, {"embed": life.bench.half("embed", "A"), "head": other}):
        try:
            life.model.set_embed_and_head(**given)
        except ValueError as error:
            expect("tie_word_embeddings" in str(error), f"the error does not say why: {error}")
        else:
            expect(False, "a tied model took a head that is not its embedding")
        life.check()
    for step in (lambda: None, lambda: life.swap("B"), lambda: life.reload("A")):
        step()
        embed, head = life.model.get_embed_and_head()
        expect(embed is head, "a tied head is no longer its embedding")
    return "one buffer after load, swap and reload; another head is refused"


def misfits(life: LiveModel) -> str:
    """Halves of a wrong shape and dtype: one error that names both, and no change."""
    embed = life.bench.half("embed", "B")
    head = life.bench.half("head", "B")
    assert embed is not None
    given = {"embed": embed[:-1]} | ({} if head is None else {"head": head.astype(np.float64)})
    try:
        life.model.set_embed_and_head(**given)
    except ValueError as error:
        unnamed = [half for half in given if half not in str(error)]
        expect(not unnamed, f"the error does not name {some(unnamed)}: {error}")
    else:
        expect(False, "halves of a wrong shape were taken")
    life.check()
    return "refused, nothing changed"


def reload_b(life: LiveModel) -> str:
    life.reload("B")
    life.export()
    return "A to B equals a cold load of B"


def reload_a(life: LiveModel) -> str:
    life.reload("B")
    life.reload("A")
    life.export()
    return "A to B to A equals A"


def reload_twice(life: LiveModel) -> str:
    life.reload("B")
    life.reload("B")
    return "twice is once"


def reload_after_swap(life: LiveModel) -> str:
    life.reload("A")
    life.swap("B")
    life.reload("A")
    return "nothing of the swap is left"


def poison(life: LiveModel) -> str:
    for letter in "BA":
        life.poison()
        life.reload(letter)
        life.generate()
    return "every parameter NaN, then every one written again"


def stale_cache(life: LiveModel) -> str:
    """What was computed with old weights is refused by new ones; what was not, goes on."""
    for change in (lambda: life.swap("B"), lambda: life.reload("A"), lambda: life.reload("A")):
        with life.live.backend.scope():
            _, cache = life.model.prefill(**life.bench.prompt, max_new_tokens=NEW_TOKENS)
            tokens = np.zeros(life.bench.rows, np.int64)
            _, cache = life.model.decode(tokens, cache)
            change()
            try:
                life.model.decode(tokens, cache)
            except ValueError as error:
                expect("version" in str(error), f"the error does not speak of versions: {error}")
            else:
                expect(False, "keys and values of old weights were used with new ones")
    life.generate()
    return "refused after swap and reload"


def kept_cache(life: LiveModel) -> str:
    """A refused reload publishes nothing, so a cache from before it is still good."""
    with life.live.backend.scope():
        _, cache = life.model.prefill(**life.bench.prompt, max_new_tokens=NEW_TOKENS)
        life.broken_reload("B", OPENING[0])
        life.model.decode(np.zeros(life.bench.rows, np.int64), cache)
    life.check()
    return "good after a refused reload"


def broken(fault: Fault) -> Event:
    """The event of being given a checkpoint with this fault."""

    def event(life: LiveModel) -> str:
        life.broken_reload("B", fault)
        return "refused by name, old weights serve on"

    return event


def stages(count: int) -> Event:
    """The event of being a pipeline of ``count`` stages, each loaded by itself and then reloaded."""

    def event(life: LiveModel) -> str:
        if count > life.model.config.num_hidden_layers:
            raise Skipped(f"{life.model.config.num_hidden_layers} layers cannot be {count} stages")
        layers, vision = life.model.config.num_hidden_layers, life.model.config.vision
        first = Stage(0, count).layers(layers)
        if life.bench.shows and vision.levels_taken(layers) > len(first):
            raise Skipped(f"the first of {count} stages has {len(first)} layers, fewer than take a deepstack level")
        if not life.live.stages_repeat:
            _chained(life, count, in_float32=True)
        _check_halves(life, _chained(life, count))
        life.check()
        return "chained equal the whole, before and after a reload; what a stage lacks it reports"

    return event


def _chained(life: LiveModel, count: int, *, in_float32: bool = False) -> list[Any]:
    """So many stages, held against the whole model before and after a reload."""
    load = partial(life.bench.load, life.bench.path("A"), in_float32=in_float32)
    models = [load((index, count)) for index in range(count)]
    _check_stages(life, models, "A", in_float32=in_float32)
    models = [model.update_weights_from_disk(life.bench.path("B")) for model in models]
    _check_stages(life, models, "B", in_float32=in_float32)
    return models


def _check_stages(life: LiveModel, models: list[Any], letter: str, *, in_float32: bool) -> None:
    """Where their sums have another order, as served they may be as far off as a token that rounding turns around."""
    whole = life.bench.witness(letter, dict.fromkeys(life.bench.tensors[letter], letter))
    parts = [model.digests() for model in models]
    union = {name: value for part in parts for name, value in part.items()}
    expect(union == whole.digests, f"the stages' weights are not the whole's: {some(differing(union, whole.digests))}")
    # the embedding is on the first stage and, as a tied head or for the draft, on the last
    twice = int(life.model.config.tie_word_embeddings or life.bench.has_draft)
    expect(sum(map(len, parts)) == len(union) + twice, "two stages hold the same tensors")
    with life.live.backend.scope():
        x, positions = models[0](**life.bench.prompt), None
        if life.bench.shows:
            positions, _ = models[0].get_rope_index(**life.bench.prompt)
        for model in models[1:]:
            x = model(hidden_states=x, position_ids=positions)
    logits = life.live.backend.to_numpy(x)
    if life.live.stages_repeat:
        expect(same_bits(logits, whole.logits), "chained stages differ from the whole model")
        return
    expected = np.float64(life.bench.logits_in_float32(letter) if in_float32 else whole.logits)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    layers = life.model.config.num_hidden_layers
    limit = LIMITS["float32"].lid(layers) if in_float32 else LIMITS["bfloat16"].token_lid(layers)
    expect(bool(error <= limit), f"chained stages differ from the whole model by {error:.1e}, at most {limit:.1e}")


def _check_halves(life: LiveModel, models: list[Any]) -> None:
    """Both halves offered to every stage: it takes what it has and reports what it has not."""
    given = {half: value for half in life.bench.halves if (value := life.bench.half(half, "A")) is not None}
    for index, model in enumerate(models):
        held: dict[str, Any] = dict(zip(HALVES, model.get_embed_and_head(), strict=True))
        changed = model.set_embed_and_head(**given)
        lacking = tuple(half for half in given if held[half] is None)
        ignored = changed.events[-1].ignored
        expect(ignored == lacking, f"stage {index} lacks {lacking}, but reports {ignored} as ignored")
        after = changed.get_embed_and_head()
        expect([x is None for x in after] == [x is None for x in held.values()], f"stage {index} grew a half")


def _halves_of_a_model(life: LiveModel, letter: str) -> dict[str, Any]:
    found = life.bench.load(life.bench.path(letter)).get_embed_and_head()
    return {half: value for half, value in zip(HALVES, found, strict=True) if life.bench.half(half, letter) is not None}


EVENTS: tuple[tuple[str, Event], ...] = (
    ("load A", load),
    ("export", export),
    ("generate", generate),
    ("swap embed and head", swap),
    ("swap again", swap_twice),
    ("swap back", swap_back),
    ("exchange embed and head", exchange),
    ("swap what does not fit", misfits),
    ("tied embed and head", aliases),
    ("reload B", reload_b),
    ("reload A", reload_a),
    ("reload twice", reload_twice),
    ("reload after swap", reload_after_swap),
    ("poison and reload", poison),
    ("stale cache", stale_cache),
    ("cache kept", kept_cache),
    ("draft", draft),
    ("speculation", speculate),
    ("replay", replay),
    ("sleep and wake", nap),
    *ADAPTER_EVENTS,
    *((f"broken reload: {name}", broken(fault)) for name, fault in FAULTS.items()),
    ("2 stages", stages(2)),
    ("3 stages", stages(3)),
)
