"""torch_models/a.py is the twin of jax_models/a.py: a diff of the two reads as a translation."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from loaders import Stage, open_checkpoint
from loaders.families import FAMILIES
from loaders.reading.plan import specs_of
from parity.zoo import ZOO, make_checkpoint

ROOT = Path(__file__).parents[1]
JAX, TORCH = ROOT / "jax_models", ROOT / "torch_models"

SAME = {"__call__": "forward"}  # one thing under two names: JAX's, torch's
PARAMETERS = ("Param", "Parameter", "empty_param")  # what makes one
# Files ("layers/a.py") and public names ("layers/a.py: f()") that one side alone has, each with the reason.
ONLY_JAX: dict[str, str] = {
    "draft.py: Draft.weights()": "torch's modules hold theirs",
    "draft.py: Draft.mesh()": "of jax.set_mesh; torch sets none around a call",
    **{
        f"draft.py: {line}": "torch has no compiled programs; the draft runs as it stands"
        for line in ("DraftPrograms", "DraftPrograms.__init__()")
    },
    **{
        f"layers/{what}": "torch writes into its cache, then reads it; XLA for TPU would move all of it"
        for what in ("attention.py: attend_cached()", "attention.py: in_turn()", "cached_attention.py")
    },
    "layers/attention.py: cut_as_kept()": "of a mesh that XLA cuts for; torch's ranks keep what they compute",
    "layers/attention.py: attend_alone()": "chooses a TPU's kernel; torch has one way to attend",
    "layers/install.py: module_at()": "torch's modules have get_submodule",
    "layers/lora.py: ExpertUpdates.slots()": "assignments are sorted by expert; torch knows the token of each",
    "layers/by_expert.py": "rows come in the order of experts; torch goes from expert to expert",
    "layers/moe.py: update_specs()": "a mesh is JAX's alone",
    "layers/vision.py: frame_attention()": "frames share rows, for few sizes of programs; torch attends frame by frame",
    "layers/products.py": "a mesh is JAX's alone; torch calls its kernels straight",
}
ONLY_TORCH: dict[str, str] = {
    **{
        f"draft.py: Draft.{name}()": "JAX's are compiled, in DraftPrograms"
        for name in ("bound", "empty_cache", "extend", "step")
    },
    "layers/lora.py: Wrapper.base_layer()": "held where nn.Module does not register it",
    "layers/lora.py: ExpertUpdates.parts()": "one expert's gate and up are two tensors; JAX multiplies them as one",
    **{
        f"layers/lora.py: {name}": "what a module holds besides its submodules, and whether the census sees it"
        for name in ("Held", "Copy")
    },
    "layers/norm.py: GemmaRMSNorm.derive()": "JAX computes what is derived inside every program",
    "layers/quantized.py: NVFP4Linear.derive()": "JAX computes what is derived inside every program",
    "layers/quantized_experts.py: NVFP4Experts.derive()": "JAX computes what is derived inside every program",
    "layers/quantized.py: as_loaded()": "storage in JAX holds what was loaded, always",
    "taps.py: tap_picked()": "a short run goes through every expert, and some of it is used; JAX sorts rows by expert",
    "layers/step.py: Step.slots()": "torch writes into its cache slot by slot; JAX gives where the first one goes",
    "layers/gated_delta.py: GatedDeltaNet.hold()": "on a mesh torch runs the heads that are here; XLA runs all of them",
    **{
        f"layers/{line}": "on a mesh torch keeps the keys and values that queries here ask for; XLA keeps all of them"
        for line in (
            *("attention.py: taken()", "attention.py: evened()"),
            *("attention.py: Attention.hold()", "gated_attention.py: GatedAttention.hold()"),
        )
    },
    **{
        f"layers/{line}": "on a mesh torch runs the experts that are here; JAX counts them where it cuts their product"
        for line in ("moe.py: places_of()", "moe.py: Experts.hold()", "quantized_experts.py: NVFP4Experts.hold()")
    },
    "layers/linear.py: multiply()": "which operand comes first matters to MKL; XLA chooses for itself",
    "layers/linear.py: empty_param()": "JAX builds its graph under eval_shape, where nothing has storage anyway",
}


def twin_files(package: Path) -> set[str]:
    layers = {f"layers/{path.name}" for path in package.glob("layers/*.py")}
    families = {f"{family}.py" for family in FAMILIES.values() if (package / f"{family}.py").exists()}
    return layers | families | {"taps.py", "draft.py", "speculative.py"}


TWINS = sorted(twin_files(JAX) & twin_files(TORCH))


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", *SAME)


def parameters(class_: ast.ClassDef) -> list[str]:
    """Attributes that are made parameters, in order."""
    found = []
    for node in ast.walk(class_):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called = node.value.func
            if (called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")) in PARAMETERS:
                found += [target.attr for target in node.targets if isinstance(target, ast.Attribute)]
    return found


def outline(path: Path) -> list[str]:
    """Public classes with their parameters and methods, and public functions, in the order of the file."""
    lines = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and is_public(node.name):
            lines.append(f"{node.name}()")
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            lines.append(node.name)
            lines += [f"{node.name}.{name}" for name in parameters(node)]
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef) and is_public(item.name)]
            lines += [f"{node.name}.{SAME.get(method, method)}()" for method in methods]
    return lines


def test_every_file_has_its_twin():
    jax_files, torch_files = twin_files(JAX) - {*ONLY_JAX}, twin_files(TORCH) - {*ONLY_TORCH}
    assert jax_files == torch_files


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_same_classes_parameters_and_methods_in_the_same_order(name):
    ours = [line for line in outline(JAX / name) if f"{name}: {line}" not in ONLY_JAX]
    theirs = [line for line in outline(TORCH / name) if f"{name}: {line}" not in ONLY_TORCH]
    assert ours == theirs


def test_every_exception_still_exists():
    for package, table in ((JAX, ONLY_JAX), (TORCH, ONLY_TORCH)):
        for entry in table:
            name, _, line = entry.partition(": ")
            assert (package / name).exists(), entry
            assert not line or line in outline(package / name), entry


def flat(weights: dict, prefix: str = "") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in weights.items():
        if isinstance(value, dict):
            shapes |= flat(value, f"{prefix}{name}.")
        else:
            shapes[prefix + name] = tuple(np.shape(value))
    return shapes


@pytest.mark.parametrize("stage", [None, (0, 2), (1, 2)], ids=["whole", "first", "last"])
@pytest.mark.parametrize("name", ZOO)
def test_parameter_paths_and_shapes_are_the_same_on_both_sides_and_in_the_table(name, stage, tmp_path):
    jax_models, torch_models = map(import_module, ("jax_models", "torch_models"))
    path = make_checkpoint(name, tmp_path / "checkpoint")
    table = {spec.name: spec.shape for spec in specs_of(open_checkpoint(path).config, Stage.of(stage))}
    ours = flat(jax_models.load(path, stage=stage).weights)
    torch_model = torch_models.load(path, stage=stage)
    theirs = {name: tuple(parameter.shape) for name, parameter in torch_model.named_parameters()}
    assert ours == table
    assert theirs == table
