"""Images and videos as a caller hands them over, checked on the host, and where in the prompt they belong.

Source: transformers ``Qwen3VLModel.get_rope_index``, ``vision_utils`` (5.23). Letters: docs/glossary.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders.host.inputs import ModelInputs, as_array, check_text, hole_problems, left_aligned, left_padded
from loaders.host.vision_grid import Grid, Patches, patches_of
from loaders.spec import ModelConfig
from loaders.vision import VisionConfig

NAMES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "mm_token_type_ids")
TYPES = "mm_token_type_ids"
TEXT, IMAGE, VIDEO = 0, 1, 2  # of mm_token_type_ids
WORDS = {IMAGE: "image", VIDEO: "video"}
KINDS = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}


@dataclass(frozen=True, slots=True)
class VisionInputs:
    """What a batch shows, and where.

    Attributes:
        patches: of all images in the order of their placeholders, then of all videos.
        slot_BT: int32, which of the tower's tokens stands at each position; -1: none.
        position_ids: int32 [3, B, T], time, height and width.
        delta_B: int32, what a row's next position is beyond the number of its tokens.
    """

    patches: Patches
    slot_BT: np.ndarray
    position_ids: np.ndarray
    delta_B: np.ndarray

    def left_padded(self, extra: int) -> VisionInputs:
        """The same with ``extra`` more positions before each row."""
        slot_BT, positions = left_padded(self.slot_BT, extra, -1), left_padded(self.position_ids, extra)
        return dataclasses.replace(self, slot_BT=slot_BT, position_ids=positions)


def shown_of(given: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """What of images and videos is really given beside tokens of ``shape``: of a processor's text, nothing.

    None is nothing, and so are types that call every token text where there is nothing else.

    Raises:
        TypeError: an input by a name that is none of ``NAMES``.
    """
    if unknown := sorted(set(given) - set(NAMES)):
        raise TypeError(
            f"unexpected keyword {', '.join(map(repr, unknown))}. Beside the call's own options only images and videos"
            f" are taken: {', '.join(NAMES)}"
        )
    shown = {name: value for name, value in given.items() if value is not None}
    if set(shown) == {TYPES}:
        types = as_array(TYPES, shown[TYPES])
        if types.shape == shape and types.dtype.kind in "iu" and not types.any():
            return {}
    return shown


def placeholders(config: VisionConfig, ids_BT: np.ndarray, types: Any) -> tuple[np.ndarray, list[str]]:
    """Which tokens stand for images and videos, as ``mm_token_type_ids`` says, int64 [B, T]; and what is wrong.

    Without it the config's two tokens say so. With it a placeholder may be any number, also one beyond the vocabulary,
    and the config's tokens may be text: a model can generate them.
    """
    by_token_BT = np.where(ids_BT == config.image_token_id, IMAGE, TEXT)
    by_token_BT = np.where(ids_BT == config.video_token_id, VIDEO, by_token_BT)
    if types is None:
        return by_token_BT, []
    types_BT = as_array(TYPES, types)
    if types_BT.shape != ids_BT.shape or types_BT.dtype.kind not in "iu" or not np.isin(types_BT, (0, 1, 2)).all():
        found = f"mm_token_type_ids is {types_BT.dtype} {types_BT.shape}"
        return by_token_BT, [f"{found}, expected 0 (text), 1 (image) or 2 (video) of shape {ids_BT.shape}"]
    wrong = (by_token_BT != TEXT) & (types_BT != TEXT) & (types_BT != by_token_BT)
    if wrong.any():
        row, step = np.argwhere(wrong)[0]
        where = f"row {row}, token {step} is {ids_BT[row, step]}"
        return types_BT.astype(np.int64), [
            f"mm_token_type_ids disagrees with input_ids at {int(wrong.sum())} tokens, the first: {where} and its type"
            f" {types_BT[row, step]}, expected {by_token_BT[row, step]}"
        ]
    return types_BT.astype(np.int64), []


def check_hidden(
    config: ModelConfig,
    shape: tuple[int, ...],
    attention_mask: Any,
    position_ids: Any = None,
    *,
    given: Mapping[str, Any],
) -> ModelInputs:
    """As ``check_inputs``, of a stage that takes hidden states of ``shape``, [B, T, D]; it is shown nothing.

    Raises:
        TypeError, ValueError: likewise.
    """
    if len(shape) != 3 or shape[2] != config.hidden_size:
        raise ValueError(f"hidden_states is {tuple(shape)}, expected [B, T, {config.hidden_size}]")
    tokens = np.zeros(shape[:2], np.int32)
    if shown := shown_of(given, tokens.shape):
        raise ValueError(f"{', '.join(shown)} given, but only the first stage sees. Give its hidden_states.")
    return check_text(config, tokens, attention_mask, position_ids)


def check_inputs(
    config: ModelConfig,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any = None,
    *,
    given: Mapping[str, Any],
    has_tower: bool = True,
    is_prompt: bool = False,
) -> ModelInputs:
    """Check and complete everything a caller gave, text and what it shows.

    Args:
        config: of the model.
        input_ids: integers [B, T], in the vocabulary but for placeholders.
        attention_mask: [B, T] of 0 and 1 (1 = real, padding on either side); None: all real.
        position_ids: integers [B, T], or [3, B, T] or [4, B, T] where the rotary embedding has several axes; None:
            counted.
        given: by the names of ``NAMES``, NumPy or None.
        has_tower: whether the model holds the vision tower; False: it was loaded without.
        is_prompt: move every row's real tokens to its end.
    Raises:
        TypeError: an input by a name that is none of ``NAMES``.
        ValueError: listing everything that is wrong.
    """
    ids = as_array("input_ids", input_ids)
    shown = shown_of(given, ids.shape)
    if not shown or ids.ndim != 2 or ids.dtype.kind not in "iu":
        checked = check_text(config, ids, attention_mask, position_ids)
        return _prompt(config, checked) if is_prompt else checked
    if config.vision is None or not has_tower:
        why = f"{config.architecture} has no vision tower"
        if config.vision is not None:
            why = "the vision tower is not held here: load the model without vision=False, and give these to stage 0"
        raise ValueError(f"{', '.join(shown)} given, but {why}")
    types_BT, problems = placeholders(config.vision, ids, shown.get(TYPES))
    # a placeholder's own embedding is never used: any number will do, the lookup must only be legal
    legal = np.where(types_BT != TEXT, np.clip(ids, 0, config.vocab_size - 1), ids)
    checked = check_text(config, legal, attention_mask, position_ids)
    if is_prompt:
        types_BT, checked = left_aligned(types_BT, checked.attention_mask), _prompt(config, checked)
    vision, more = _seen(config.vision, types_BT, checked.attention_mask, shown)
    if problems + more:
        raise ValueError("; ".join(problems + more))
    if vision is not None and position_ids is None:
        return dataclasses.replace(checked, position_ids=vision.position_ids, vision=vision)
    return dataclasses.replace(checked, vision=vision)


def _prompt(config: ModelConfig, checked: ModelInputs) -> ModelInputs:
    """Rows as a cache takes them, every row's real tokens at its end."""
    if problems := hole_problems(config, checked.attention_mask):
        raise ValueError("; ".join(problems))
    return checked.left_aligned()


def rope_index(
    config: ModelConfig, input_ids: Any, attention_mask: Any, *, given: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions [3, B, T] and each row's delta [B] of a prompt that shows something; errors as ``check_inputs``."""
    vision = check_inputs(config, input_ids, attention_mask, given=given).vision
    if vision is None:
        raise ValueError("nothing is shown: give images or videos. Positions of text are counted by the model.")
    return vision.position_ids, vision.delta_B


def _seen(
    config: VisionConfig, types_BT: np.ndarray, mask_BT: np.ndarray, shown: Mapping[str, Any]
) -> tuple[VisionInputs | None, list[str]]:
    """What is shown, matched to its placeholders; None where nothing is; and everything that is wrong."""
    types_BT = np.where(mask_BT, types_BT, TEXT)
    grids: dict[int, list[Grid]] = {IMAGE: [], VIDEO: []}
    pixels: list[np.ndarray] = []
    problems: list[str] = []
    for kind, (pixel_name, grid_name) in KINDS.items():
        if pixel_name in shown or grid_name in shown:
            found, more = _checked(config, pixel_name, shown.get(pixel_name), grid_name, shown.get(grid_name))
            problems += more
            if found is not None:
                pixels.append(found[0])
                grids[kind] = found[1]
    if problems:
        return None, problems
    for kind, (_, grid_name) in KINDS.items():
        held, needed = int(np.sum(types_BT == kind)), sum(grid.tokens(config) for grid in grids[kind])
        if held != needed:
            made = f"{grid_name} makes {needed} tokens of {[grid.size for grid in grids[kind]]}"
            problems.append(f"input_ids holds {held} {WORDS[kind]} placeholders, but {made}")
    if problems or not (grids[IMAGE] or grids[VIDEO]):
        return None, problems
    slot_BT = np.full(types_BT.shape, -1, np.int32)
    start = 0
    for kind in KINDS:
        here_BT = types_BT == kind
        slot_BT[here_BT] = start + np.arange(here_BT.sum(), dtype=np.int32)
        start += int(here_BT.sum())
    positions, delta_B, problems = _positions(config, types_BT, mask_BT, grids)
    patches = patches_of(config, np.concatenate(pixels), grids[IMAGE] + grids[VIDEO])
    return (None if problems else VisionInputs(patches, slot_BT, positions, delta_B)), problems


def check_shown(config: VisionConfig, pixel_values: Any, grid_thw: Any) -> Patches:
    """Images or videos on their own, as a tower takes them.

    Raises:
        ValueError: listing everything that is wrong.
    """
    found, problems = _checked(config, "pixel_values", pixel_values, "grid_thw", grid_thw)
    if found is None or not found[1]:
        raise ValueError("; ".join(problems) or "grid_thw holds no image, expected at least one")
    return patches_of(config, *found)


def _checked(
    config: VisionConfig, pixel_name: str, values: Any, grid_name: str, grid: Any
) -> tuple[tuple[np.ndarray, list[Grid]] | None, list[str]]:
    """Patches, float32 [A, X], and grids of one kind."""
    if values is None or grid is None:
        both = (pixel_name, grid_name) if values is None else (grid_name, pixel_name)
        return None, [f"{both[0]} is missing beside {both[1]}. The processor gives both."]
    try:
        pixels_AX, grid_thw = as_array(pixel_name, values), as_array(grid_name, grid)
    except ValueError as error:
        return None, [str(error)]
    problems = []
    if grid_thw.ndim != 2 or grid_thw.shape[1:] != (3,) or grid_thw.dtype.kind not in "iu" or (grid_thw < 1).any():
        return None, [f"{grid_name} is {grid_thw.dtype} {grid_thw.shape}, expected integers of 1 and more, [images, 3]"]
    grids = [Grid(*map(int, row)) for row in grid_thw]
    merge = config.spatial_merge_size
    problems += [
        f"{grid_name} has {grid.size}: height and width must be multiples of spatial_merge_size={merge}"
        for grid in grids
        if grid.height % merge or grid.width % merge
    ]
    count = sum(grid.patches for grid in grids)
    if pixels_AX.shape != (count, config.patch_numbers) or pixels_AX.dtype.kind not in "fV":
        expected = f"floats {(count, config.patch_numbers)} from {grid_name} and the config's patches"
        problems.append(f"{pixel_name} is {pixels_AX.dtype} {pixels_AX.shape}, expected {expected}")
    return (None, problems) if problems else ((pixels_AX.astype(np.float32), grids), [])


def _positions(
    config: VisionConfig, types_BT: np.ndarray, mask_BT: np.ndarray, grids: dict[int, list[Grid]]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Positions [3, B, T] and each row's delta; a placeholder run that an image does not fill is a problem.

    Text counts on; an image's tokens share one time and count rows and columns, all from where it starts, and what
    follows starts beyond its longer side. Each frame of a video is an image of its own, with its timestamp between.
    """
    positions = np.zeros((3, *types_BT.shape), np.int32)
    delta_B = np.zeros(len(types_BT), np.int32)
    waiting = {kind: _frames(kind, grids[kind]) for kind in KINDS}
    problems: list[str] = []
    for row, (types_T, mask_T) in enumerate(zip(types_BT, mask_BT, strict=True)):
        real = np.flatnonzero(mask_T)
        at, start, last = 0, 0, -1
        while at < len(real):
            kind = int(types_T[real[at]])
            if kind == TEXT:
                positions[:, row, real[at]] = start
                last = max(last, start)
                at, start = at + 1, start + 1
                continue
            grid = next(waiting[kind])
            size = grid.tokens(config)
            here = real[at : at + size]
            if len(here) < size or (types_T[here] != kind).any():
                problems.append(
                    f"row {row}: the {WORDS[kind]} frame of grid {grid.size} needs {size} placeholders"
                    f" in a row from token {real[at]} on"
                )
                return positions, delta_B, problems
            positions[:, row, here] = start + grid.merged_positions(config)
            last = max(last, int(positions[:, row, here].max()))
            at, start = at + size, start + max(grid.height, grid.width) // config.spatial_merge_size
        delta_B[row] = last + 1 - len(real)
    return positions, delta_B, problems


def _frames(kind: int, grids: list[Grid]) -> Iterator[Grid]:
    """What one run of placeholders stands for: an image, or one frame of a video."""
    for grid in grids:
        yield from [Grid(1, grid.height, grid.width)] * grid.time if kind == VIDEO else [grid]
