"""Models that see, made and written by transformers, and what it says of a prompt with pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from qwen3_5_cases import sensitised

TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 2, 2],
        "mrope_interleaved": True,
    },
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
}
HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 8,
    "rope_parameters": TEXT["rope_parameters"] | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 1]},
}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "num_position_embeddings": 49,
    "out_hidden_size": 40,
}
TOKENS = {"image_token_id": 80, "video_token_id": 81, "vision_start_token_id": 82, "vision_end_token_id": 83}


@dataclass(frozen=True)
class Case:
    kind: str
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    is_tied: bool = False
    dtype: torch.dtype = torch.float32  # of the files


CASES = {
    "vl": Case("Qwen3VL", vision={"deepstack_visual_indexes": [0, 2]}),
    # one head of 16, patches of one frame, three by three to a token, levels in another order, a text of one kv head
    "vl odd sizes tied bf16 files": Case(
        "Qwen3VL",
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "num_hidden_layers": 4,
            "attention_bias": True,
        },
        {
            "hidden_size": 16,
            "num_heads": 1,
            "patch_size": 3,
            "temporal_patch_size": 1,
            "spatial_merge_size": 3,
            "num_position_embeddings": 16,
            "depth": 4,
            "deepstack_visual_indexes": [3, 0, 1],
        },
        is_tied=True,
        dtype=torch.bfloat16,
    ),
    "vl yarn": Case(
        "Qwen3VL",
        {
            "num_hidden_layers": 2,
            "rope_parameters": TEXT["rope_parameters"]
            | {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32},
        },
        {"deepstack_visual_indexes": [1]},
    ),
    "vl moe": Case("Qwen3VLMoe", EXPERTS, {"deepstack_visual_indexes": [1, 2]}),
    "vl moe square experts": Case(
        "Qwen3VLMoe", EXPERTS | {"moe_intermediate_size": 20, "num_hidden_layers": 2}, {"deepstack_visual_indexes": [0]}
    ),
    "hybrid": Case("Qwen3_5", HYBRID),
    "hybrid moe": Case(
        "Qwen3_5Moe",
        HYBRID
        | {key: EXPERTS[key] for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}
        | {"shared_expert_intermediate_size": 20},
        {"depth": 2},
    ),
}


def new_model(case: Case) -> Any:
    """transformers' model of a case, sensitised."""
    config_class = getattr(transformers, f"{case.kind}Config")
    config = config_class(
        text_config=TEXT | case.text | {"tie_word_embeddings": case.is_tied},
        vision_config=VISION | case.vision,
        tie_word_embeddings=case.is_tied,
        **TOKENS,
    )
    model = getattr(transformers, f"{case.kind}ForConditionalGeneration")(config)
    rng = np.random.default_rng(7)
    is_zero_centred = case.kind.startswith("Qwen3_5")
    for name, parameter in model.named_parameters():
        value = sensitised(name, tuple(parameter.shape), rng, is_tied=case.is_tied)
        if "norm" in name and name.endswith("weight") and not (is_zero_centred and "visual" not in name):
            value = 1 + value if "linear_attn" not in name else value
        keeps = name.endswith(("A_log", "linear_attn.norm.weight"))
        parameter.data = value.to(torch.float32 if keeps else case.dtype)
    return model


def write(case: Case, directory: Path) -> Path:
    """As transformers saves it."""
    new_model(case).save_pretrained(directory)
    return directory


def reference(directory: Path, batch: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Logits, decoder hidden states after what is added to them, and the tower's tokens, of transformers."""
    architecture = transformers.AutoConfig.from_pretrained(directory).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(directory, dtype=dtype).eval()
    out: dict[str, Any] = {}
    text = model.model.language_model

    def before(name: str):
        def hook(module, args, kwargs):
            value = args[0] if args else kwargs["hidden_states"]
            out[name] = value.float().numpy()

        return hook

    for number, layer in enumerate(text.layers):  # what goes into a layer has had its level added
        layer.register_forward_pre_hook(before(f"hidden_states.{number}"), with_kwargs=True)
    text.norm.register_forward_pre_hook(before(f"hidden_states.{len(text.layers)}"), with_kwargs=True)
    given = {name: torch.from_numpy(value) for name, value in batch.items()}
    with torch.no_grad():
        out["logits"] = model(**given).logits.float().numpy()
        seen = model.model.get_image_features(given["pixel_values"], given["image_grid_thw"])
    out["image_features"] = torch.cat(list(seen.pooler_output)).float().numpy()
    levels = getattr(seen, "deepstack_features", None) or []
    for level, tokens in enumerate(levels):
        out[f"deepstack.{level}"] = torch.cat(list(tokens)).float().numpy()
    return out
