"""Weights as they are loaded, quantised, adapted and reloaded."""

import numpy as np

from benchmarks.planted.pieces import put, truncated
from benchmarks.planted.plant import Bug, Function, Method, Weight, jax_bug, torch_bug

A = "layers.attention.Attention"
P = "model.layers.{layer}."
ADAPTER = {"adapter": True}
LO = "layers.lora"
BUGS = (
    torch_bug("w kheads", "qwen3", Weight(P + "self_attn.k_proj.weight", lambda a, g: np.roll(a, 10, 0)), layer=2),
    torch_bug(
        "w neighbour",
        "qwen3",
        Weight(P + "self_attn.q_proj.weight", lambda a, g: g("model.layers.2.self_attn.q_proj.weight")),
        layer=1,
    ),
    torch_bug("w expert", "qwen3-moe", Weight(P + "mlp.experts.down_proj", lambda a, g: put(a, 1, a[2])), layer=3),
    torch_bug("w bf16", "qwen3", Weight(P + "mlp.up_proj.weight", lambda a, g: truncated(a)), layer=2),
    torch_bug(
        "w stale half",
        "qwen3",
        Weight(P + "mlp.gate_proj.weight", lambda a, g: np.concatenate((a[:28], a[:28]))),
        layer=0,
    ),
    torch_bug(
        "w one ulp",
        "qwen3",
        Weight(P + "mlp.down_proj.weight", lambda a, g: put(a, (3, 5), np.nextafter(a[3, 5], np.float32(9)))),
        layer=3,
    ),
    torch_bug(
        "w embed row", "qwen3", Weight("model.embed_tokens.weight", lambda a, g: put(a, 100, a[101])), where="embed"
    ),
    torch_bug(
        "w norm zero", "qwen3", Weight(P + "input_layernorm.weight", lambda a, g: put(a, slice(20, None), 1)), layer=3
    ),
    torch_bug(
        "w gateup",
        "qwen3-moe",
        Weight(P + "mlp.experts.gate_up_proj", lambda a, g: put(a, 2, a[2, ::-1].copy())),
        layer=0,
    ),
    jax_bug(
        "w neighbour",
        "qwen3",
        Weight(P + "self_attn.v_proj.weight", lambda a, g: g("model.layers.3.self_attn.v_proj.weight")),
        layer=2,
    ),
    jax_bug("w head bf16", "qwen3", Weight("lm_head.weight", lambda a, g: truncated(a)), where="head"),
    jax_bug("w A log", "qwen3_5", Weight(P + "linear_attn.A_log", lambda a, g: np.roll(a, 1)), layer=1),
    jax_bug("w conv", "qwen3_5", Weight(P + "linear_attn.conv1d.weight", lambda a, g: a[..., ::-1]), layer=3),
    jax_bug("w transposed", "qwen3", Weight(P + "self_attn.k_proj.weight", lambda a, g: a.T.reshape(a.shape)), layer=0),
    Bug(
        "both expert_place",
        "both",
        "qwen3-moe",
        (
            Function(
                "loaders.place",
                "place_of",
                "    if not spec",
                "    import dataclasses\n    source = dataclasses.replace(source, expert_id={1: 2, 2: 1}.get(source.expert_id, source.expert_id)) if 'layers.2' in spec.name else source\n    if not spec",
            ),
        ),
        layer=2,
    ),
    torch_bug(
        "fp4 block",
        "qwen3",
        Method(
            "layers.quantized.NVFP4Linear",
            "codes, self._block_scales(), self.alpha)",
            "codes, self._block_scales().view(torch.uint8).roll(1, -1).view(torch.float8_e4m3fn), self.alpha)",
            name="_product",
        ),
        layer=1,
        stored="BF16",
        quantized=True,
        options={"weight_only": True},
        dtype="float32",
    ),
    torch_bug(
        "fp4 alpha",
        "qwen3",
        Method(
            "layers.quantized.NVFP4Linear",
            "self._block_scales(), self.alpha)",
            "self._block_scales(), self.alpha * 1.01)",
            name="_product",
        ),
        layer=2,
        stored="BF16",
        quantized=True,
        options={"weight_only": True},
        dtype="float32",
    ),
    torch_bug(
        "fp4 nibble",
        "qwen3",
        Method(
            "layers.quantized.NVFP4Linear",
            "self.kernel.matmul(x_UK, codes,",
            "self.kernel.matmul(x_UK, (codes >> 4) | (codes << 4),",
            name="_product",
        ),
        layer=0,
        stored="BF16",
        quantized=True,
        options={"weight_only": True},
        dtype="float32",
    ),
    torch_bug(
        "fp4 one block",
        "qwen3",
        Weight(P + "mlp.up_proj.weight_scale", lambda a, g: put(a, (3, 0), a[3, 1])),
        layer=2,
        stored="BF16",
        quantized=True,
        options={"weight_only": True},
        dtype="float32",
    ),
    jax_bug(
        "fp4 global",
        "qwen3",
        Method("layers.quantized.NVFP4Linear", "self.cuts) * alpha", "self.cuts) / alpha", name="project"),
        stored="BF16",
        quantized=True,
        options={"weight_only": True},
        dtype="float32",
    ),
    torch_bug(
        "lora scale",
        "qwen3",
        Method(LO + ".Stacks", "* self.scaling[slot]", "* self.scaling[slot] * 1.01", name="delta"),
        options=ADAPTER,
    ),
    torch_bug(
        "lora rs",
        "qwen3",
        Method(LO + ".Stacks", "* self.scaling[slot]", "* self.scaling[slot] * 2", name="delta"),
        options=ADAPTER,
    ),
    torch_bug(
        "lora target",
        "qwen3",
        Method(
            LO + ".LinearWithLoRA",
            "return self._added(self.base_layer.forward(x), x)",
            "return self.base_layer.forward(x)",
        ),
        layer=2,
        options=ADAPTER,
    ),
    jax_bug(
        "lora row",
        "qwen3",
        Method(
            LO + ".Stacks", "* self.scaling[slot]", "* self.scaling[slot] * (self.a[slot].shape[0] / 6)", name="delta"
        ),
        options=ADAPTER,
    ),
    torch_bug(
        "rl skip",
        "qwen3",
        Function(
            "weights",
            "_commit",
            "    for name, value in values:",
            "    for name, value in values:\n        if name == 'model.layers.2.mlp.up_proj.weight': continue",
        ),
        where="layer 2",
        event="lifecycle",
    ),
    torch_bug(
        "rl moves",
        "qwen3",
        Function(
            "weights",
            "_commit",
            "module.get_parameter(leaf).copy_(value)",
            "module.get_parameter(leaf).data = value.clone()",
        ),
        event="lifecycle",
    ),
    torch_bug(
        "rl moves nocheck",
        "qwen3",
        Function(
            "weights",
            "_commit",
            "module.get_parameter(leaf).copy_(value)\n        mark_source(module, leaf)",
            "module.get_parameter(leaf).data = value.clone(); before = pointer_census(model)\n        mark_source(module, leaf)",
        ),
        event="lifecycle",
    ),
    torch_bug(
        "rl stamp",
        "qwen3",
        Method("decoding.Decoding", "if cache.stamp != model.weights_stamp():", "if False:", name="next_ids"),
        event="lifecycle",
    ),
    torch_bug(
        "rl half nocheck",
        "qwen3",
        Function(
            "weights",
            "_commit",
            "module.get_parameter(leaf).copy_(value)\n",
            "module.get_parameter(leaf)[: len(value) // 2 + 1].copy_(value[: len(value) // 2 + 1]); value = module.get_parameter(leaf).detach().clone()\n",
        ),
        event="lifecycle",
    ),
    torch_bug(
        "rl notrial",
        "qwen3",
        Function(
            "weights",
            "update_weights_from_disk",
            "deque(read_params(plan, trial, staged=True), maxlen=0)",
            "deque(trial.receive(iter([])), maxlen=0)",
        ),
        event="lifecycle",
    ),
    torch_bug(
        "rl cross",
        "qwen3",
        Function(
            "weights",
            "set_embed_and_head",
            "value.clone() if _is_live(model, value) else value.to(model.device)",
            "value.to(model.device)",
        ),
        event="lifecycle",
    ),
    jax_bug(
        "rl skip",
        "qwen3",
        Function(
            "weights",
            "update_weights_from_disk",
            "placed[name] = array",
            "placed[name] = live[name] if name == 'model.layers.1.self_attn.k_proj.weight' else array",
        ),
        where="layer 1",
        event="lifecycle",
    ),
    jax_bug(
        "rl cache",
        "qwen3",
        Method("model.Model", "weights_id=object()", "weights_id=self.weights_id", name="published"),
        event="lifecycle",
    ),
    jax_bug(
        "rl tied",
        "qwen3-tied",
        Function("weights", "_check_tied", "raise ValueError(", "return; raise ValueError("),
        event="lifecycle",
    ),
    jax_bug(
        "rl version",
        "qwen3",
        Method("model.Model", "version=self.version + 1", "version=self.version", name="published"),
        event="lifecycle",
    ),
    torch_bug(
        "rl lora residue",
        "qwen3",
        Function(
            "layers.lora",
            "added",
            "torch.where(delta != 0, (y.float() + delta).to(y.dtype), y)",
            "(y.float() + delta * 1.01).to(y.dtype)",
        ),
        event="lifecycle",
    ),
)
