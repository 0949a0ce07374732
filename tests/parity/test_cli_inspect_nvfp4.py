"""``tandem inspect`` of what is quantised, and of a config.json without weights."""

import json
import os
import subprocess
import sys

import pytest

from loaders import open_checkpoint
from loaders.reading.plan import specs_of
from loaders.stage import Stage
from parity.cli import main
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, zoo_config

GIB = 2**30
# what the seed's model has, as a Qwen3-MoE
KIMI = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "num_experts": 384,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


def nvfp4(*excluded):
    return {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", *excluded]}}


def inspected(capsys, *arguments):
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def abstract(directory, document, beside=None):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(document))
    if beside is not None:
        (directory / "hf_quant_config.json").write_text(json.dumps(beside))
    return directory


@pytest.mark.parametrize("attention", [(), ("*self_attn*",)], ids=["all linears", "experts only"])
@pytest.mark.slow_unless("all linears")
def test_aliasing_saves_15_gib_per_rank_at_the_sizes_of_the_seed(attention, tmp_path, capsys):
    found = inspected(capsys, abstract(tmp_path / "k", KIMI, nvfp4(*attention)), "--expert", 4)
    (stage,) = found["stages"]
    experts = 61 * 384 * 3 * 2048 * 7168 // 16 // 4
    others = 0 if attention else 61 * 2 * 7168 * (64 + 8) * 128 // 16 // 4
    assert stage["quantised"]["block_scale_bytes"] == experts + others
    assert experts / GIB == pytest.approx(15.0, abs=0.05)
    assert found["quantisation"]["schemes"]["NVFP4 with quantised inputs"] == 61 * (1 if attention else 5)


def test_the_saving_is_said_in_words(tmp_path, capsys):
    directory = abstract(tmp_path / "k", KIMI | {"num_hidden_layers": 4}, nvfp4("*self_attn*"))
    assert main(["inspect", str(directory), "--expert", "2", "--tensor", "2"]) == 0
    text = capsys.readouterr().out
    assert (
        "block scales: 0.98 GiB per device; a second, swizzled copy would cost as much: aliasing saves 0.98 GiB" in text
    )
    assert "4 x model.layers.*.self_attn.q_proj" in text


def test_one_device_needs_no_framework(tmp_path):
    directory = abstract(tmp_path / "k", KIMI | {"num_experts": 8}, nvfp4())
    code = "import sys; from parity.cli import main; code = main(['inspect', sys.argv[1]])"
    code += "; assert not {'jax', 'torch'} & set(sys.modules); sys.exit(code)"
    assert (
        subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.parametrize("how", [{}, {"fp8": ("*self_attn*",), "kv_cache": True}, {"spelling": "compressed-tensors"}])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "qwen3_5-moe"])
def test_a_config_alone_says_the_bytes_that_the_checkpoint_has(name, how, tmp_path, capsys):
    directory = make_checkpoint(
        name, tmp_path / "q", dtype="BF16", quantization=ZooQuantization(**how), **block_sizes(name)
    )
    whole = inspected(capsys, directory)
    document = json.loads((directory / "config.json").read_text())
    (tmp_path / "alone.json").write_text(json.dumps(document))
    alone = inspected(capsys, tmp_path / "alone.json")
    assert alone["quantisation"] == whole["quantisation"]
    a, b = alone["stages"][0], whole["stages"][0]
    assert a["quantised"] == b["quantised"]
    assert (a["parameters"], a["tensors_loaded"]) == (b["parameters"], b["tensors_loaded"])
    float32 = sum(  # some are published in float32 whatever the others are
        info.num_bytes // 2
        for tensor, info in open_checkpoint(directory).tensors.items()
        if is_plain_float32(tensor, info)
    )
    assert a["bytes"] == b["bytes"] - float32


def is_plain_float32(tensor, info):
    return info.dtype == "F32" and tensor.endswith(("A_log", "linear_attn.norm.weight"))


def test_bytes_saved_are_those_against_bfloat16(tmp_path, capsys):
    directory = make_checkpoint("qwen3", tmp_path / "q", quantization=ZooQuantization(), **block_sizes("qwen3"))
    found = inspected(capsys, directory)
    tensors = open_checkpoint(directory).tensors
    codes = sum(info.num_bytes for info in tensors.values() if info.dtype == "U8")
    blocks = sum(info.num_bytes for info in tensors.values() if info.dtype == "F8_E4M3")
    scalars = sum(info.num_bytes for info in tensors.values() if info.shape == ())
    (stage,) = found["stages"]
    assert stage["quantised"]["bytes"] == codes + blocks + scalars
    assert stage["quantised"]["bytes_in_bfloat16"] == 4 * codes
    assert stage["quantised"]["bytes_saved"] == 3 * codes - blocks - scalars
    assert stage["quantised"]["block_scale_bytes"] == blocks == codes // 8
    assert stage["quantised"]["left_alone"] == ["lm_head"]
    assert found["quantisation"] == {
        "format": "modelopt",
        "schemes": {"NVFP4 with quantised inputs": 28},
        "kv_cache": "as computed",
    }


def test_stages_share_out_what_is_saved(tmp_path, capsys):
    directory = make_checkpoint("qwen3", tmp_path / "q", quantization=ZooQuantization(), **block_sizes("qwen3"))
    (whole,) = inspected(capsys, directory)["stages"]
    parts = inspected(capsys, directory, "--stages", 2)["stages"]
    for key in ("bytes", "bytes_saved", "block_scale_bytes"):
        assert sum(part["quantised"][key] for part in parts) == whole["quantised"][key]


def test_a_plain_model_says_nothing_of_block_scales(tmp_path, capsys):
    directory = abstract(tmp_path / "p", zoo_config("qwen3"))
    found = inspected(capsys, directory)
    assert found["quantisation"] == "none"
    assert "quantised" not in found["stages"][0]
    config = open_checkpoint(make_checkpoint("qwen3", tmp_path / "c")).config
    assert found["stages"][0]["parameters"] == len(specs_of(config, Stage()).params)
    assert main(["inspect", str(directory)]) == 0
    assert "a configuration without weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "config.json"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": json.dumps(KIMI | {"num_experts": "many"})}, "num_experts"),
        (
            {"config.json": json.dumps(KIMI), "hf_quant_config.json": json.dumps(nvfp4() | {"quantization": 3})},
            "expected an object",
        ),
        ({"config.json": json.dumps(KIMI), "hf_quant_config.json": "[]"}, "expected an object"),
        ({"config.json": json.dumps(KIMI | {"quantization_config": {"quant_method": "gptq"}})}, "'gptq'"),
    ],
)
def test_a_configuration_that_is_none_is_bad_input(files, words, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main(["inspect", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--expert", "0"), ("--tensor", "-1"), ("--stages", "0"), ("--stages", "99")])
def test_numbers_that_make_no_sense_are_bad_input(options, tmp_path):
    assert main(["inspect", str(abstract(tmp_path / "p", zoo_config("qwen3"))), *options]) == 2


def test_a_checkpoint_may_be_named_by_any_address(tmp_path, capsys):
    directory = make_checkpoint("qwen3", tmp_path / "plain")
    found, plain = inspected(capsys, f"direct://{directory}"), inspected(capsys, directory)
    assert found == plain | {"checkpoint": f"direct://{directory}"}
    alone = abstract(tmp_path / "alone", zoo_config("qwen3"))
    assert inspected(capsys, f"direct://{alone}")["stages"] == inspected(capsys, alone)["stages"]
    assert inspected(capsys, f"direct://{alone}/config.json")["stages"] == inspected(capsys, alone)["stages"]
    called = make_checkpoint("qwen3", tmp_path / "called.json")
    assert inspected(capsys, f"direct://{called}")["stages"] == plain["stages"]
    assert main(["inspect", "s3://"]) == 2
    assert "it names no bucket" in capsys.readouterr().err


def test_what_is_no_json_is_not_read_and_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "config.json")
    assert main(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}: 1 problem" in said
    assert "config.json cannot be read: it is not a regular file" in said
    shard = tmp_path / "model-00001-of-00002.safetensors"
    large = tmp_path / "large.json"
    for file in (shard, large):
        file.touch()
        os.truncate(file, 1 << 40)
    assert main(["inspect", str(shard)]) == 2
    assert "this is one file of a checkpoint, expected its directory, or a config.json" in capsys.readouterr().err
    assert main(["inspect", str(large)]) == 2
    assert "large.json cannot be read: it has 1099511627776 bytes, expected at most" in capsys.readouterr().err
