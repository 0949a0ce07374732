"""NVFP4 checkpoints from the libraries that make the published ones, of tiny models of transformers, on a CPU.

ModelOpt writes with its own exporter. For compressed-tensors the calls are those of llm-compressor 0.14, which does not
admit this transformers: observers over the unquantised network, one global scale for q/k/v and for gate/up, experts as
Linears of their own, then compressed-tensors' ``ModelCompressor``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

Recipe = Literal["w4a4", "w4a16", "mlp", "w4a4_kv_fp8", "w4a4_kv_fp8_cast"]
RECIPES: dict[Recipe, str] = {  # names of ModelOpt's configurations
    "w4a4": "NVFP4_DEFAULT_CFG",
    "w4a16": "W4A16_NVFP4_CFG",
    "mlp": "NVFP4_MLP_ONLY_CFG",
    "w4a4_kv_fp8": "NVFP4_DEFAULT_CFG",
    "w4a4_kv_fp8_cast": "NVFP4_DEFAULT_CFG",
}
# what recipes of llm-compressor leave alone
IGNORE = ("lm_head", "re:.*mlp.gate$", "re:.*mlp.shared_expert_gate$", "re:.*linear_attn.in_proj_[ab]$")
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what runtimes fuse shares a global scale

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"intermediate_size": 96}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, _EXPERTS),
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig, {"intermediate_size": 96, **_LINEAR}),
    "qwen3_5_moe": (
        Qwen3_5MoeForCausalLM,
        Qwen3_5MoeTextConfig,
        {**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 48},
    ),
}


def tiny_model(kind: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **sizes: Any) -> Any:
    """A model of ``MODELS`` with random weights; every in_features is a multiple of 16."""
    model_class, config_class, own = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**_SIZES | own | sizes))
    # exporters read both, and transformers sets them on saving only
    model.config.architectures, model.config.dtype = [model_class.__name__], dtype
    return model.to(dtype).eval()


def modelopt_checkpoint(directory: Path, model: Any, *, recipe: Recipe = "w4a4", batches: int = 3) -> Path:
    """Quantise ``model`` with ModelOpt, in place, and export it to ``directory``."""
    with quiet():
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        config = copy.deepcopy(getattr(mtq, RECIPES[recipe]))
        if "_kv_fp8" in recipe:
            (cache,) = copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
            cache["cfg"] |= {"use_constant_amax": True} if recipe.endswith("_cast") else {}  # its presets/kv/fp8_cast
            config = mtq.update_quant_cfg_with_kv_cache_quant(config, [cache])
        mtq.quantize(model, config, lambda quantized: _run(quantized, batches))
        export_hf_checkpoint(model, dtype=model.config.dtype, export_dir=directory)
    return directory


def compressed_tensors_checkpoint(
    directory: Path, model: Any, *, activations: bool = True, ignore: Sequence[str] = IGNORE, batches: int = 3
) -> Path:
    """Quantise ``model`` with compressed-tensors, in place, to NVFP4 or NVFP4A16, and save it to ``directory``."""
    with quiet():
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationStatus,
            apply_quantization_config,
            preset_name_to_scheme,
        )

        _split_experts(model)
        scheme = preset_name_to_scheme("NVFP4" if activations else "NVFP4A16", ["Linear"])
        scheme.weights.observer = "memoryless_minmax"
        config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore))
        config.quantization_status = QuantizationStatus.INITIALIZED
        apply_quantization_config(model, config)
        with torch.no_grad():
            _calibrate_inputs(model, batches)
            _scale_weights(model)
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                module.quantization_status, module.quantization_enabled = QuantizationStatus.FROZEN, True
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(directory)
        compressor.update_config(str(directory))
    return directory


def documents(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of its quantisation: config.json's part, and hf_quant_config.json where there is one."""
    found = {"config.json": json.loads((directory / "config.json").read_text())["quantization_config"]}
    beside = directory / "hf_quant_config.json"
    return found | ({beside.name: json.loads(beside.read_text())} if beside.exists() else {})


def tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype, as safetensors names it, and shape of every tensor of a checkpoint of one file, by its name."""
    with safe_open(directory / "model.safetensors", "np") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in sorted(parts.items())}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The libraries warn of this and that, from their import on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _run(model: Any, batches: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(batches):
        model(torch.randint(model.config.vocab_size, (2, 24), generator=generator))


class _Expert(nn.Module):
    """One expert of a fused stack, as three Linears."""

    def __init__(self, gate_up_FD: torch.Tensor, down_DF: torch.Tensor, act_fn: Any) -> None:
        super().__init__()
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up_FD.chunk(2), down_DF), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            linear.weight.data = weight.clone()
            self.add_module(name, linear)
        self.act_fn = act_fn

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class _Experts(nn.ModuleList):
    """Takes the place of a fused stack; every expert sees every token, so that each is calibrated."""

    def forward(self, x_TD: torch.Tensor, top_TX: torch.Tensor, weights_TX: torch.Tensor) -> torch.Tensor:
        y_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(self):
            share_T = torch.where(top_TX == index, weights_TX, 0).sum(dim=-1)
            y_TD += expert(x_TD) * share_T[:, None].to(x_TD.dtype)
        return y_TD


def _split_experts(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if name.endswith("mlp.experts"):
            stacks = zip(module.gate_up_proj.data, module.down_proj.data, strict=True)
            model.set_submodule(name, _Experts(_Expert(*stack, module.act_fn) for stack in stacks))


def _calibrate_inputs(model: Any, batches: int) -> None:
    """The input's global scale of every Linear that has one, from the largest it sees, unquantised."""
    from compressed_tensors.quantization.utils import generate_gparam

    calibrated = [module for module in model.modules() if hasattr(module, "input_global_scale")]
    most: dict[nn.Module, torch.Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        most[module] = torch.maximum(most.get(module, inputs[0].new_zeros(1)), inputs[0].abs().max().reshape(1))

    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
    handles = [module.register_forward_pre_hook(watch) for module in calibrated]
    if calibrated:
        _run(model, batches)
    for handle in handles:
        handle.remove()
    for module in calibrated:
        module.input_global_scale.data = generate_gparam(-most[module], most[module])


def _scale_weights(model: Any) -> None:
    """Global and block scales of every weight; minima, maxima and divisions are in the weight's own dtype."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    done: set[nn.Module] = set()
    for module in model.modules():
        children = dict(module.named_children())
        groups = [[children[name] for name in names] for names in TOGETHER if all(name in children for name in names)]
        for group in [*groups, *([child] for child in children.values())]:
            group = [linear for linear in group if hasattr(linear, "weight_global_scale") and linear not in done]
            if not group:
                continue
            done.update(group)
            amax = torch.stack([linear.weight.abs().max() for linear in group]).max().reshape(1)
            for linear in group:
                blocks = linear.weight.unflatten(-1, (-1, linear.quantization_scheme.weights.group_size))
                linear.weight_global_scale.data = generate_gparam(-amax, amax)
                scale, _ = calculate_qparams(
                    blocks.amin(-1), blocks.amax(-1), linear.quantization_scheme.weights, linear.weight_global_scale
                )
                linear.weight_scale.data.copy_(scale)
