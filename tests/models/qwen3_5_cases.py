"""Qwen3.5 checkpoints that transformers itself wrote, and what it answers to them: for the tests of that family."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)
from transformers.modeling_layers import MtpModel

FULL, LINEAR = "full_attention", "linear_attention"
# head_dim is not hidden / heads, no two sizes agree by accident, linear keys are not as wide as values
DENSE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "layer_types": [FULL, LINEAR, LINEAR],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 14,
    "linear_value_head_dim": 9,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {key: value for key, value in DENSE.items() if key != "intermediate_size"} | {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
}
# 6 of 8 pairs turn: by T H W T H and T again, as width has one pair alone
SECTIONS = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.75, "mrope_section": [3, 2, 1]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
ODD = {  # five heads of each kind, one key/value head, two taps
    "hidden_size": 44,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "linear_num_key_heads": 5,
    "linear_num_value_heads": 5,
    "linear_key_head_dim": 7,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 2,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_heads": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "num_position_embeddings": 36,
}
MTP_OF_LAYER = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")


@dataclass(frozen=True)
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # of the files; A_log and the gated norm stay float32
    is_wrapped: bool = False
    interval: int | None = None  # full_attention_interval instead of layer_types
    experts: str = "fused"
    draft_experts: str = "fused"
    renames_text: bool = False  # the wrapper's names over a flat config, as modelopt exports

    @property
    def is_moe(self) -> bool:
        return "num_experts" in self.options


def without_types(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "layer_types"}


CASES = {
    "dense": Case(DENSE),
    "tied biased odd heads bf16 files": Case(
        DENSE
        | ODD
        | {"tie_word_embeddings": True, "attention_bias": True, "layer_types": [LINEAR, FULL, LINEAR]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        torch.bfloat16,
    ),
    "interval 2 yarn": Case(
        without_types(DENSE) | {"num_hidden_layers": 4, "rope_parameters": YARN | {"partial_rotary_factor": 1.0}},
        interval=2,
    ),
    "wrapped tied": Case(DENSE | {"tie_word_embeddings": True, "rope_parameters": SECTIONS}, is_wrapped=True),
    "moe": Case(MOE | {"layer_types": [LINEAR, FULL], "num_hidden_layers": 2}, draft_experts="per expert"),
    "moe interval 3 one by one tied": Case(
        without_types(MOE) | {"tie_word_embeddings": True, "num_experts_per_tok": 3},
        interval=3,
        experts="per expert",
        draft_experts="per expert",
    ),
    "wrapped moe bf16 files": Case(
        MOE
        | {
            "layer_types": [LINEAR, FULL],
            "num_hidden_layers": 2,
            "rope_parameters": SECTIONS | {"mrope_section": [4, 1, 1]},
        },
        torch.bfloat16,
        is_wrapped=True,
    ),
}
RENAMED = Case(DENSE, renames_text=True)
B, T = 3, 150  # two chunk boundaries, at 64 and 128
FILL = 7  # what stands under padding


def sensitised(name: str, shape: tuple[int, ...], rng: np.random.Generator, *, is_tied: bool) -> torch.Tensor:
    """Weights under which every mistake shows, and every branch adds about 1 to a residual stream that starts at 1."""
    noise = torch.from_numpy(rng.standard_normal(shape))
    if name.endswith("A_log"):
        return torch.from_numpy(np.log(rng.uniform(0.5, 8, shape)))
    if name.endswith("dt_bias"):
        return noise - 1
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.3 * noise
    if "norm" in name:
        return 0.3 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed_tokens" in name:
        value = noise * (3.0 / shape[1] ** 0.5 if is_tied else 1.0)
        value[3] *= 1e-3  # a canary for eps
        return value
    gains = {"lm_head.weight": 3.0, "o_proj.weight": 3.5, "out_proj.weight": 2.5, "gate.weight": 2.0}
    gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.5)
    return noise * gain / shape[-1] ** 0.5


def text_config_of(case: Case) -> Any:
    return (Qwen3_5MoeTextConfig if case.is_moe else Qwen3_5TextConfig)(
        **case.options, **({} if case.interval is None else {"full_attention_interval": case.interval})
    )


def new_model(case: Case) -> Any:
    """transformers' model of a case, as it initialises it."""
    text = text_config_of(case)
    if not case.is_wrapped:
        return (Qwen3_5MoeForCausalLM if case.is_moe else Qwen3_5ForCausalLM)(text)
    kinds = {
        False: (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
        True: (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
    }
    config, model = kinds[case.is_moe]
    vision = VISION | {"out_hidden_size": text.hidden_size}
    tokens = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
    tied = {"tie_word_embeddings": text.tie_word_embeddings}
    return model(config(text_config=text.to_dict(), vision_config=vision, **tokens, **tied))


def write(case: Case, directory: Path, *, seed: int = 7) -> Path:
    """What transformers writes of a sensitised model; experts in the case's form; ``mtp.*``, which it never writes."""
    model, rng = new_model(case), np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        value = sensitised(name, tuple(parameter.shape), rng, is_tied=case.options.get("tie_word_embeddings", False))
        parameter.data = value.to(torch.float32 if name.endswith(("A_log", "linear_attn.norm.weight")) else case.dtype)
    model.save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = in_form(load_file(path), case.experts) | draft_tensors(case, rng)
    if case.renames_text:
        tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    if case.interval is not None:  # transformers writes what the interval means
        config = json.loads((directory / "config.json").read_text())
        del config["layer_types"]
        (directory / "config.json").write_text(json.dumps(config | {"full_attention_interval": case.interval}))
    return directory


def in_form(tensors: dict[str, torch.Tensor], form: str) -> dict[str, torch.Tensor]:
    """The experts in one of their two forms."""
    fused, single = ".mlp.experts.gate_up_proj", ".mlp.experts.0.gate_proj.weight"
    found = dict(tensors)
    for name in tensors:
        if form == "per expert" and name.endswith(fused):
            prefix = name.removesuffix("gate_up_proj")
            for expert, (both, down) in enumerate(zip(found.pop(name), found.pop(prefix + "down_proj"), strict=True)):
                gate, up = both.chunk(2)
                for part, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                    found[f"{prefix}{expert}.{part}.weight"] = value.contiguous()
        if form == "fused" and name.endswith(single):
            prefix, parts = name.removesuffix("0.gate_proj.weight"), {}
            for part in ("gate_proj", "up_proj", "down_proj"):
                names = [key for key in tensors if key.startswith(prefix) and key.endswith(f".{part}.weight")]
                parts[part] = torch.stack([found.pop(f"{prefix}{i}.{part}.weight") for i in range(len(names))])
            found[prefix + "gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
            found[prefix + "down_proj"] = parts["down_proj"]
    return found


def draft_tensors(case: Case, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """``mtp.*`` under its published names."""
    options = case.options | {"layer_types": [FULL], "num_hidden_layers": 1, "tie_word_embeddings": False}
    layer = new_model(Case(options)).model.layers[0]
    D = options["hidden_size"]
    shapes = {f"mtp.layers.0.{name}": tuple(value.shape) for name, value in layer.named_parameters()}
    shapes |= {"mtp.fc.weight": (D, 2 * D)}
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    shapes |= {f"mtp.{name}.weight": (D,) for name in norms}
    drawn = {name: sensitised(name, shape, rng, is_tied=False).to(case.dtype) for name, shape in shapes.items()}
    return in_form(drawn, case.draft_experts)


@functools.lru_cache(maxsize=4)
def reference_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """As transformers loads it, with nothing missing and nothing over."""
    document = json.loads((directory / "config.json").read_text())
    kind = globals()[document["architectures"][0]]
    model, report = kind.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), report
    return model.eval()


def reference(directory: Path, inputs: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Logits and taps of transformers, named as ours."""
    model, out, hooks = reference_model(directory, dtype), {}, []
    text = "model.language_model" if hasattr(model.model, "language_model") else "model"

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[2] if name.endswith("gate") else output  # of (logits, weights, experts)
            out[name] = value.float().numpy() if value.is_floating_point() else value.numpy()

        return hook

    for name, module in model.named_modules():
        is_layer = name.startswith(f"{text}.layers.") and name.count(".") == text.count(".") + 2
        if name in (f"{text}.embed_tokens", f"{text}.norm") or is_layer or name.endswith("mlp.gate"):
            hooks.append(module.register_forward_hook(keep(name)))
    mask_BT = inputs.get("attention_mask", np.ones(inputs["input_ids"].shape, np.int64))
    positions = inputs.get("position_ids", np.maximum(mask_BT.cumsum(1) - 1, 0))
    with torch.no_grad():
        out["logits"] = (
            model(
                input_ids=torch.from_numpy(inputs["input_ids"]),
                attention_mask=torch.from_numpy(mask_BT),
                position_ids=torch.from_numpy(positions),
                use_cache=False,
            )
            .logits.float()
            .numpy()
        )
    for hook in hooks:
        hook.remove()
    return {name: value.reshape(*mask_BT.shape, -1) for name, value in out.items()}


def draft_reference(directory: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits and hidden states of transformers' draft on the hidden states of its own model; it knows no padding.

    It reads the experts of a draft fused only.
    """
    model = reference_model(directory)
    config = model.config.get_text_config()
    before = vars(config).copy()
    config.num_mtp_layers, config.mtp_layer_types = 1, [FULL]
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = layers[config.layer_types.index(FULL) :][:1]  # from the last it learns what a norm is
    draft = MtpModel.from_pretrained(model).eval()
    decoder.layers = layers
    # it takes gaps between positions for the bounds of packed sequences, and knows no three axes
    masks, counted = draft.create_masks_for_mtp_layer, torch.arange(inputs["input_ids"].shape[1] - 1)[None]
    draft.create_masks_for_mtp_layer = lambda layer, x, cache, positions: masks(layer, x, cache, counted)
    ids_BT = torch.from_numpy(inputs["input_ids"])
    text = "model.language_model" if hasattr(model.model, "language_model") else "model"
    hidden_BTD = torch.from_numpy(reference(directory, inputs)[f"{text}.norm"])
    counted_BT = np.broadcast_to(np.arange(ids_BT.shape[1]), ids_BT.shape)
    positions = torch.from_numpy(inputs.get("position_ids", counted_BT).copy())
    with torch.no_grad():
        state_BTD = draft.forward_layer(0, hidden_BTD[:, :-1], positions[..., 1:], None, input_ids=ids_BT[:, 1:])
        logits_BTV = model.lm_head(state_BTD)
    vars(config).clear()
    vars(config).update(before)
    return {"logits": logits_BTV.numpy(), "hidden": state_BTD.numpy()}


def inputs_of(kind: str, *, rows: int = B, tokens: int = T) -> dict[str, np.ndarray]:
    """A batch: ``plain``, padded ``left``, ``right`` or on ``both`` sides, with ``far`` positions or ``three axes``."""
    rng = np.random.default_rng(11)
    ids_BT = rng.integers(0, DENSE["vocab_size"], (rows, tokens))
    inputs = {"input_ids": ids_BT, "attention_mask": np.ones((rows, tokens), np.int64)}
    if tokens > 40:
        ids_BT[:, -25] = ids_BT[0, 6] = 3  # the canary for eps
    steps_T, cut_B1 = np.arange(tokens), np.array([3, tokens // 3, tokens // 2])[:rows, None]
    masks = {
        "left": steps_T >= cut_B1,
        "right": steps_T < tokens - cut_B1,
        "both": (steps_T >= cut_B1 // 2) & (steps_T < tokens - cut_B1 // 2),
    }
    if kind in masks:
        inputs["attention_mask"] = masks[kind].astype(np.int64)
        inputs["input_ids"] = np.where(masks[kind], ids_BT, FILL)
    if kind == "far":
        inputs["position_ids"] = np.cumsum(rng.integers(1, 40, (rows, tokens)), axis=1)
    if kind == "three axes":
        inputs["position_ids"] = rng.integers(0, 60, (3, rows, tokens))
    return inputs
