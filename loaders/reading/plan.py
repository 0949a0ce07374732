"""Before a byte is read: which tensor goes where, and everything that is wrong with the checkpoint for that."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError
from loaders.expand import NOTHING, Shaped, expand
from loaders.families import family_module
from loaders.files.header import TensorInfo
from loaders.quantization.schemes import Quantization
from loaders.reading.memory import check_budget
from loaders.reading.parts import missing_parts, repeated_parts
from loaders.reading.regions import Box, volume
from loaders.spec import ModelConfig, ParamSpec, Placement, Specs
from loaders.stage import Stage

log = logging.getLogger(__name__)

FLOATS = ("F32", "BF16", "F16")
BoxesOf = Callable[[ParamSpec], Collection[Box]]


@dataclass(frozen=True)
class LoadReport:
    """What a load or reload did, for logs and for people."""

    checkpoint: str
    num_tensors: int  # written into parameters, each exactly once
    num_bytes: int
    verified: tuple[str, ...]  # redundant tied tensors, found equal to what they are tied to
    left_out: tuple[str, ...]  # declared by the family as not loaded
    other_stages: int  # tensors that belong to other pipeline stages


@dataclass(frozen=True)
class LoadPlan:
    """Every tensor's destination. Made only for a checkpoint that fits completely."""

    checkpoint: Checkpoint
    stage: Stage
    specs: Specs
    dtypes: dict[str, str]  # parameter -> safetensors dtype
    targets: dict[str, tuple[ParamSpec, Placement]]  # tensor -> parameter and place
    verified: dict[str, str]  # redundant tied tensor -> the parameter it must equal
    left_out: tuple[str, ...]
    other_stages: int
    host_budget_bytes: int | None = None  # see ``within``
    staged: bool = True  # likewise
    boxes_of: BoxesOf | None = None  # likewise
    phase: str = "read"  # what the log calls it

    def within(self, host_budget_bytes: int | None, *, staged: bool, boxes_of: BoxesOf | None = None) -> LoadPlan:
        """The same plan under a hard limit of what it holds on the host beside parameters that stay there.

        Args:
            host_budget_bytes: the limit; None: whatever the largest needs.
            staged: parameters are made on the host to be copied from there: they count, and so few are begun at once
                that they are no larger than the largest.
            boxes_of: the parts of a parameter that this process holds of it, disjoint; None: all of it.
        Raises:
            ValueError: it is no positive number, or less than something needs; says what, and how much.
        """
        plan = dataclasses.replace(self, staged=staged, boxes_of=boxes_of)
        if host_budget_bytes is None:
            return plan
        check_budget(host_budget_bytes)
        sizes = plan.sizes()
        needed = {name: sizes[name] for name in self.verified}
        if staged:
            for spec in self.specs:
                parts = [placement.tensor for placement in spec.placements if placement.tensor in self.targets]
                needed[spec.name] = sum(sizes[name] for name in parts)
        beside = max(needed.values(), default=0) if staged else 0  # where codes are put that are computed of these
        for name, size in self.checkpoint.passing(self.targets).items():
            needed[name] = max(size + beside, needed.get(name, 0))
        if big := {name: size for name, size in needed.items() if size > host_budget_bytes}:
            largest = max(big, key=big.__getitem__)
            raise ValueError(
                f"host_budget_bytes={host_budget_bytes} is less than {len(big)} of {len(needed)} parts need that are on"
                f" the host for a moment, the largest {big[largest]} bytes ({largest}). Give a larger budget."
            )
        return dataclasses.replace(plan, host_budget_bytes=host_budget_bytes)

    def sizes(self) -> dict[str, int]:
        """Bytes of every planned tensor that are held here, in file order."""
        owners = {name: spec.name for name, (spec, _) in self.targets.items()} | self.verified
        tensors = self.checkpoint.tensors
        if self.boxes_of is None:
            return {name: info.num_bytes for name, info in tensors.items() if name in owners}
        shares = {spec.name: (sum(map(volume, self.boxes_of(spec))), math.prod(spec.shape)) for spec in self.specs}
        sizes = {}
        for name, info in tensors.items():
            if name in owners:
                held, whole = shares[owners[name]]
                sizes[name] = -(-info.num_bytes * held // whole) if whole else 0
        return sizes

    @property
    def tensors(self) -> list[str]:
        return [*self.targets, *self.verified]

    def report(self) -> LoadReport:
        tensors = self.checkpoint.tensors
        num_bytes = sum(tensors[name].num_bytes for name in self.targets)
        where = str(self.checkpoint.source)
        verified = tuple(self.verified)
        return LoadReport(where, len(self.targets), num_bytes, verified, self.left_out, self.other_stages)


COMPUTE_DTYPES = ("float32", "bfloat16")


def compute_dtype(dtype: object, plan: LoadPlan) -> str:
    """Name of what to compute in: as asked, or the dtype most parameter bytes have (float16 widened to float32).

    Those of the whole model count, so that all stages of a pipeline compute in one.

    Args:
        dtype: a name, or any framework's dtype object; None: the checkpoint's own.
        plan: what is to be loaded.
    Raises:
        ValueError: a dtype that is not computed in.
    """
    if dtype is not None:
        name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).removeprefix("torch.")
        if name not in COMPUTE_DTYPES:
            raise ValueError(f"dtype {dtype} is not computed in, expected one of {', '.join(COMPUTE_DTYPES)}")
        return name
    found, config = plan.checkpoint.tensors, plan.checkpoint.config
    sizes: Counter[str] = Counter()
    for spec in plan.specs if plan.stage.count == 1 else specs_of(config, plan.stage.whole, found):
        if spec.dtype is not None:  # codes and scales
            continue
        for placement in spec.placements:
            if placement.tensor in found:
                sizes[found[placement.tensor].dtype] += found[placement.tensor].num_bytes
    return "bfloat16" if max(sizes, key=sizes.__getitem__) == "BF16" else "float32"


def specs_of(config: ModelConfig, stage: Stage, found: Mapping[str, Shaped] = NOTHING) -> Specs:
    """The parameters a pipeline stage of this configuration holds.

    ``found``: the tensors of the checkpoint that the placements are to be named by; parameters are the same without.
    """
    return expand(family_module(config.architecture).RULES, config, stage, found)


def plan_load(checkpoint: Checkpoint, stage: Stage) -> LoadPlan:
    """Match a checkpoint against its own config.

    Raises:
        CheckpointError: listing every tensor that is missing, unexpected, or of the wrong shape or dtype.
        ValueError: more pipeline stages than layers.
    """
    plan, problems = _match(checkpoint, checkpoint.config, stage)
    if problems:
        raise CheckpointError(checkpoint.source, problems)
    _log(plan)
    return plan


def plan_reload(checkpoint: Checkpoint, config: ModelConfig, stage: Stage, live: Mapping[str, str]) -> LoadPlan:
    """Match a checkpoint against a model that is serving.

    Args:
        checkpoint: the new weights.
        config: the serving model's.
        stage: the serving model's.
        live: parameter -> safetensors dtype it is stored in.
    Raises:
        CheckpointError: listing every difference in config.json that changes the computation, and every tensor that is
            missing, unexpected, or of another shape or dtype than the live parameter.
    """
    plan, found = _match(checkpoint, config, stage)
    held = {spec.name.rpartition(".")[0] for spec in plan.specs}
    theirs, ours = _quantized_in(checkpoint.config, held), _quantized_in(config, held)
    if theirs.quantization == ours.quantization and checkpoint.config.quantization != config.quantization:
        # what is not held may be quantised otherwise, and its tensors have other names then
        plan, found = _match(checkpoint, _quantized_as(config, checkpoint.config.quantization), stage)
    problems = _config_differences(theirs, ours) + found
    for name, dtype in plan.dtypes.items():
        if dtype != live[name]:
            problems.append(f"parameter {name!r} is {dtype} in the checkpoint, expected {live[name]} as it is live")
    if problems:
        raise CheckpointError(checkpoint.source, problems)
    _log(plan)
    return plan


def _log(plan: LoadPlan) -> None:
    report = plan.report()
    log.info(
        "plan: %d tensors of %s, %.3f GB, into %d parameters; %d left out, %d of other stages",
        report.num_tensors,
        report.checkpoint,
        report.num_bytes / 1e9,
        len(plan.dtypes),
        len(report.left_out),
        report.other_stages,
    )


def _quantized_in(config: ModelConfig, modules: Collection[str]) -> ModelConfig:
    """The same, as if of how modules are quantised it said only what becomes of these."""
    return _quantized_as(config, config.quantization and config.quantization.of_modules(modules))


def _quantized_as(config: ModelConfig, quantization: Quantization | None) -> ModelConfig:
    return dataclasses.replace(config, quantization=quantization)  # pyright: ignore[reportArgumentType]


def _config_differences(found: ModelConfig, expected: ModelConfig) -> list[str]:
    if found == expected:
        return []
    if found.architecture != expected.architecture:
        differs = f"architecture is {found.architecture}, expected {expected.architecture} as it is live"
        return [f"config.json: {differs}. Load it as a new model."]
    problems = []
    if found.quantization != expected.quantization:
        ways = ["it is not quantised, and the model is"]
        ways = ways if found.quantization is None else found.quantization.differences(expected.quantization)
        problems = [f"quantisation: {way}, as it is live. Load it as a new model." for way in ways]
        assert problems, "two quantisations differ, and nothing says in what"
    ours, theirs = dataclasses.asdict(expected), dataclasses.asdict(found)  # pyright: ignore[reportArgumentType]
    compared = {field.name for field in dataclasses.fields(expected) if field.compare}  # pyright: ignore[reportArgumentType]
    return problems + [
        f"config.json: {key} is {theirs[key]!r}, expected {ours[key]!r} as it is live. Load it as a new model."
        for key in sorted(compared - {"quantization"})
        if theirs[key] != ours[key]
    ]


def _match(checkpoint: Checkpoint, config: ModelConfig, stage: Stage) -> tuple[LoadPlan, list[str]]:
    found = checkpoint.tensors
    specs = specs_of(config, stage, found)
    whole = specs if stage.count == 1 else specs_of(config, stage.whole, found)
    left_out_patterns = family_module(config.architecture).LEFT_OUT
    problems: list[str] = []
    if stage.mtp and config.num_mtp_layers != 1:
        problems.append(
            f"config.json: a draft was asked for, but {config.architecture} has {config.num_mtp_layers} layers of"
            " multi-token prediction, expected 1. Load it without."
        )
    absent, more = _tower_problems(config, stage, specs, found)
    problems += more
    targets: dict[str, tuple[ParamSpec, Placement]] = {}
    dtypes: dict[str, str] = {}
    for spec in specs:
        missing = [placement for placement in spec.placements if placement.tensor not in found]
        problems += missing_parts(spec, [placement for placement in missing if placement.tensor not in absent])
        for placement in spec.placements:
            if placement.tensor not in found:
                continue
            stored = as_stored(spec, found[placement.tensor].shape)
            targets[placement.tensor] = (stored, placement)
            allowed = FLOATS if spec.dtype is None else (spec.dtype,)
            problems += _tensor_problems(checkpoint, placement.tensor, stored.tensor_shape, spec.axes, specs, allowed)
            first = dtypes.setdefault(spec.name, found[placement.tensor].dtype)
            if found[placement.tensor].dtype != first:
                problems.append(
                    f"tensor {placement.tensor!r} is {found[placement.tensor].dtype}, expected {first} like the other"
                    f" parts of {spec.name!r}"
                )
    # wherever the table is, or the first stage of a pipeline would take what the last one refuses
    params = {spec.name for spec in specs}
    ties = [tied for tied in whole.tied if tied.same_as in params and tied.tensor in found]
    verified = {tied.tensor: tied.same_as for tied in ties}
    for tied in ties:
        problems += _tensor_problems(checkpoint, tied.tensor, tied.shape, (), whole)
    claimed = whole.tensors()
    unclaimed = [name for name in found if name not in claimed]
    # what was asked for is not left out, so whatever else goes by such a name is a mistake
    patterns = [one for one in left_out_patterns if not any(one.fullmatch(name) for name in claimed)]
    left_out = tuple(name for name in unclaimed if any(pattern.fullmatch(name) for pattern in patterns))
    problems += repeated_parts(whole, [name for name in unclaimed if name in whole.rivals and name not in left_out])
    problems += [
        f"tensor {name!r} of {found[name].file} is unexpected: {config.architecture} with"
        f" num_hidden_layers={config.num_hidden_layers} has no such weight"
        for name in unclaimed
        if name not in left_out and name not in whole.rivals
    ]
    other_stages = len(found) - len(unclaimed) - len(targets) - len(verified)
    return LoadPlan(checkpoint, stage, specs, dtypes, targets, verified, left_out, other_stages), problems


def as_stored(spec: ParamSpec, shape: tuple[int, ...]) -> ParamSpec:
    """``spec`` for a tensor of ``shape``: a scale is one number, which exporters write as [] or as [1]."""
    is_scale = spec.dtype is not None and {spec.tensor_shape, shape} == {(), (1,)}
    return dataclasses.replace(spec, tensor_shape=shape) if is_scale else spec


def _tower_problems(
    config: ModelConfig, stage: Stage, specs: Specs, found: Mapping[str, TensorInfo]
) -> tuple[frozenset[str], list[str]]:
    """A vision tower that cannot be where it is asked for; and its tensors, where they are all not there."""
    if config.vision is None or not stage.vision:
        return frozenset(), []
    problems = []
    first = Stage(0, stage.count).layers(config.num_hidden_layers)
    levels = config.vision.levels_taken(config.num_hidden_layers)
    if levels > len(first):
        problems.append(
            f"the first of {stage.count} stages has {len(first)} decoder layers, expected at least {levels}: so many"
            " take what the vision tower saw. Use fewer stages, or load with vision=False."
        )
    tower = frozenset(tensor for tensor, rule in specs.rules.items() if rule.is_visual)
    if not tower or any(tensor in found for tensor in tower):
        return frozenset(), problems
    absent = f"config.json has a vision_config, but none of its {len(tower)} tensors is there"
    return tower, [*problems, f"{absent}. For text alone load with vision=False."]


def _tensor_problems(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    specs: Specs,
    expected: tuple[str, ...] = FLOATS,
) -> list[str]:
    info = checkpoint.tensors[name]
    problems = []
    if info.shape != shape:
        letters = [axis.partition("/")[0] for axis in axes[-len(shape) :]] if shape else []
        origins = ", ".join(dict.fromkeys(specs.origins[letter] for letter in letters if letter in specs.origins))
        problems.append(
            f"tensor {name!r} has shape {info.shape}, expected {shape}{' from ' + origins if origins else ''}"
            f" ({info.file}). Is config.json from the same checkpoint?"
        )
    if info.dtype not in expected:
        which = f"expected {'one of ' if len(expected) > 1 else ''}{', '.join(expected)}"
        problems.append(f"tensor {name!r} is {info.dtype}, {which} ({info.file})")
    return problems
