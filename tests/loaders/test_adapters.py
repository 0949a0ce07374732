"""Adapters that are refused, each for all of its reasons at once; and how options of PEFT are read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.numpy import load_file, save_file

from loaders import CheckpointError, open_checkpoint
from loaders.adapters.config import read_adapter_config
from loaders.adapters.files import AdapterFiles
from loaders.adapters.merging import merged
from loaders.adapters.opening import open_adapter
from loaders.adapters.roster import NONE, Roster
from loaders.adapters.sites import sites_of
from loaders.sources import LocalDirectory, Unreachable
from loaders.sources.positioned import LocalFile
from parity.zoo import make_checkpoint
from parity.zoo.adapters import ATTENTION, EXPERTS, TABLES, make_adapter

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("base") / "checkpoint", num_hidden_layers=2)


@pytest.fixture
def adapter(base, tmp_path):
    return make_adapter(base, tmp_path / "adapter", targets=(*ATTENTION, *TABLES))


def edit(adapter, change=None, **document):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | document))
    if change is not None:
        tensors = dict(load_file(adapter / "adapter_model.safetensors"))
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")


def problems(base, adapter):
    checkpoint = open_checkpoint(base)
    with pytest.raises(CheckpointError) as error:
        open_adapter(adapter, checkpoint.config, read_base=checkpoint.read)
    return error.value.problems


def test_a_good_adapter_has_an_update_for_every_target(base, adapter):
    opened = open_adapter(adapter, open_checkpoint(base).config)
    layers = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ATTENTION]
    assert set(opened.low_rank) == {"model.embed_tokens", "lm_head", *layers}
    assert opened.low_rank["model.embed_tokens"].a.shape == (4, 211)
    assert opened.low_rank["lm_head"].b.shape == (211, 4)
    assert {one.scaling for one in opened.low_rank.values()} == {1.5}


def test_only_where_no_config_is_it_asks_whether_this_is_an_adapter(base, adapter):
    path = adapter / "adapter_config.json"
    path.unlink()
    assert "adapter_config.json cannot be read: No such file or directory. Is this a PEFT adapter?" in problems(
        base, adapter
    )
    path.mkdir()
    assert "adapter_config.json cannot be read: it is not a regular file" in problems(base, adapter)


def test_everything_that_is_wrong_is_told_at_once(base, adapter):
    q = PREFIX + "model.layers.0.self_attn.q_proj."

    def spoil(tensors):
        del tensors[q + "lora_A.weight"]  # a half
        tensors[PREFIX + "model.layers.7.self_attn.q_proj.lora_A.weight"] = np.ones(
            (4, 40), np.float32
        )  # no such layer
        k = PREFIX + "model.layers.0.self_attn.k_proj.lora_A.weight"
        tensors[k] = np.ones((4, 44), np.float32)  # another model
        v = PREFIX + "model.layers.0.self_attn.v_proj.lora_B.weight"
        tensors[v] = tensors[v].astype(np.int32)
        o = PREFIX + "model.layers.0.self_attn.o_proj.lora_A.weight"
        tensors[o] = np.full_like(tensors[o], np.nan)
        tensors["stranger"] = np.ones(1, np.float32)
        tensors[PREFIX + "model.layers.0.mlp.up_proj.lora_A.weight"] = np.ones((4, 40), np.float32)  # not targeted
        table = PREFIX + "model.embed_tokens.base_layer.weight"
        tensors[table] = np.ones((211, 40), np.float32)  # another base

    edit(adapter, spoil, base_model_name_or_path="someone/else")
    found = "\n".join(problems(base, adapter))
    for told in (
        "lora_A of 'model.layers.0.self_attn.q_proj' is missing, lora_B is there",
        "model.layers.7.self_attn.q_proj.lora_A.weight' is unexpected: the model has no such module",
        "k_proj.lora_A.weight' has shape (4, 44), expected (4, 40)",
        "someone/else",
        "v_proj.lora_B.weight' is I32",
        "o_proj.lora_A.weight' holds values that are not finite",
        "'stranger' is unexpected",
        "up_proj.lora_A.weight' is unexpected: adapter_config.json does not target it",
        "base_layer.weight' differs from the model's 'model.embed_tokens.weight'",
    ):
        assert told in found


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"r": 5}, "has shape (4, 40), expected (5, 40) from r"),
        ({"rank_pattern": {"q_proj": 2}}, "expected (2, 40) from r"),
        ({"use_dora": True}, "use_dora=True is not implemented"),
        ({"bias": "all"}, "bias='all' is not implemented"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "begins by changing the base's weights"),
        ({"a_new_option": 1}, "a_new_option=1 is not implemented"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"r": 0}, "r is 0, expected an integer from 1"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a finite number"),
        (
            {"target_modules": [*ATTENTION, *TABLES, "w_proj"]},
            "target_modules names 'w_proj', which no module is called",
        ),
        ({"target_modules": r"(q_proj"}, "expected a regular expression"),
        ({"target_modules": [*ATTENTION, *TABLES, "up_proj"]}, "lora_A and lora_B of 'model.layers.0.mlp.up_proj'"),
        ({"modules_to_save": ["norm"]}, "tensor 'model.norm.weight' is missing: modules_to_save"),
        ({"modules_to_save": ["tower"]}, "modules_to_save names 'tower'"),
        ({"rank_pattern": {"q_proj": "two"}}, "expected an integer"),
        ({"kasa_config": {}}, "kasa_config={} is not implemented"),  # PEFT: on, with defaults
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_are_not_done_are_refused_by_name(base, adapter, document, told):
    edit(adapter, **document)
    assert any(told in problem for problem in problems(base, adapter)), problems(base, adapter)


def test_a_pickle_is_never_read(base, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    (problem,) = problems(base, adapter)
    assert "is a pickle, which can run any code and is never read" in problem


def test_hostile_files_are_refused(base, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    (problem,) = problems(base, adapter)
    assert "header claims" in problem
    (adapter / "adapter_config.json").write_bytes(b'{"r": 1, "r": 2}')
    assert any("more than once" in problem for problem in problems(base, adapter))


def test_a_file_that_is_rewritten_while_it_is_read_is_an_error(base, adapter, monkeypatch):
    weights, read_into = adapter / "adapter_model.safetensors", LocalFile.read_into

    def rewritten(file, out, position):
        half = len(out) // 2
        read_into(file, out[:half], position)
        if file.name == weights.name:
            weights.write_bytes(weights.read_bytes()[:-64] + bytes(64))
        read_into(file, out[half:], position + half)

    monkeypatch.setattr(LocalFile, "read_into", rewritten)
    assert "changed since the adapter was opened" in problems(base, adapter)[0]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_replaced_while_the_others_are_read_is_an_error(base, adapter, monkeypatch, name):
    read, replaced = AdapterFiles.read, []

    def replacing(files, tensor):
        if not replaced:
            replaced.append(name)
            (adapter / "new").write_bytes((adapter / name).read_bytes())
            (adapter / "new").rename(adapter / name)
        return read(files, tensor)

    monkeypatch.setattr(AdapterFiles, "read", replacing)
    assert any("changed since the adapter was opened" in problem for problem in problems(base, adapter))
    assert replaced


@pytest.mark.parametrize(("size", "kept"), [(8, 2), (1000, 1), (1500, 3), (1 << 20, 8)])
def test_an_adapter_read_in_blocks_is_the_same(base, adapter, monkeypatch, size, kept):
    config = open_checkpoint(base).config
    expected = open_adapter(adapter, config)
    monkeypatch.setattr("loaders.adapters.files.BLOCK_BYTES", size)
    monkeypatch.setattr("loaders.adapters.files.BLOCKS_KEPT", kept)
    held, block = [], AdapterFiles._block

    def counted(files, index):
        found = block(files, index)
        held.append(len(files._blocks))
        return found

    monkeypatch.setattr(AdapterFiles, "_block", counted)
    found = open_adapter(adapter, config)
    assert found.digest == expected.digest
    assert found.low_rank
    assert max(held, default=0) <= kept
    assert bool(held) == (size > 8)  # larger tensors come by themselves


def test_a_directory_that_is_not_there_is_refused(base, tmp_path):
    assert "cannot be opened" in problems(base, tmp_path / "nothing")[0]


def test_the_bases_table_beside_an_update_is_left_out_when_it_is_the_same(base, adapter):
    name = PREFIX + "model.embed_tokens.base_layer.weight"
    checkpoint = open_checkpoint(base)
    edit(adapter, lambda tensors: tensors.update({name: checkpoint.read("model.embed_tokens.weight")}))
    assert open_adapter(adapter, checkpoint.config, read_base=checkpoint.read).left_out == (name,)


def test_a_text_models_adapter_may_be_spelled_as_the_wrappers(tmp_path):
    options = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    path = make_checkpoint("qwen3_5-wrapped", tmp_path / "checkpoint", **options)
    config = open_checkpoint(path).config
    ours, theirs = (
        open_adapter(make_adapter(path, tmp_path / name, targets=("q_proj", "embed_tokens"), text_path=name), config)
        for name in ("model.language_model", "model")
    )
    assert ours.digest == theirs.digest
    assert "model.language_model.embed_tokens" in ours.low_rank


def test_experts_one_by_one_are_what_they_are_fused(tmp_path):
    """As transformers 4 had them; A of gate and up are shared where they are fused, and here one each."""
    path = make_checkpoint("qwen3-moe", tmp_path / "checkpoint", num_hidden_layers=1, mlp_only_layers=[])
    config = open_checkpoint(path).config
    fused = make_adapter(path, tmp_path / "fused", targets=("q_proj",), parameters=EXPERTS)
    whole = open_adapter(fused, config)
    single = tmp_path / "single"
    single.mkdir()
    document = json.loads((fused / "adapter_config.json").read_text())
    document |= {"target_parameters": None, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    (single / "adapter_config.json").write_text(json.dumps(document))
    tensors = {name: x for name, x in load_file(fused / "adapter_model.safetensors").items() if "q_proj" in name}
    experts = "model.layers.0.mlp.experts"
    for expert in range(5):
        for part, name in enumerate(("gate_proj", "up_proj")):
            update = whole.low_rank[f"{experts}.gate_up_proj"]
            tensors[f"{PREFIX}{experts}.{expert}.{name}.lora_A.weight"] = update.a[expert, part].copy()
            tensors[f"{PREFIX}{experts}.{expert}.{name}.lora_B.weight"] = update.b[expert, part].copy()
        update = whole.low_rank[f"{experts}.down_proj"]
        tensors[f"{PREFIX}{experts}.{expert}.down_proj.lora_A.weight"] = update.a[expert].copy()
        tensors[f"{PREFIX}{experts}.{expert}.down_proj.lora_B.weight"] = update.b[expert].copy()
    save_file(tensors, single / "adapter_model.safetensors")
    found = open_adapter(single, config)
    for path, update in whole.low_rank.items():
        np.testing.assert_allclose(found.low_rank[path].delta(), update.delta(), rtol=1e-5, atol=1e-6)


def test_a_merge_rounds_once(base, adapter):
    update = open_adapter(adapter, open_checkpoint(base).config).low_rank["lm_head"]
    weight = open_checkpoint(base).read("lm_head.weight")
    delta = update.scaling * (update.b.astype(np.float64) @ update.a.astype(np.float64))
    np.testing.assert_allclose(merged(weight, update), weight + delta, rtol=2e-6, atol=1e-6)
    half = weight.astype(np.float16)
    one_rounding = (half.astype(np.float32) + update.delta()).astype(np.float16)
    np.testing.assert_array_equal(merged(half, update), one_rounding)


def test_patterns_are_read_in_the_order_of_the_document_and_match_ends_of_paths():
    document = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    patterns = {"rank_pattern": {"1.self_attn.q_proj": 2, "q_proj": 4}, "alpha_pattern": {"^model.layers.0.*": 1}}
    config, found = read_adapter_config(document | patterns)
    assert not found
    ranks = [config.rank(f"model.layers.{layer}.self_attn.q_proj") for layer in (0, 1, 11)]
    assert ranks == [4, 2, 4]  # layer 11 does not end with ".1.self_attn.q_proj"
    assert config.scaling("model.layers.1.self_attn.q_proj") == 8.0
    assert config.rank("model.layers.1.self_attn.k_proj") == 8


def test_what_is_empty_is_off_where_peft_takes_it_so():
    empty = {"loftq_config": {}, "alora_invocation_tokens": [], "layers_pattern": ""}
    config, found = read_adapter_config({"peft_type": "LORA", "target_modules": ["q_proj"], **empty})
    assert found == []
    assert config.layers_pattern == ()


@pytest.mark.parametrize(("layers", "expected"), [(1, [1]), ([0], [0]), (None, [0, 1])])
def test_layers_to_transform_choose_layers(layers, expected):
    document = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    config, _ = read_adapter_config(document | {"layers_to_transform": layers})
    assert [layer for layer in (0, 1) if config.targets(f"model.layers.{layer}.self_attn.q_proj")] == expected


@pytest.mark.parametrize("pattern", ["layers|h", ["layers|h"], "h|layers"])
def test_a_pattern_of_layers_that_finds_no_number_targets_nothing_as_in_peft(pattern):
    document = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    chosen = {"layers_to_transform": [0, 1], "layers_pattern": pattern}
    config, _ = read_adapter_config(document | chosen)
    theirs = LoraConfig(target_modules=["q_proj"], **chosen)
    for name in ("model.layers.0.self_attn.q_proj", "model.h.1.self_attn.q_proj"):
        assert config.targets(name) == bool(check_target_module_exists(theirs, name)), name


def test_every_linear_layer_embedding_and_head_is_a_site(base):
    found = sites_of(open_checkpoint(base).config)
    assert {site.path for site in found.low_rank.values() if not site.is_plain} == {"model.embed_tokens", "lm_head"}
    assert len(found.low_rank) == 2 * 7 + 2


def test_a_roster_gives_slots_keeps_room_and_says_whose_row_is_whose(base, tmp_path):
    config = open_checkpoint(base).config
    small, large = (
        open_adapter(make_adapter(base, tmp_path / str(rank), rank=rank, targets=("q_proj",)), config)
        for rank in (4, 20)
    )
    roster = Roster().having(small, "a", 2)
    assert (roster.layout.slots, set(roster.layout.ranks.values())) == (4, {8})
    assert roster.having(small, "a", 3).layout == roster.layout
    roster = roster.having(large, "b", 3)
    assert (roster.layout.slots, set(roster.layout.ranks.values())) == (4, {32})
    assert roster.rows(["b", None, "a"], 3).tolist() == [1, NONE, 0]
    assert roster.rows(None, 2).tolist() == [1, 1]
    kept = roster.lacking("b")
    assert kept.layout == roster.layout
    assert kept.having(small, "c", 4)["c"].slot == 1
    assert kept.lacking("a").layout == Roster().layout
    with pytest.raises(ValueError, match="no adapter is called 'z'. Attached: 'a', 'b'"):
        roster.rows("z", 1)
    with pytest.raises(ValueError, match="adapter names 2 rows"):
        roster.rows(["a", "b"], 3)


def test_names_that_mean_nothing_are_told_of_also_where_they_are_there_twice(base, adapter):
    ones = np.ones((2, 2), np.float32)
    edit(adapter, lambda tensors: tensors.update({"junk.modules_to_save.weight": ones, "junk.weight": ones}))
    assert any("'junk.weight' is unexpected" in problem for problem in problems(base, adapter))


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"])
def test_a_tensor_called_as_a_module_is_unexpected(base, adapter, module):
    edit(adapter, lambda tensors: tensors.update({PREFIX + module: np.ones((2, 2), np.float32)}))
    assert problems(base, adapter) == (
        f"tensor {PREFIX + module!r} is unexpected: adapter_config.json does not target it",
    )


def test_a_server_that_is_asked_in_vain_is_not_a_file_that_is_gone(base, adapter, monkeypatch):
    def silent(self, name):
        raise Unreachable("an answer did not come")

    config = open_checkpoint(base).config
    monkeypatch.setattr(LocalDirectory, "identity", silent)
    with pytest.raises(CheckpointError) as caught:
        open_adapter(adapter, config)
    assert caught.value.problems == ("adapter_config.json cannot be asked about: an answer did not come",)
