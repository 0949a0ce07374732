"""Bugs of models that see: in where things are shown, in the tower, and in what becomes of its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from loaders import open_checkpoint
from parity.mutants import Mutant, Patch
from parity.mutants.bench import PEER, STEPS, Bench, Detector, Subject, as_trace, judge, load, record
from parity.mutants.plants import at_backend, framework, of, wrapped, xp
from parity.oracle import oracle_forward
from parity.record_oracle import amplification
from parity.trace import Trace
from parity.trace_layout import AMPLIFICATION
from parity.zoo.pictures import pictures

SEEING, HYBRID = Subject("qwen3_vl"), Subject("qwen3_5-wrapped")
BOTH = ("torch", "jax")
TEXT = ("input_ids", "attention_mask")


def _batch(bench: Bench, subject: Subject) -> dict[str, np.ndarray]:
    """Images of different sizes, a video and a row of text alone, padded on the left so that rows can go on."""
    config = open_checkpoint(bench.path(subject)).config
    return bench.once(("pictures", subject), lambda: pictures(config, padding="left"))


def _trace(backend: str, batch: dict[str, np.ndarray], tensors: dict[str, Any]) -> Trace:
    return as_trace(backend, {name: batch[name] for name in TEXT}, tensors)


def _oracle(bench: Bench, subject: Subject) -> Trace:
    """Which knows how hybrids amplify rounding: on some CPUs that makes correct runs exceed what others do."""
    batch: dict[str, Any] = _batch(bench, subject)

    def found() -> Trace:
        checkpoint = open_checkpoint(bench.path(subject))
        tensors = oracle_forward(checkpoint, **batch)
        return _trace("oracle64", batch, tensors | amplification(checkpoint, batch, tensors))

    return bench.once(("seen", subject), found)


def _forward(bench: Bench, subject: Subject, backend: str) -> Trace:
    batch = _batch(bench, subject)
    seen = record(backend, load(backend, bench.path(subject)), batch)
    return _trace(backend, batch, {name: x for name, x in seen.tensors.items() if name not in batch})


def seeing(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """A whole prompt with pictures at once, under the three-way ruler."""
    peer = bench.once(("seeing", subject), lambda: _forward(bench, subject, PEER))
    return judge(_forward(bench, subject, backend), peer, _oracle(bench, subject))


def going_on(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Prefill with pictures, then token by token, held against the same positions of the whole prompt."""
    batch = _batch(bench, subject)
    peer = bench.once(("seeing", subject), lambda: _forward(bench, subject, PEER))
    model = load(backend, bench.path(subject))
    short = {name: x[:, :-STEPS] if name in (*TEXT, "mm_token_type_ids") else x for name, x in batch.items()}
    step, cache = model.prefill(**short, max_new_tokens=STEPS)
    found = [np.asarray(step).copy()]
    for token_B in batch["input_ids"][:, -STEPS:].T:
        step, cache = model.decode(token_B, cache)
        found.append(np.asarray(step).copy())
    last = {name: batch[name][:, -STEPS - 1 :] for name in TEXT}

    def tail(trace: Trace) -> Trace:
        found = {name: trace.tensors[name] for name in ("logits", f"{AMPLIFICATION}logits") if name in trace.tensors}
        return as_trace(trace.backend, last, {name: array[:, -STEPS - 1 :] for name, array in found.items()})

    mine = as_trace(backend, last, {"logits": np.stack(found, axis=1)})
    return judge(mine, tail(peer), tail(_oracle(bench, subject)))


def _of(name: str, plant: Callable[[], Any], says: str, subject: Subject = SEEING, **more: Any) -> Mutant:
    detector: Detector = more.pop("detector", seeing)
    return of("vision", name, "issue vision", plant, says, subject, detector=detector, **more)


def _positions(change: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Callable[[], list[Patch]]:
    """``change(positions, deltas, types, mask)`` stands for what was counted."""

    def counted(original: Any, config: Any, types_BT: Any, mask_BT: Any, grids: Any) -> Any:
        positions, delta_B, problems = original(config, types_BT, mask_BT, grids)
        return (*change(positions, delta_B, types_BT, mask_BT), problems)

    return wrapped("loaders.host.multimodal:_positions", counted)


def _as_text(positions: Any, delta_B: Any, types_BT: Any, mask_BT: Any) -> Any:
    counted = np.where(mask_BT, np.cumsum(mask_BT, axis=1) - 1, 0).astype(np.int32)
    return np.broadcast_to(counted, positions.shape).copy(), np.zeros_like(delta_B)


def _second_image_at_the_first(positions: Any, delta_B: Any, types_BT: Any, mask_BT: Any) -> Any:
    """Every image after the first of a row starts where the first did."""
    moved = positions.copy()
    for row, types_T in enumerate(types_BT):
        starts = np.flatnonzero((types_T != 0) & (np.roll(types_T, 1) == 0))
        ends = np.flatnonzero((types_T != 0) & (np.roll(types_T, -1) == 0))
        for start, end in zip(starts[1:], ends[1:], strict=True):
            moved[:, row, start : end + 1] += positions[0, row, starts[0]] - positions[0, row, start]
    return moved, delta_B


def _tokens(change: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]) -> Callable[[], list[Patch]]:
    """``change(array module, (tokens, levels ...))`` stands for what the tower says."""

    def call(original: Any, np_: Any, self: Any, *args: Any) -> Any:
        return change(np_, original(self, *args))

    return at_backend("layers.vision:VisionTower.CALL", call)


def _all_frames_one(original: Any, backend: str) -> Any:
    def call(self: Any, x: Any, cos: Any, sin: Any, frames: Any) -> Any:
        return original(self, x, cos, sin, (sum(frames),) if backend == "torch" else xp("jax").minimum(frames, 0))

    return call


def _sees_padding(original: Any, backend: str) -> Any:
    def call(self: Any, x: Any, cos: Any, sin: Any, frames: Any) -> Any:
        np_ = xp("jax")
        last = np_.maximum(frames, np_.roll(frames, 4, axis=1))  # padding behind a frame is of that frame
        return original(self, x, cos, sin, np_.where(frames < 0, last, frames))

    return call


def _taps(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Callable[[], list[Patch]]:
    def learned(original: Any, side: int, grid: Any, place: np.ndarray) -> Any:
        return change(*original(side, grid, place))

    return wrapped("loaders.host.vision_grid:_learned", learned)


def _half_pixels(original: Any, side: int, grid: Any, place: np.ndarray) -> Any:
    """The grid stretched as images are by default, not corner to corner: moved by half a patch."""
    taps, shares = original(side, grid, place)
    return taps, np.roll(shares, 1, axis=1)


def _late(original: Any, self: Any, x: Any, layer: int) -> Any:
    return x if layer == 0 else original(self, x, layer - 1)


def _whole_videos(original: Any, kind: int, grids: Any) -> Iterator[Any]:
    yield from grids


def _untanh(np_: Any, functions: Any) -> dict[str, Any]:
    tanh: Any = "tanh" if np_ is xp("torch") else True
    gelu = functions.gelu
    return {"gelu": lambda x, **options: gelu(x, approximate=tanh)}


def _rotation(change: Callable[[Any, Any], Any]) -> Callable[[], list[Patch]]:
    return wrapped("layers.vision:vision_rotation", lambda original, *args: change(*original(*args)))


VISION_MUTANTS: list[Mutant] = [
    _of("image_positions_as_text", _positions(_as_text), "an image's tokens counted on as text", backends=BOTH),
    _of(
        "second_image_at_the_first",
        _positions(_second_image_at_the_first),
        "position ids of a second image counted from the first's start",
    ),
    _of(
        "height_and_width_swapped",
        _positions(lambda positions, delta, *_: (positions[[0, 2, 1]], delta)),
        "positions of rows and columns exchanged",
    ),
    _of(
        "rope_delta_lost",
        _positions(lambda positions, delta, *_: (positions, 0 * delta)),
        "decoding goes on from the number of tokens, not from the last position",
        detector=going_on,
        backends=BOTH,
    ),
    _of(
        "rope_delta_lost_in_hybrids",
        _positions(lambda positions, delta, *_: (positions, 0 * delta)),
        "the same where some layers have no positions",
        HYBRID,
        detector=going_on,
    ),
    _of(
        "whole_videos",
        wrapped("loaders.host.multimodal:_frames", _whole_videos),
        "a video counted as one image, its timestamps forgotten",
        refusal=ValueError,
    ),
    _of(
        "patches_row_by_row",
        wrapped(
            "loaders.host.vision_grid:Grid.places", lambda places, self, config: np.sort(places(self, config), axis=0)
        ),
        "places of patches in order of rows, not of tokens",
    ),
    _of(
        "patch_places_swapped",
        wrapped("loaders.host.vision_grid:Grid.places", lambda places, self, config: places(self, config)[:, ::-1]),
        "row and column of a patch exchanged",
        backends=BOTH,
    ),
    _of(
        "learned_grid_by_corner",
        _taps(lambda taps, shares: (taps, np.eye(4, dtype=np.float32)[np.zeros(len(shares), int)])),
        "the nearest entry of the learned grid alone, not four of them",
    ),
    _of(
        "learned_grid_shares_moved",
        wrapped("loaders.host.vision_grid:_learned", _half_pixels),
        "shares of the learned grid given to the wrong neighbours",
    ),
    _of(
        "tower_unrotated",
        _rotation(lambda cos, sin: (0 * cos + 1, 0 * sin)),
        "the tower's own rotary embedding left out",
        backends=BOTH,
    ),
    _of(
        "tower_rotation_backwards",
        _rotation(lambda cos, sin: (cos, -sin)),
        "turned the other way: between two patches nothing changes sides but the sign",
    ),
    _of("merger_gelu_tanh", framework("layers.mlp", "F", _untanh), "the merger's GELU by its tanh form"),
    _of(
        "frames_see_each_other",
        lambda: [Patch("layers.vision:VisionAttention.CALL", _all_frames_one)],
        "patches attend beyond their frame",
        backends=BOTH,
    ),
    _of(
        "padding_seen_by_patches",
        lambda: [Patch("layers.vision:VisionAttention.CALL", _sees_padding)],
        "patches attend to the padding of their frame",
        backends=("jax",),
    ),
    _of(
        "deepstack_level_missing",
        _tokens(lambda np_, found: found[:-1]),
        "the last deepstack level left out",
        backends=BOTH,
    ),
    _of(
        "deepstack_levels_exchanged",
        _tokens(lambda np_, found: (found[0], *found[:0:-1])),
        "deepstack levels in the wrong order",
    ),
    _of(
        "deepstack_one_layer_late",
        wrapped("layers.vision:Seen.deepened", _late),
        "levels added after the layer behind theirs",
    ),
    _of(
        "deepstack_everywhere",
        wrapped(
            "layers.vision:Seen.deepened",
            lambda original, self, x, layer: original(dataclasses.replace(self, slot_BT=self.slot_BT * 0), x, layer),
        ),
        "a level added to text too",
    ),
    _of(
        "tokens_not_placed",
        wrapped("layers.vision:Seen.placed", lambda original, self, x: x),
        "placeholders keep their own embedding",
    ),
    _of(
        "tokens_of_another_image",
        wrapped(
            "layers.vision:Seen.placed",
            lambda original, self, x: original(
                dataclasses.replace(self, slot_BT=self.slot_BT - 1 * (self.slot_BT > 0)), x
            ),
        ),
        "every token one place further back",
    ),
]
