"""Where a checkpoint tensor lies in a parameter: the view to write it to, and to read it back from.

Ids are keyword-only: one given by position is a TypeError and never lost. Parameters are host arrays.
"""

from __future__ import annotations

import numpy as np

from loaders.families import publishes_transposed
from loaders.reading.memory import bits
from loaders.spec import ParamSpec, Placement


def place_of(param: np.ndarray, spec: ParamSpec, placement: Placement) -> np.ndarray:
    """The memory of ``param`` that a tensor is to be read into, in the tensor's own shape.

    It is contiguous unless the tensor is stored transposed; then it is a strided view of the same memory.
    """
    if not spec.is_transposed:
        return param[(*placement.index, ...)].reshape(spec.tensor_shape)
    return param[(*placement.index, ...)].reshape(_swapped(spec.tensor_shape)).swapaxes(-1, -2)


def weight_loader(
    param: np.ndarray,
    loaded_weight: np.ndarray,
    *,
    shard_id: int | None = None,
    expert_id: int | None = None,
    experts: range | None = None,
    num_experts: int | None = None,
    return_success: bool = False,
) -> bool | None:
    """Write one checkpoint tensor into its place in a host parameter.

    Nothing is copied when ``loaded_weight`` already lies there. ``loaded_weight`` may be overwritten afterwards.

    Args:
        param: [E, 2, ...] or with fewer of the two stack axes, as the ids say.
        loaded_weight: of the shape and dtype of the place.
        shard_id: place on the axis of shards.
        expert_id: place on the axis of experts, as the checkpoint numbers them.
        experts: those that ``param`` holds, of a rank that holds not all; None: all of them.
        num_experts: of all ranks together; None: nobody says, and any expert may be another rank's.
        return_success: say whether anything was written: False for an expert of another rank.
    Returns:
        None, or with ``return_success`` whether ``param`` holds the expert.
    Raises:
        ValueError: shape or dtype differ from the place's, an id has no place, no rank has such an expert, or the
            expert is another rank's and nobody asked to be told.
    """
    if expert_id is not None and experts is not None:
        _check_held(param, experts)
        if expert_id < 0 or (num_experts is not None and expert_id >= num_experts):
            most = "" if num_experts is None else f" to {num_experts - 1}"
            raise ValueError(f"expert {expert_id} is no rank's, expected an id from 0{most}")
        if expert_id not in experts:
            if return_success:
                return False
            raise ValueError(f"expert {expert_id} is not among {_spelled(experts)}. return_success=True skips it.")
        expert_id -= experts.start
    index = Placement("", expert_id, shard_id).index
    if len(index) > param.ndim or any(not 0 <= i < size for i, size in zip(index, param.shape, strict=False)):
        found = ", ".join(f"{name} {i}" for name, i in (("expert", expert_id), ("shard", shard_id)) if i is not None)
        raise ValueError(f"{found} has no place in a parameter of shape {param.shape}")
    place = param[(*index, ...)]  # with the dots, also one number is a view
    if (place.shape, place.dtype) != (loaded_weight.shape, loaded_weight.dtype):
        raise ValueError(f"weight is {loaded_weight.dtype} {loaded_weight.shape}, expected {place.dtype} {place.shape}")
    if not _is_same_memory(place, loaded_weight):
        bits(place)[...] = bits(loaded_weight)
    return True if return_success else None


def load_fused_expert_weights(
    param: np.ndarray,
    loaded_weight: np.ndarray,
    *,
    num_shards: int = 1,
    is_transposed: bool | None = None,
    model_type: str | None = None,
    experts: range | None = None,
    return_success: bool = False,
) -> bool | None:
    """Write the fused tensor of all experts into their host parameter, expert by expert and shard by shard.

    Args:
        param: [E, num_shards, M, D], or without the second axis for one shard.
        loaded_weight: [E, num_shards * M, D] as Qwen3.5 ships it, or transposed [E, D, num_shards * M] as Qwen3-VL-MoE
            does; shard 0 (gate) first.
        num_shards: parts of each expert's outputs.
        is_transposed: which of the two; None: the shape says.
        model_type: of config.json; where the shape fits both ways, it is as that family is published.
        experts: those that ``param`` holds, of a rank that holds not all; None: all of them.
        return_success: say whether anything was written: False where ``experts`` has none of them.
    Raises:
        ValueError: another number of experts, parts of another shape or dtype, or a shape that fits both ways and
            nobody said which; or ``model_type`` is none that is known.
    """
    if experts is not None:
        _check_held(param, experts)
    held = range(len(param)) if experts is None else experts
    published = None if model_type is None else publishes_transposed(model_type)
    ways = (is_transposed, published)
    is_transposed = _turned(param, loaded_weight, num_shards, ways, held, is_whole=experts is None)
    for expert_id in held:
        expert = loaded_weight[expert_id].T if is_transposed else loaded_weight[expert_id]
        for shard_id, part in enumerate(np.split(expert, num_shards)):
            shard = shard_id if param.ndim > 3 else None
            weight_loader(param, part, shard_id=shard, expert_id=expert_id, experts=held)
    return len(held) > 0 if return_success else None


def _turned(
    param: np.ndarray,
    loaded: np.ndarray,
    num_shards: int,
    said: tuple[bool | None, bool | None],
    held: range,
    *,
    is_whole: bool,
) -> bool:
    """Which way round a fused tensor is. Raises ValueError when it is neither, not as asked, or nobody can say.

    ``said``: what was asked, and what decides where both ways fit.
    """
    asked, published = said
    rows, columns = num_shards * param.shape[-2], param.shape[-1]
    ways = {False: (rows, columns), True: (columns, rows)}
    fitting = [way for way, shape in ways.items() if asked in (None, way) and loaded.shape[1:] == shape]
    has_shards = num_shards == (param.shape[1] if param.ndim > 3 else 1)
    has_experts = len(loaded) == len(held) if is_whole else len(loaded) >= held.stop
    if not (fitting and has_shards and has_experts and loaded.dtype == param.dtype):
        expected = " or ".join(str(shape) for way, shape in ways.items() if asked in (None, way))
        raise ValueError(
            f"fused weight is {loaded.dtype} {loaded.shape}, expected {param.dtype} {expected} for {_spelled(held)} of"
            f" a parameter of shape {param.shape} in {num_shards} parts"
        )
    if len(fitting) > 1 and published is None:
        raise ValueError(f"fused weight is {loaded.shape}, which fits both ways. Say is_transposed.")
    return bool(published) if len(fitting) > 1 else fitting[0]


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _is_same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    return a.__array_interface__["data"] == b.__array_interface__["data"] and a.strides == b.strides


def _check_held(param: np.ndarray, experts: range) -> None:
    if experts.step != 1 or experts.start < 0 or len(experts) != len(param):
        raise ValueError(f"experts is {experts}, expected {len(param)} in a row, as many as the parameter holds")


def _spelled(experts: range) -> str:
    return f"experts {experts.start} to {experts.stop - 1}" if experts else "no experts"
