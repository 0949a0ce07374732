"""Names in adapter_config.json as PEFT matches them, and what is said of those that cannot be had."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loaders import CheckpointError, open_checkpoint
from loaders.adapters.config import read_adapter_config
from loaders.adapters.keys import Nested
from loaders.adapters.opening import open_adapter
from loaders.adapters.sites import sites_of
from parity.zoo import make_checkpoint
from parity.zoo.adapters import ATTENTION, TABLES, make_adapter

PREFIX = "base_model.model."
SINGLE = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The checkpoint of a zoo model, made once."""
    root = tmp_path_factory.mktemp("names")
    options = {"qwen3-moe": {"mlp_only_layers": []}}
    found = {}

    def of(zoo):
        if zoo not in found:
            found[zoo] = make_checkpoint(zoo, root / zoo, num_hidden_layers=2, **options.get(zoo, {}))
        return found[zoo]

    return of


def edited(adapter, change=None, **document):
    path = adapter / "adapter_config.json"
    read = json.loads(path.read_text()) | document
    path.write_text(json.dumps({name: value for name, value in read.items() if value is not ...}))
    if change is not None:
        tensors = dict(load_file(adapter / "adapter_model.safetensors"))
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")
    return adapter


def problems(base, adapter, **options):
    with pytest.raises(CheckpointError) as error:
        open_adapter(adapter, open_checkpoint(base).config, **options)
    return error.value.problems


def per_expert(base, directory, *, targets=("q_proj", *SINGLE), without=(), rank=1, **document):
    """An adapter whose experts have updates one by one, as transformers 4 had them; ``without`` some modules."""
    make_adapter(base, directory, targets=("q_proj",), rank=rank)
    rng, config = np.random.default_rng(0), open_checkpoint(base).config

    def add(tensors):
        for site in sites_of(config).low_rank.values():
            module, _, leaf = site.path.rpartition(".")
            if site.kind != "experts":
                continue
            for expert in range(site.lead[0]):
                for name in SINGLE[:2] if leaf == "gate_up_proj" else SINGLE[2:]:
                    path = f"{module}.{expert}.{name}"
                    if name in targets and not any(path.startswith(one) for one in without):
                        for half, shape in (("A", (rank, site.shape[1])), ("B", (site.shape[0], rank))):
                            tensors[f"{PREFIX}{path}.lora_{half}.weight"] = rng.standard_normal(shape, np.float32)

    return edited(directory, add, **({"target_modules": list(targets)} | document))


def test_opening_experts_one_by_one_takes_time_in_proportion_to_them(made, tmp_path, monkeypatch):
    base = made("qwen3-moe")
    adapter = per_expert(base, tmp_path / "adapter")
    count, equal = iter(range(1 << 20)), Nested.__eq__
    monkeypatch.setattr(Nested, "__eq__", lambda self, other: (next(count), equal(self, other))[1])
    open_adapter(adapter, open_checkpoint(base).config)
    tensors = len(load_file(adapter / "adapter_model.safetensors"))
    assert next(count) <= 4 * tensors


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        (("model.layers.1.mlp.experts",), "of all experts of 'model.layers.1.mlp.experts.down_proj', a target"),
        (("model.layers.1.mlp.experts.2.down_proj",), "lora_A and lora_B of 'model.layers.1.mlp.experts.2.down_proj'"),
    ],
    ids=["a layer", "an expert"],
)
def test_experts_that_are_targeted_are_all_there_or_missed(made, tmp_path, gone, told):
    base = made("qwen3-moe")
    found = problems(base, per_expert(base, tmp_path / "adapter", without=gone))
    assert any(told in problem for problem in found), found


@pytest.mark.parametrize(
    ("options", "experts"),
    [
        ({"without": ("model.layers",)}, 0),  # no expert anywhere: the names are of other modules
        ({"without": ("model.layers.1",), "target_modules": r".*(q_proj|layers\.0.*(gate|up|down)_proj)"}, 2),
        ({"targets": ("q_proj", "down_proj")}, 2),
    ],
    ids=["none", "of a layer", "down alone"],
)
def test_experts_that_are_not_targeted_are_not_missed(made, tmp_path, options, experts):
    base = made("qwen3-moe")
    opened = open_adapter(per_expert(base, tmp_path / "adapter", **options), open_checkpoint(base).config)
    assert len([path for path in opened.low_rank if "experts" in path]) == experts


def test_patterns_see_a_targeted_parameter_by_its_own_name(made, tmp_path):
    """So ``q_proj`` is no pattern of ``q_proj.weight``, as in PEFT."""
    base = made("qwen3")
    patterns = {"alpha_pattern": {"q_proj": 64, "v_proj": 2}, "rank_pattern": {r"layers\.1\..*q_proj.weight": 3}}
    adapter = make_adapter(base, tmp_path / "adapter", targets=("v_proj",), parameters=("q_proj.weight",), **patterns)
    opened = open_adapter(adapter, open_checkpoint(base).config).low_rank
    q, v = ([f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1)] for name in ("q_proj", "v_proj"))
    assert [(opened[path].rank, opened[path].scaling) for path in q] == [(4, 1.5), (3, 2.0)]
    assert [opened[path].scaling for path in v] == [0.5, 0.5]


def test_a_router_is_targeted_by_its_name_or_its_weights(made, tmp_path):
    """A linear layer to transformers 4, where all-linear has it; a parameter to transformers 5."""
    base = made("qwen3-moe")
    named = make_adapter(base, tmp_path / "named", targets=("q_proj", "gate"))
    weight = make_adapter(base, tmp_path / "weight", targets=("q_proj",), parameters=("gate.weight",))
    one, other = (open_adapter(adapter, open_checkpoint(base).config) for adapter in (named, weight))
    assert one.digest == other.digest
    assert {path for path in one.low_rank if "gate" in path} == {f"model.layers.{layer}.mlp.gate" for layer in (0, 1)}
    linear = open_adapter(make_adapter(base, tmp_path / "linear", targets="all-linear"), open_checkpoint(base).config)
    assert not [path for path in linear.low_rank if "gate" in path]


@pytest.mark.parametrize("name", ["norm.weight", "experts.gate_up_proj", "foo.bar", "proj.weight"])
def test_a_parameter_that_nothing_is_called_is_refused(made, tmp_path, name):
    base = made("qwen3")
    adapter = edited(make_adapter(base, tmp_path / "adapter"), target_parameters=[name])
    assert problems(base, adapter)[0].startswith(f"adapter_config.json: target_parameters names {name!r}, which no")


def test_rank_and_alpha_are_pefts_where_nobody_says_them(made, tmp_path):
    base = made("qwen3")
    adapter = edited(make_adapter(base, tmp_path / "adapter", rank=8, alpha=8), r=..., lora_alpha=...)
    opened = open_adapter(adapter, open_checkpoint(base).config).low_rank.values()
    assert {(one.rank, one.scaling) for one in opened} == {(8, 1.0)}


def test_what_is_of_another_kind_of_layer_is_switched_off_as_in_peft(made, tmp_path):
    """fan_in_fan_out is of layers that store [in, out]: PEFT's linear layers unset it, its embeddings ignore it."""
    base = made("qwen3")
    adapter = make_adapter(base, tmp_path / "adapter", targets=("q_proj", *TABLES))
    config = open_checkpoint(base).config
    before = open_adapter(adapter, config).digest
    assert open_adapter(edited(adapter, fan_in_fan_out=True), config).digest == before


@pytest.mark.parametrize("document", [{"lora_alpha": 1e39}, {"alpha_pattern": {"q_proj": -1e39}}], ids=str)
def test_a_scaling_beyond_float32_is_refused(made, tmp_path, document):
    base = made("qwen3")
    (problem,) = problems(base, edited(make_adapter(base, tmp_path / "adapter"), **document))
    assert problem.endswith("1e+39, expected a finite number that float32 holds")


def test_options_and_shapes_are_told_together_and_what_an_option_adds_is_not_called_unexpected(made, tmp_path):
    base = made("qwen3")

    def of_dora(tensors):
        tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = np.ones(60, np.float32)

    adapter = edited(make_adapter(base, tmp_path / "adapter", targets=("q_proj",)), of_dora, use_dora=True, r=5)
    first, *others = problems(base, adapter)
    assert first == "adapter_config.json: use_dora=True is not implemented. Train or merge without it."
    assert len(others) == 4
    assert all("from r and the model's sizes" in problem for problem in others)


@pytest.mark.parametrize("pattern", ["(layers)", "(?:layers)", "(no|layers)"])
def test_a_pattern_of_layers_may_have_groups(pattern):
    document = {"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": [1]}
    config, found = read_adapter_config(document | {"layers_pattern": [pattern]})
    assert config is not None
    assert not found
    assert [layer for layer in (0, 1) if config.targets(f"model.layers.{layer}.self_attn.q_proj")] == [1]


@pytest.mark.parametrize("kind", ["stacks", "one by one"])
def test_whole_experts_are_refused_by_their_name(made, tmp_path, kind):
    base = made("qwen3-moe")
    config = open_checkpoint(base).config

    def add(tensors):
        for name, shape in {
            **{name: shape for name, shape in sites_of(config).whole.items() if ".mlp." in name},
            **{path: site.lead + site.shape for path, site in sites_of(config).low_rank.items() if "experts" in path},
        }.items():
            names = [name.replace("experts.", f"experts.{one}.") + ".weight" for one in range(5)]
            for one in names if kind == "one by one" and "experts" in name else [name]:
                tensors[PREFIX + one] = np.ones(shape, np.float32)

    adapter = make_adapter(base, tmp_path / "adapter", targets=ATTENTION)
    (problem,) = problems(base, edited(adapter, add, modules_to_save=["mlp"]))
    assert "modules_to_save names 'mlp', which holds experts ('model.layers.0.mlp.experts.gate_up_proj'" in problem
    assert "and 3 more): whole experts of an adapter are not implemented. Adapt them by target_param" in problem


TOWER = f"{PREFIX}model.visual."


@pytest.mark.parametrize(
    ("names", "document"),
    [
        (
            ["blocks.0.attn.qkv.lora_A.weight", "blocks.0.attn.qkv.lora_B.weight", "blocks.1.attn.qkv.lora_A.weight"],
            {"target_modules": ["q_proj", "qkv"]},
        ),
        (
            ["merger.norm.weight", "merger.norm.bias", "deepstack_merger_list.0.norm.bias"],
            {"modules_to_save": ["norm"]},
        ),
    ],
    ids=["low rank", "whole"],
)
def test_an_adapter_of_the_vision_tower_is_refused_in_one_sentence(made, tmp_path, names, document):
    base = made("qwen3_vl")
    adapter = make_adapter(base, tmp_path / "adapter", targets=("q_proj",), whole=document.get("modules_to_save", ()))
    edited(adapter, lambda found: found.update({TOWER + name: np.ones(3, np.float32) for name in names}), **document)
    (problem,) = problems(base, adapter)
    assert problem.startswith(
        "adapters of the vision tower are not implemented: it has tensors of 2 modules of 'model.vi"
    )


def test_modules_of_the_tower_may_be_named_where_they_are_excluded(made, tmp_path):
    """As of ``all-linear``, which PEFT saves as the names of all linear modules, the excluded ones too."""
    base = made("qwen3_vl")
    names = {"target_modules": ["q_proj", "qkv", "attn.proj", "linear_fc1"]}
    adapter = edited(
        make_adapter(base, tmp_path / "adapter", targets=("q_proj",)), **names, exclude_modules=".*visual.*"
    )
    assert open_adapter(adapter, open_checkpoint(base).config).low_rank
    adapter = edited(make_adapter(base, tmp_path / "other", targets=("q_proj",)), **names)
    found = problems(base, adapter)
    assert len(found) == 3
    assert "names 'qkv', which only modules of 'model.visual' are called: adapters of the vision tower" in found[0]


def test_names_that_could_be_the_towers_too_are_the_language_models_where_the_file_has_no_others(made, tmp_path):
    """PEFT runs the base's own tower then: an adapter of the language model alone fits the whole one."""
    base = made("qwen3_vl")
    adapter = make_adapter(base, tmp_path / "adapter", targets=("q_proj",), whole=("norm",))
    opened = open_adapter(adapter, open_checkpoint(base).config)
    assert "model.language_model.norm.weight" in opened.whole
