"""Norms, embedding, head and decoding."""

from benchmarks.planted.plant import Function, Method, jax_bug, torch_bug

A = "layers.attention.Attention"
D3 = "qwen3.DecoderLayer"
DN = "layers.gated_delta.GatedDeltaNet"
MO = "layers.moe"
GEN = {"max_new_tokens": 8, "ignore_eos": True}
BUGS = (
    torch_bug("eps all", "qwen3", Method("layers.norm.RMSNorm", "mean_square + self.eps", "mean_square + 1e-5")),
    torch_bug(
        "eps in",
        "qwen3",
        Method(D3, "self.input_layernorm(x_BTD)", "t_norm(self.input_layernorm, x_BTD, 1e-5)"),
        layer=2,
    ),
    torch_bug(
        "one plus",
        "qwen3",
        Method(
            D3,
            "self.input_layernorm(x_BTD)",
            "self.input_layernorm(x_BTD) * (1 + self.input_layernorm.weight) / self.input_layernorm.weight",
        ),
        layer=1,
    ),
    torch_bug(
        "gemma w",
        "gemma3",
        Method(
            "gemma3.DecoderLayer",
            '"pre_feedforward_layernorm", normed_BTD',
            '"pre_feedforward_layernorm", normed_BTD * self.pre_feedforward_layernorm.weight / (1 + self.pre_feedforward_layernorm.weight)',
        ),
        layer=3,
    ),
    torch_bug(
        "cast order",
        "qwen3",
        Method(
            D3,
            "self.input_layernorm(x_BTD)",
            "(lambda n, x: (n.weight.float() * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + n.eps))).to(x.dtype))(self.input_layernorm, x_BTD)",
        ),
        layer=2,
        dtype="bfloat16",
        stored="BF16",
        equivalent="one rounding fewer: below what bfloat16 shows",
    ),
    torch_bug(
        "layernorm",
        "qwen3",
        Method(D3, "self.input_layernorm(x_BTD)", "self.input_layernorm(x_BTD - x_BTD.mean(-1, keepdim=True))"),
        layer=0,
    ),
    torch_bug(
        "final eps",
        "qwen3",
        Method("layers.decoder.Decoder", "self.norm(x_BTD)", "t_norm(self.norm, x_BTD, 1e-5)"),
        where="norm",
    ),
    torch_bug(
        "post eps gemma",
        "gemma3",
        Method(
            "gemma3.DecoderLayer",
            'self.post_attention_layernorm(tap(self.path, "self_attn", mixed_BTD, "modules"))',
            't_norm(self.post_attention_layernorm, tap(self.path, "self_attn", mixed_BTD, "modules"), 1e-5)',
        ),
        layer=1,
    ),
    jax_bug(
        "eps post",
        "qwen3",
        Method(D3, "self.post_attention_layernorm(x_BTD)", "j_norm(self.post_attention_layernorm, x_BTD, 1e-5)"),
        layer=1,
    ),
    jax_bug(
        "final w",
        "qwen3",
        Method("layers.decoder.Decoder", "self.norm(x_BTD)", "self.norm(x_BTD) / self.norm.weight[...]"),
        where="norm",
    ),
    jax_bug(
        "residual",
        "qwen3",
        Method(D3, 'return x_BTD + tap(self.path, "mlp"', 'return normed_BTD + tap(self.path, "mlp"'),
        layer=2,
    ),
    jax_bug(
        "residual1pct",
        "qwen3",
        Method(D3, 'x_BTD + tap(self.path, "self_attn"', 'x_BTD * 0.99 + tap(self.path, "self_attn"'),
        layer=0,
    ),
    torch_bug(
        "head last row",
        "qwen3",
        Method(
            "qwen3.Qwen3ForCausalLM",
            "self.lm_head.project(x_BTD)",
            "(lambda y: torch.cat((y[..., :-1], y[..., -2:-1]), -1))(self.lm_head.project(x_BTD))",
            name="head",
        ),
        where="head",
    ),
    torch_bug(
        "head one 1pct",
        "qwen3",
        Method(
            "qwen3.Qwen3ForCausalLM",
            "self.lm_head.project(x_BTD)",
            "t_scaled_chan(self.lm_head.project(x_BTD), 17, 1.01)",
            name="head",
        ),
        where="head",
    ),
    torch_bug(
        "cap gone",
        "gemma3-capped",
        Method("gemma3.Gemma3ForCausalLM", "is not None:", "is not None and False:", name="head"),
        where="head",
    ),
    torch_bug(
        "cap12.1",
        "gemma3-capped",
        Method(
            "gemma3.Gemma3ForCausalLM",
            "torch.tanh(logits_BTV / cap) * cap",
            "torch.tanh(logits_BTV / 12.1) * 12.1",
            name="head",
        ),
        where="head",
    ),
    torch_bug(
        "embed scale bf16",
        "gemma3",
        Method("gemma3.Gemma3ForCausalLM", "* self.embed_scale", "* self.config.hidden_size ** 0.5", name="embed"),
        where="embed",
        dtype="bfloat16",
        stored="BF16",
    ),
    torch_bug(
        "logits bf16",
        "qwen3",
        Method(
            "qwen3.Qwen3ForCausalLM", "self.lm_head.project(x_BTD)", "t_bf16(self.lm_head.project(x_BTD))", name="head"
        ),
        where="head",
    ),
    torch_bug(
        "logits 1pct bf16",
        "qwen3",
        Method(
            "qwen3.Qwen3ForCausalLM", "self.lm_head.project(x_BTD)", "self.lm_head.project(x_BTD) * 1.01", name="head"
        ),
        where="head",
        dtype="bfloat16",
        stored="BF16",
    ),
    torch_bug(
        "embed row",
        "qwen3",
        Method(
            "layers.decoder.Decoder",
            "step_of = steps(",
            "x_BTD = x_BTD if cache is not None else x_BTD.roll(1, 1); step_of = steps(",
        ),
        where="layer 0",
    ),
    torch_bug(
        "embed id",
        "qwen3-tied",
        Method(
            "qwen3.Qwen3ForCausalLM",
            "self.model.embed_tokens(input_ids_BT, self.dtype)",
            "self.model.embed_tokens(input_ids_BT.clamp(max=209), self.dtype)",
            name="embed",
        ),
        where="embed",
    ),
    jax_bug(
        "embed scale",
        "gemma3",
        Method(
            "gemma3.Gemma3ForCausalLM",
            "self.config.hidden_size**0.5",
            "(self.config.hidden_size + 1)**0.5",
            name="embed",
        ),
        where="embed",
    ),
    jax_bug(
        "embed 1pct",
        "qwen3",
        Method(
            "qwen3.Qwen3ForCausalLM",
            "self.model.embed_tokens(input_ids_BT, self.dtype)",
            "self.model.embed_tokens(input_ids_BT, self.dtype) * 1.01",
            name="embed",
        ),
        where="embed",
    ),
    jax_bug(
        "head bf16",
        "qwen3",
        Method(
            "layers.linear.Linear",
            "project(x, self.weight[...])",
            "project(j_bf16(x), self.weight[...])",
            name="project",
        ),
        where="head",
    ),
    torch_bug(
        "dec pos",
        "qwen3",
        Method(
            "decoding.Decoding",
            "cache.position[:, None].clone()",
            "cache.position[:, None].clone() + 1",
            name="decode_step",
        ),
        options=GEN,
    ),
    torch_bug(
        "dec window",
        "qwen3-sliding",
        Function("layers.step", "visible", "key_1S > query_T1 - window", "key_1S > query_T1 - window + (length == 1)"),
        options=GEN,
    ),
    torch_bug(
        "dec conv",
        "qwen3_5",
        Method(
            DN,
            'cache["conv"].copy_(window_BSZ[:, T:])',
            'cache["conv"].copy_(window_BSZ[:, T - 1 : -1] if T == 1 else window_BSZ[:, T:])',
        ),
        layer=1,
        options=GEN,
    ),
    torch_bug(
        "dec state",
        "qwen3_5",
        Method(DN, 'cache["state"].copy_(state_BJPY)', 'cache["state"].copy_(state_BJPY) if T > 1 else None'),
        layer=3,
        options=GEN,
    ),
    torch_bug(
        "dec v",
        "qwen3",
        Function(
            "layers.attention",
            "remembered",
            'cache["value"].index_copy_(1, slots_T, v_BTKH)',
            'cache["value"].index_copy_(1, slots_T - (k_BTKH.shape[1] == 1), v_BTKH)',
        ),
        options=GEN,
    ),
    torch_bug(
        "dec moe copies",
        "qwen3-moe",
        Method(MO + ".Experts", "F.silu(gate_AM) * up_AM", "F.silu(up_AM) * gate_AM", name="_of_copies"),
        layer=2,
        options=GEN,
    ),
    torch_bug(
        "dec moe all",
        "qwen3-moe",
        Method(MO + ".Experts", "F.silu(gate_EUM) * up_EUM", "F.silu(up_EUM) * gate_EUM", name="_of_all"),
        layer=2,
        options=GEN,
    ),
    torch_bug(
        "dec recurrent",
        "qwen3_5",
        Function("layers.gated_delta", "recurrent_delta_rule", "- known_BJ1Y", "- 0.9 * known_BJ1Y"),
        options=GEN,
    ),
    jax_bug(
        "dec pos",
        "qwen3",
        Method("programs.Programs", "cache.position[:, None]", "cache.position[:, None] + 1", name="_decode"),
        options=GEN,
    ),
    jax_bug(
        "dec v",
        "qwen3",
        Method(
            A,
            "remembered(k_BTKH, v_BTKH, step, cache)",
            "remembered(k_BTKH, v_BTKH if cache is None or v_BTKH.shape[1] > 1 else 0 * v_BTKH, step, cache)",
        ),
        layer=2,
        options=GEN,
    ),
    jax_bug(
        "dec conv",
        "qwen3_5",
        Method(DN, '"conv": window_BSZ[:, T:]', '"conv": window_BSZ[:, T:] if T > 1 else window_BSZ[:, :-1]'),
        layer=0,
        options=GEN,
    ),
)
