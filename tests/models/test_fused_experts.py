"""Experts in every form that exporters write: the same weights on both backends, and the same bytes again on export."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loaders import CheckpointError, open_checkpoint
from loaders.config import config_from_json
from loaders.digest import digests
from loaders.expand import expand
from loaders.families import family_module
from loaders.reading.filling import Filling
from loaders.reading.plan import LoadPlan, plan_load
from loaders.spec import Form
from loaders.stage import Stage
from loaders.writing.writer import TensorType, write_checkpoint
from parity.lifecycle.lending import lent
from parity.zoo import make_checkpoint, zoo_config

FORMS: tuple[Form, ...] = ("fused", "fused transposed", "per expert")
SMALL = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
WIDTHS = {"plain": 24, "gate_up square": 20, "down square": 40}  # of hidden_size 40
EXPERTS = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``made(form, width)``: a checkpoint, made once."""
    directory = tmp_path_factory.mktemp("experts")

    def make(form: Form, width: int = 24) -> Path:
        path = directory / f"{form} {width}"
        if not path.exists():
            options = {"experts": form, "draft_experts": form, "dtype": "BF16", "max_file_bytes": 1 << 17}
            make_checkpoint("qwen3_5-moe", path, moe_intermediate_size=width, **options, **SMALL)
        return path

    return make


def parameters(backend: str, path: Path) -> dict[str, bytes]:
    """The bytes of every parameter by name, the draft's with them."""
    model = importlib.import_module(f"{backend}_models").load(path, mtp=True)
    if backend == "torch":
        from torch_models.storage import host_view

        return {name: host_view(param).tobytes() for name, param in model.named_parameters()}
    from jax_models.weights import flatten

    return {name: np.asarray(param).tobytes() for name, param in flatten(model.weights).items()}


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_every_form_loads_to_the_same_bits(made: Any, backend: str, width: int) -> None:
    found = {form: parameters(backend, made(form, width)) for form in FORMS}
    assert found["fused"] == found["per expert"]
    assert found["fused transposed"] == found["per expert"]


def test_both_backends_load_the_same_bits(made: Any) -> None:
    for form in FORMS:
        assert parameters("torch", made(form)) == parameters("jax", made(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_what_is_exported_is_in_the_form_it_came_in_bit_for_bit(
    made: Any, backend: str, form: Form, tmp_path: Path
) -> None:
    path = made(form)
    model = importlib.import_module(f"{backend}_models").load(path, mtp=True)
    model.export(tmp_path / "again")
    for file in path.glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_model_reloads_from_one_form_into_another_and_exports_that(made: Any, backend: str, tmp_path: Path) -> None:
    model = importlib.import_module(f"{backend}_models").load(made("fused"), mtp=True)
    expected = model.digests()
    for form in ("fused transposed", "per expert", "fused transposed"):
        model = model.update_weights_from_disk(made(form))
        found = model.digests()
        assert found == on_disk(made(form))
    assert expected == on_disk(made("fused"))


def on_disk(path: Path) -> dict[str, str]:
    checkpoint = open_checkpoint(path)
    return digests((name, checkpoint.read(name)) for name in checkpoint.tensors)


def test_the_layout_does_not_matter_to_what_is_computed(made: Any) -> None:
    import torch_models

    ids = [[3, 14, 15, 92, 65, 35]]
    logits = {form: np.asarray(torch_models.load(made(form))(ids)) for form in FORMS}
    np.testing.assert_array_equal(logits["fused transposed"], logits["fused"])
    np.testing.assert_array_equal(logits["per expert"], logits["fused"])


def test_quantising_while_reading_does_not_see_the_form(tmp_path: Path) -> None:
    import torch_models

    sizes = SMALL | {"moe_intermediate_size": 32, "hidden_size": 64}
    found = {}
    for form in FORMS:
        path = make_checkpoint("qwen3_5-moe", tmp_path / form, dtype="BF16", experts=form, draft_experts=form, **sizes)
        found[form] = torch_models.load(path, quantize="nvfp4").digests()
        with lent():
            assert torch_models.load(path, quantize="nvfp4").digests() == found[form]
    assert found["fused transposed"] == found["fused"] == found["per expert"]
    assert f"{EXPERTS}4.up_proj.weight_scale" in found["fused"]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_it_loads_the_same_from_a_source_that_lends_its_buffers(made: Any, backend: str) -> None:
    for form in FORMS:
        owed = parameters(backend, made(form))
        for seed in range(3):
            with lent(seed):
                assert parameters(backend, made(form)) == owed
    model = importlib.import_module(f"{backend}_models").load(made("fused"))
    with lent():
        model = model.update_weights_from_disk(made("per expert"))
    assert model.digests().items() <= on_disk(made("per expert")).items()


# How much memory it takes

PEAK = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
backend, uri, small = sys.argv[1:]
models = __import__(f"{backend}_models")
models.load(small)  # what is imported and set up once for good
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
before = status("VmRSS")
model = models.load(uri)
print(status("VmHWM") - before, sum(info.num_bytes for info in model.checkpoint.tensors.values()))
"""


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=() if form == "fused transposed" else pytest.mark.slow) for form in FORMS],
)
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_no_second_copy_of_a_stack_is_made(made: Any, backend: str, form: Form, tmp_path: Path) -> None:
    """The largest tensor has 48 MiB of 72: a copy of it is 24 beyond. The bar allows it, and 256 MiB.

    What is stored transposed goes through 8 MiB of staging in each of the two threads that read on two cores.
    """
    sizes = {"hidden_size": 512, "moe_intermediate_size": 768, "num_experts": 32, "num_hidden_layers": 1}
    path = large_checkpoint(tmp_path / "c", form, sizes | {"layer_types": ["full_attention"]})
    command = [sys.executable, "-c", PEAK, backend, str(path), str(made(form))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, parameters = map(int, done.stdout.split())
    assert growth < parameters + (20 << 20)


def large_checkpoint(to: Path, form: Form, sizes: dict[str, Any]) -> Path:
    """Of zeros, which are quick to write; memory that they are read into is touched like any other."""
    document = zoo_config("qwen3_5-moe", dtype="BF16", **sizes)
    config, problems = config_from_json(document)
    assert config is not None, problems
    rules = [rule for rule in family_module(config.architecture).RULES if rule.form in ("", form)]
    plan = {s.tensor: TensorType("BF16", spec.tensor_shape) for spec in expand(rules, config) for s in spec.placements}
    return write_checkpoint(to, plan, lambda name: np.zeros(plan[name].shape, ml_dtypes.bfloat16), config=document)


# What transformers writes, and what the published Qwen3-VL-MoE makes of it


@pytest.fixture(scope="module", params=[8, 16], ids=["gate_up square", "down square"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``written(form)``, and transformers' own parameters; hidden_size 16, so that either matrix may be square."""
    import torch
    from qwen3_5_cases import MOE, Case, in_form, reference_model, write
    from safetensors.torch import load_file, save_file

    directory = tmp_path_factory.mktemp("written")
    sizes = {"hidden_size": 16, "moe_intermediate_size": request.param, "num_hidden_layers": 1}
    case = Case(MOE | sizes | {"layer_types": ["full_attention"], "dtype": "bfloat16"}, torch.bfloat16)
    theirs = dict(reference_model(write(case, directory / "fused"), torch.bfloat16).named_parameters())

    def lay_out(form: Form) -> Path:
        path = directory / form
        if not path.exists():
            shutil.copytree(directory / "fused", path)
            tensors = in_form(load_file(path / "model.safetensors"), "per expert" if form == "per expert" else "fused")
            if form == "fused transposed":
                turned = {name: x.transpose(1, 2).contiguous() for name, x in tensors.items() if ".experts." in name}
                tensors |= turned
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return lay_out, theirs


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_experts_of_every_form_are_transformers_own(written: Any, backend: str) -> None:
    from torch_models.storage import host_view

    lay_out, theirs = written
    for form in FORMS:
        found = parameters(backend, lay_out(form))
        for name in (EXPERTS.replace("1", "0") + leaf for leaf in ("gate_up_proj", "down_proj")):
            assert found[name] == host_view(theirs[name]).tobytes(), (form, name)


# What is missing, and what is there twice


def rewritten(path: Path, to: Path, *, without: Any = (), more: dict[str, np.ndarray] | None = None) -> Path:
    checkpoint = open_checkpoint(path)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors if name not in without} | (more or {})
    plan = {name: TensorType.of(array) for name, array in tensors.items()}
    return write_checkpoint(to, plan, tensors.__getitem__, config=checkpoint.config_document)


def problems_of(path: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        plan_load(open_checkpoint(path), Stage())
    return list(caught.value.problems)


def test_missing_experts_are_named_with_their_shard(made: Any, tmp_path: Path) -> None:
    gone = [f"{EXPERTS}{expert}.up_proj.weight" for expert in (0, 1, 2, 4)] + [f"{EXPERTS}3.gate_proj.weight"]
    gone += [f"{EXPERTS}{expert}.down_proj.weight" for expert in (1, 3)]
    assert problems_of(rewritten(made("per expert"), tmp_path / "c", without=gone)) == [
        f"tensor '{EXPERTS}3.gate_proj.weight' is missing: expert 3, shard 0 of '{EXPERTS}gate_up_proj'."
        " Is the checkpoint complete?",
        f"4 tensors '{EXPERTS}0.up_proj.weight' to '{EXPERTS}4.up_proj.weight' are missing: experts 0 to 2, 4, shard 1"
        f" of '{EXPERTS}gate_up_proj'. Is the checkpoint complete?",
        f"2 tensors '{EXPERTS}1.down_proj.weight' to '{EXPERTS}3.down_proj.weight' are missing: experts 1, 3"
        f" of '{EXPERTS}down_proj'. Is the checkpoint complete?",
    ]


@pytest.mark.parametrize("form", ["fused", "fused transposed"])
def test_experts_that_two_forms_give_are_named(made: Any, form: Form, tmp_path: Path) -> None:
    single = open_checkpoint(made("per expert"))
    twice = [f"{EXPERTS}{expert}.gate_proj.weight" for expert in (1, 2)] + [f"{EXPERTS}4.down_proj.weight"]
    more = {name: single.read(name) for name in twice}
    assert problems_of(rewritten(made(form), tmp_path / "c", more=more)) == [
        f"tensors like '{EXPERTS}1.gate_proj.weight' are there beside '{EXPERTS}gate_up_proj': experts 1 to 2, shard 0"
        f" of '{EXPERTS}gate_up_proj' twice. Which one is meant?",
        f"tensor '{EXPERTS}4.down_proj.weight' is there beside '{EXPERTS}down_proj': expert 4 of '{EXPERTS}down_proj'"
        " twice. Which one is meant?",
    ]


def test_one_matrix_each_way_round_is_an_error(made: Any, tmp_path: Path) -> None:
    down = open_checkpoint(made("fused transposed")).read(f"{EXPERTS}down_proj")
    (problem,) = problems_of(rewritten(made("fused"), tmp_path / "c", more={f"{EXPERTS}down_proj": down}))
    assert problem.startswith(f"tensor '{EXPERTS}down_proj' has shape (5, 24, 40), expected (5, 40, 24)")


@pytest.fixture
def plan(made: Any) -> LoadPlan:
    return plan_load(open_checkpoint(made("per expert")), Stage())


def filled(filling: Filling, tensors: list[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What a load of ``tensors`` writes."""
    params: dict[str, np.ndarray] = {}
    for spec, source, array, _ in filling.receive(iter(tensors)):
        filling.write(params.setdefault(spec.name, np.zeros(spec.shape, array.dtype)), spec, source, array)
    return params


def test_an_expert_that_is_delivered_twice_is_named(plan: LoadPlan) -> None:
    tensors = list(plan.checkpoint.stream(names=plan.tensors))
    again = next(pair for pair in tensors if pair[0] == f"{EXPERTS}3.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"delivered twice: expert 3, shard 1 of 'model.layers.1.*gate_up_proj'"):
        filled(Filling(plan), [*tensors, again])


def test_experts_that_are_never_delivered_are_named(plan: LoadPlan) -> None:
    late = {f"{EXPERTS}{expert}.gate_proj.weight" for expert in (0, 1)}
    filling = Filling(plan)
    filled(filling, [pair for pair in plan.checkpoint.stream(names=plan.tensors) if pair[0] not in late])
    with pytest.raises(CheckpointError, match="were never delivered: experts 0 to 1, shard 0 of") as caught:
        filling.finish()
    assert len(caught.value.problems) == 1


def test_every_load_counts_from_nothing(plan: LoadPlan) -> None:
    """The same objects: a second load is neither complete before it began, nor refused as a repetition."""
    filling, tensors = Filling(plan), list(plan.checkpoint.stream(names=plan.tensors))
    with pytest.raises(CheckpointError, match="not asked for"):
        filled(filling, [*tensors[:9], ("no such tensor", tensors[0][1])])
    first = filled(filling, tensors)
    assert filling.finish().num_tensors == len(plan.targets)
    second = filled(filling, tensors[::-1])
    assert filling.finish().num_tensors == len(plan.targets)
    assert {name: param.tobytes() for name, param in first.items()} == {
        name: param.tobytes() for name, param in second.items()
    }
    filled(filling, tensors[:-1])
    with pytest.raises(CheckpointError, match="never delivered"):
        filling.finish()
