"""``tandem quantize``: what it writes is what ModelOpt would have written, and others' readers read it."""

import json

import numpy as np
import pytest
import torch
from exporter_libs import compressed_tensors_dequantize, modelopt_dequantize, to_numpy, to_torch
from exporters import quiet
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from loaders import CheckpointError, open_checkpoint
from loaders.nvfp4 import dequantize, global_scale
from loaders.writing.writer import write_checkpoint
from parity.calibrate import calibrate, rows_of
from parity.cli import main
from parity.oracle import oracle_forward
from parity.trace import Trace
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts

HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


def plain(name, directory, **options):
    sizes = block_sizes(name) | (HYBRID if "qwen3_5" in name else {"num_hidden_layers": 2})
    return make_checkpoint(name, directory, **({"dtype": "BF16"} | sizes | options))


def inputs_file(checkpoint, path, **options):
    save_file(prompts(open_checkpoint(checkpoint).config, **({"rows": 2, "tokens": 24} | options)), path)
    return str(path)


def matrices(checkpoint):
    return [name.removesuffix(".weight") for name, info in checkpoint.tensors.items() if info.dtype == "U8"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", {}),
        ("qwen3-tied", {}),
        ("qwen3-moe", {}),
        ("qwen3_5-moe", {}),
        ("qwen3_5-moe", {"experts": "per expert"}),
    ],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_both_libraries_read_what_is_written_to_the_same_values(name, options, calibrated, tmp_path, capsys):
    source = plain(name, tmp_path / "plain", **options)
    given = ["--calibrate", inputs_file(source, tmp_path / "i.safetensors")] if calibrated else []
    assert main(["quantize", str(source), "-o", str(tmp_path / "q"), *given]) == 0
    checkpoint = open_checkpoint(tmp_path / "q")
    stored = {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors}
    converted = compressed(stored)
    assert set(checkpoint.config.quantization.table)
    for module in matrices(checkpoint):
        packed, block, scale = (stored[f"{module}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2"))
        ours = dequantize(packed, block, scale)
        assert np.array_equal(modelopt_dequantize(packed, block, scale), ours), module
        theirs = [converted[f"{module}.{leaf}"] for leaf in ("weight_packed", "weight_scale", "weight_global_scale")]
        # their reader divides by 1 / weight_scale_2, which rounds: one ulp of the scale
        np.testing.assert_allclose(compressed_tensors_dequantize(*theirs), ours, rtol=3e-7, atol=0)
        assert np.array_equal(dequantize(*theirs, divide=True), compressed_tensors_dequantize(*theirs))
        assert (f"{module}.input_scale" in stored) == calibrated == (f"{module}.input_global_scale" in converted)
    text = capsys.readouterr().out
    assert ("NVFP4 with quantised inputs" if calibrated else "NVFP4, weights only") in text
    assert "left alone, the embedding: " in text


def test_tokenizer_template_and_preprocessors_come_along_and_nothing_else(tmp_path):
    source = plain("qwen3", tmp_path / "plain")
    beside = {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
        *("chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.model"),
    }
    for name in (*beside, "README.md", "training_args.bin"):
        (source / name).write_bytes(name.encode() + b"\x00\xff")
    written = {"config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors"}
    assert main(["quantize", str(source), "-o", str(tmp_path / "q")]) == 0
    assert {path.name for path in (tmp_path / "q").iterdir()} == beside | written
    for name in beside:
        assert (tmp_path / "q" / name).read_bytes() == (source / name).read_bytes()
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    assert main(["quantize", str(source), "-o", str(tmp_path / "r")]) != 0
    assert not (tmp_path / "r").exists()


def compressed(stored):
    """The tensors as compressed-tensors' own converter from ModelOpt makes them."""
    with quiet():
        from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter

        modules = [name.removesuffix(".weight_scale_2") for name in stored if name.endswith(".weight_scale_2")]
        converter = ModelOptNvfp4Converter(targets=modules)
        given = {name: np.atleast_1d(array) for name, array in stored.items() if name.rpartition(".")[0] in modules}
        made = converter.process({name: to_torch(array) for name, array in given.items()})
    return {name: to_numpy(tensor) for name, tensor in made.items()}


def test_fused_experts_come_out_one_by_one_and_the_draft_as_it_was(tmp_path):
    source = open_checkpoint(plain("qwen3_5-moe", tmp_path / "plain"))
    assert main(["quantize", str(tmp_path / "plain"), "-o", str(tmp_path / "q")]) == 0
    checkpoint = open_checkpoint(tmp_path / "q")
    fused = source.read("model.layers.1.mlp.experts.gate_up_proj").astype(np.float32)
    for part, name in enumerate(("gate_proj", "up_proj")):
        module = f"model.layers.1.mlp.experts.3.{name}"
        got = dequantize(
            *(checkpoint.read(f"{module}.{leaf}") for leaf in ("weight", "weight_scale", "weight_scale_2"))
        )
        expected = fused[3].reshape(2, -1, fused.shape[-1])[part]
        assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.13
    drafts = [name for name in source.tensors if name.startswith("mtp.")]
    assert drafts
    assert all(checkpoint.read(name).tobytes() == source.read(name).tobytes() for name in drafts)


def test_inputs_have_the_scale_of_the_largest_that_the_oracle_saw_on_real_tokens(tmp_path):
    source = plain("qwen3", tmp_path / "plain")
    inputs = inputs_file(source, tmp_path / "i.safetensors", padding="left")
    assert main(["quantize", str(source), "-o", str(tmp_path / "q"), "--calibrate", inputs]) == 0
    checkpoint, given = (
        open_checkpoint(tmp_path / "q"),
        prompts(open_checkpoint(source).config, rows=2, tokens=24, padding="left"),
    )
    hidden = oracle_forward(open_checkpoint(source), **given)["final_hidden_state"]
    assert np.isfinite(hidden).all()
    x_BTD = oracle_forward(open_checkpoint(source), **given)["hidden_states.0"]
    weight = open_checkpoint(source).read("model.layers.0.input_layernorm.weight").astype(np.float64)
    normed = weight * x_BTD / np.sqrt(np.mean(x_BTD**2, axis=-1, keepdims=True) + checkpoint.config.rms_norm_eps)
    amax = np.abs(normed[given["attention_mask"] == 1]).max()
    assert amax < np.abs(normed).max() * 1.0000001
    for name in ("q_proj", "k_proj", "v_proj"):
        assert checkpoint.read(f"model.layers.0.self_attn.{name}.input_scale") == global_scale(amax)


def test_padding_is_not_calibrated_on(tmp_path):
    checkpoint = open_checkpoint(plain("qwen3", tmp_path / "plain"))
    given = prompts(checkpoint.config, rows=2, tokens=24, padding="left")
    module = "model.layers.0.self_attn.q_proj"
    found = []
    for filler in (3, 13):  # an ordinary token, and the one whose row of the embedding is 30 times as large
        ids = np.where(given["attention_mask"] == 1, given["input_ids"], filler)
        save_file({"input_ids": ids, "attention_mask": given["attention_mask"]}, tmp_path / f"{filler}.safetensors")
        found.append(calibrate(checkpoint, rows_of(checkpoint, tmp_path / f"{filler}.safetensors"), [module]))
    assert found[0] == found[1]
    assert found[0].tokens == given["attention_mask"].sum()


def test_a_file_that_is_neither_text_nor_inputs_is_named(tmp_path, capsys):
    source = plain("qwen3", tmp_path / "plain")
    (tmp_path / "i.bin").write_bytes(b"\xff\xfe" * 9)
    assert main(["quantize", str(source), "-o", str(tmp_path / "q"), "--calibrate", str(tmp_path / "i.bin")]) == 2
    assert f"{tmp_path / 'i.bin'} is not text in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_no_numbers_are_refused_by_module(value, tmp_path):
    source = plain("qwen3", tmp_path / "plain")
    broken = open_checkpoint(source)
    norm = "model.layers.0.post_attention_layernorm.weight"

    def read(name):
        array = broken.read(name)
        array[...] = value if name == norm else array
        return array

    write_checkpoint(tmp_path / "b", broken.tensors, read, config=broken.config_document)
    checkpoint = open_checkpoint(tmp_path / "b")
    rows = [{"input_ids": np.array([[3, 14, 15]])}]
    with (
        np.errstate(all="ignore"),
        pytest.raises(CheckpointError, match=r"inputs of model\.layers\.0\.mlp\.\w+ hold NaN"),
    ):
        calibrate(checkpoint, rows, ["model.layers.0.mlp.gate_proj"])


def test_inputs_that_are_not_used_or_do_not_fit_are_refused(tmp_path):
    checkpoint = open_checkpoint(plain("qwen3", tmp_path / "plain"))
    ids = {"input_ids": np.array([[3, 14, 15]])}
    for more, told in (
        ({"pixel_values": np.zeros((1, 3), np.float32)}, "holds pixel_values, and layers are calibrated on text alone"),
        ({"position_ids": np.array([[0, 1]])}, r"position_ids \(1, 2\), expected those of input_ids \(1, 3\)"),
    ):
        save_file(ids | more, tmp_path / "i.safetensors")
        with pytest.raises(ValueError, match=told):
            list(rows_of(checkpoint, tmp_path / "i.safetensors"))


def test_somebodys_directory_beside_a_checkpoint_is_left_where_it_is(tmp_path):
    source = plain("qwen3", tmp_path / "plain")
    (source / "tokenizer").mkdir()
    (source / "tokenizer.json").write_text("{}")
    assert main(["quantize", str(source), "-o", str(tmp_path / "q")]) == 0
    assert (tmp_path / "q" / "tokenizer.json").read_text() == "{}"


def test_positions_that_were_given_are_used(tmp_path):
    checkpoint = open_checkpoint(plain("qwen3_5", tmp_path / "plain"))
    ids = prompts(checkpoint.config, rows=1, tokens=12)["input_ids"]
    for axes in ((), (3,)):
        positions = np.broadcast_to(np.arange(12) * 7, (*axes, 1, 12)).copy()
        save_file({"input_ids": ids, "position_ids": positions}, tmp_path / "i.safetensors")
        (row,) = rows_of(checkpoint, tmp_path / "i.safetensors")
        assert np.array_equal(row["position_ids"], positions)


def test_experts_that_no_token_reached_have_the_largest_input_of_the_others(tmp_path, capsys):
    source = plain("qwen3-moe", tmp_path / "plain")
    save_file({"input_ids": np.array([[5, 6]])}, tmp_path / "few.safetensors")
    asked = [
        "quantize",
        str(source),
        "-o",
        str(tmp_path / "q"),
        "--calibrate",
        str(tmp_path / "few.safetensors"),
        "--json",
    ]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    unseen = [
        name
        for name in found["experts_unseen"]
        if name.endswith("layers.0.mlp.experts.0.up_proj") or "layers.0" in name
    ]
    assert unseen
    checkpoint = open_checkpoint(tmp_path / "q")
    for name in ("gate_proj", "up_proj", "down_proj"):
        scales = [
            float(checkpoint.read(f"model.layers.0.mlp.experts.{expert}.{name}.input_scale")) for expert in range(5)
        ]
        missed = [scales[expert] for expert in range(5) if f"model.layers.0.mlp.experts.{expert}.{name}" in unseen]
        assert set(missed) == {max(scales)}


def test_text_is_read_with_the_tokenizer_of_the_checkpoint(tmp_path, capsys):
    source = plain("qwen3", tmp_path / "plain")
    tokenizer = Tokenizer(models.WordLevel({"a": 21, "b": 22, "c": 23, "?": 24}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b c c what b\n", encoding="utf-8")
    save_file({"input_ids": np.array([[21, 22, 23, 23, 24, 22]])}, tmp_path / "ids.safetensors")
    for given in ("text.txt", "ids.safetensors"):
        target = str(tmp_path / f"from {given}")
        assert main(["quantize", str(source), "-o", target, "--calibrate", str(tmp_path / given)]) == 0
        assert "inputs calibrated on 6 tokens" in capsys.readouterr().out
    a, b = (open_checkpoint(tmp_path / f"from {given}") for given in ("text.txt", "ids.safetensors"))
    assert all(a.read(name).tobytes() == b.read(name).tobytes() for name in a.tensors)


def test_long_text_is_cut_into_rows(tmp_path):
    source = plain("qwen3", tmp_path / "plain", max_position_embeddings=64)
    tokenizer = Tokenizer(models.WordLevel({"a": 21, "?": 24}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    (tmp_path / "text").write_text("a " * 150, encoding="utf-8")
    assert [row["input_ids"].shape for row in rows_of(open_checkpoint(source), tmp_path / "text")] == [
        (1, 64),
        (1, 64),
        (1, 22),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("no tokenizer", "has no tokenizer.json"),
        ("broken tokenizer", "tokenizer.json cannot be read"),
        ("no text", "not one token"),
        ("no file", "No such file"),
        ("full", "is not empty"),
        ("quantised", "quantised already"),
        ("odd", "nothing to quantise"),
    ],
)
def test_what_cannot_be_done_says_what_to_do_and_writes_nothing(change, words, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("" if change == "no text" else "a", encoding="utf-8")
    source = plain(
        "qwen3",
        tmp_path / "p",
        **({"hidden_size": 40, "intermediate_size": 56, "head_dim": 10} if change == "odd" else {}),
    )
    given = ["--calibrate", str(text)]
    target = tmp_path / "q"
    if change == "broken tokenizer":
        (source / "tokenizer.json").write_text("{}")
    if change == "no text":
        Tokenizer(models.WordLevel({"a": 21}, unk_token="a")).save(str(source / "tokenizer.json"))
    if change == "no file":
        text.unlink()
        given = ["--calibrate", str(text)]
    if change == "full":
        target.mkdir()
        (target / "mine").touch()
        given = []
    if change == "quantised":
        source = make_checkpoint("qwen3", tmp_path / "z", quantization=ZooQuantization(), **block_sizes("qwen3"))
        given = []
    assert main(["quantize", str(source), "-o", str(target), *given]) == 2
    assert words in capsys.readouterr().err
    assert not target.exists() or [path.name for path in target.iterdir()] == ["mine"]


def test_where_the_tokenizers_are_not_installed_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    source = plain("qwen3", tmp_path / "p")
    (source / "tokenizer.json").write_text("{}")
    (tmp_path / "text").write_text("a")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert main(["quantize", str(source), "-o", str(tmp_path / "q"), "--calibrate", str(tmp_path / "text")]) == 2
    assert "pip install tokenizers" in capsys.readouterr().err


def test_the_figures_are_those_of_the_files(tmp_path, capsys):
    source = plain("qwen3-moe", tmp_path / "p")
    assert main(["quantize", str(source), "-o", str(tmp_path / "q"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "q")
    assert (found["bytes_before"], found["bytes_after"]) == (before.num_bytes, after.num_bytes)
    assert found["matrices"] == len(matrices(after))
    assert found["quantized"] == {"NVFP4, weights only": len(after.config.quantization.schemes)}
    assert found["left_alone"]["model.layers.0.mlp.gate"] == "a router"
    assert after.generation_document == before.generation_document


# --- weight-only ---


@pytest.mark.slow_unless("torch")
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_trace_says_whether_inputs_were_quantised_and_what_ran(backend, tmp_path):
    source = make_checkpoint(
        "qwen3", tmp_path / "q", quantization=ZooQuantization(), **block_sizes("qwen3") | {"num_hidden_layers": 2}
    )
    inputs = ["--inputs", inputs_file(source, tmp_path / "i.safetensors")]
    traces = {}
    for options in ((), ("--weight-only",)):
        target = tmp_path / f"{len(options)}.trace"
        assert main(["record", str(source), "--backend", backend, *inputs, *options, "-o", str(target)]) == 0
        traces[bool(options)] = Trace.load(target)
    for weight_only, trace in traces.items():
        assert trace.meta["weight_only"] is weight_only
        assert sum(trace.meta["kernels"].values()) == 14
    assert np.abs(traces[True].tensors["logits"] - traces[False].tensors["logits"]).max() > 0.01
    assert main(["compare", str(tmp_path / "0.trace"), str(tmp_path / "1.trace")]) == 3
    assert main(["compare", str(tmp_path / "1.trace"), str(tmp_path / "1.trace")]) == 0


def test_a_plain_models_trace_says_nothing_of_kernels(tmp_path):
    source = plain("qwen3", tmp_path / "p", num_hidden_layers=1)
    inputs = ["--inputs", inputs_file(source, tmp_path / "i.safetensors")]
    assert main(["record", str(source), "--backend", "torch", *inputs, "-o", str(tmp_path / "t")]) == 0
    assert not {"weight_only", "kernels"} & Trace.load(tmp_path / "t").meta.keys()


def test_networks_with_quantised_inputs_are_not_judged_and_nobody_is_accused(tmp_path, capsys):
    source = make_checkpoint(
        "qwen3", tmp_path / "q", quantization=ZooQuantization(), **block_sizes("qwen3") | {"num_hidden_layers": 1}
    )
    assert main(["run", str(source), "--decode", "0", "--inputs", inputs_file(source, tmp_path / "i.safetensors")]) == 3
    assert "record both with --weight-only" in " ".join(capsys.readouterr().out.split())


def test_run_compares_weights_only_against_the_oracle(tmp_path, capsys):
    source = make_checkpoint(
        "qwen3",
        tmp_path / "q",
        quantization=ZooQuantization(unify=False),
        **block_sizes("qwen3") | {"num_hidden_layers": 2},
    )
    with torch.no_grad():
        assert main(["run", str(source), "--decode", "0", "--weight-only", "--dtype", "float32"]) == 0
    assert "agree to within rounding" in capsys.readouterr().out
