"""Attention, rotary embedding and the dense MLP."""

from benchmarks.planted.plant import Function, Method, jax_bug, torch_bug

A = "layers.attention.Attention"
M = "layers.mlp.MLP"
BUGS = (
    torch_bug("scale1pct", "qwen3", Method(A, "attend(q_BTNH,", "attend(q_BTNH * 1.01,"), layer=2),
    torch_bug("scale h+1", "qwen3", Method(A, "scale=self.scale", "scale=(self.head_dim + 1) ** -0.5")),
    torch_bug(
        "causal<",
        "qwen3",
        Function("layers.step", "visible", "key_1S <= query_T1", "key_1S < query_T1"),
        equivalent="a query always sees itself by the other clause",
    ),
    torch_bug("causal+1", "qwen3", Function("layers.step", "visible", "key_1S <= query_T1", "key_1S <= query_T1 + 1")),
    torch_bug(
        "window>=", "qwen3-sliding", Function("layers.step", "visible", "> query_T1 - window", ">= query_T1 - window")
    ),
    torch_bug("window-1", "qwen3-sliding", Method(A, "step.visible_BTS", "t_narrow(step.visible_BTS)"), layer=2),
    torch_bug(
        "window full layer",
        "qwen3-sliding",
        Method(
            A,
            "step.visible_BTS",
            "(step.visible_BTS & (torch.arange(step.visible_BTS.shape[2])[None] > torch.arange(step.visible_BTS.shape[1])[:, None] - 64)[None])",
        ),
        layer=3,
    ),
    torch_bug(
        "theta2pct",
        "qwen3",
        Function("layers.rotary", "_static_frequencies", "rope.rope_theta **", "(rope.rope_theta * 1.02) **"),
    ),
    torch_bug("pairs", "qwen3", Method(A, "rotate(q_BTNH, step", "t_pairs(q_BTNH, step"), layer=1),
    torch_bug(
        "q pos+1",
        "qwen3",
        Method(
            A,
            "rotate(q_BTNH, step.cos_BTR, step.sin_BTR)",
            "rotate(q_BTNH, step.cos_BTR.roll(-1, 1), step.sin_BTR.roll(-1, 1))",
        ),
        layer=3,
    ),
    torch_bug("q unrotated", "qwen3", Method(A, "rotate(q_BTNH, step.cos_BTR, step.sin_BTR)", "q_BTNH"), layer=0),
    torch_bug("q by k norm", "qwen3", Method(A, "self.q_norm(q_BTNH)", "self.k_norm(q_BTNH)"), layer=1),
    torch_bug("k norm eps", "qwen3", Method(A, "self.k_norm(k_BTKH)", "t_norm(self.k_norm, k_BTKH, 1e-5)"), layer=2),
    torch_bug("gqa tile", "qwen3", Method(A, "attend(q_BTNH,", "attend(t_tile(q_BTNH, k_BSKH.shape[2]),"), layer=2),
    torch_bug(
        "one head 1pct",
        "qwen3",
        Method(A, '"attention", out_BTNH)', '"attention", t_scaled_head(out_BTNH, 4, 1.01))'),
        layer=3,
    ),
    torch_bug("v 1pct", "qwen3-deep", Method(A, "self.v_proj(x_BTD)", "self.v_proj(x_BTD) * 1.01"), layer=10),
    torch_bug(
        "o bf16",
        "qwen3",
        Method(
            A,
            'out_BTNH = tap(self.path, "attention", out_BTNH)',
            'out_BTNH = t_bf16(tap(self.path, "attention", out_BTNH))',
        ),
        layer=0,
    ),
    torch_bug(
        "bias lost k", "qwen3-bias", Method(A, "self.k_proj(x_BTD)", "TF.linear(x_BTD, self.k_proj.weight)"), layer=1
    ),
    torch_bug(
        "bias lost v", "qwen3-bias", Method(A, "self.v_proj(x_BTD)", "TF.linear(x_BTD, self.v_proj.weight)"), layer=2
    ),
    torch_bug(
        "pad seen",
        "qwen3",
        Function("layers.step", "visible", "(causal_TS[None] & key_mask_BS[:, None, :])", "causal_TS[None]"),
    ),
    torch_bug(
        "yarn factor",
        "qwen3-yarn",
        Function("layers.rotary", "_yarn_attention_factor", "return _mscale(rope.factor, 1.0)", "return 1.0"),
    ),
    torch_bug(
        "yarn beta4",
        "qwen3-yarn",
        Function("layers.rotary", "_yarn_frequencies", "rope.beta_slow or 1", "rope.beta_slow or 4"),
    ),
    torch_bug(
        "yarn beta",
        "qwen3-yarn",
        Function("layers.rotary", "_yarn_frequencies", "rope.beta_slow or 1", "rope.beta_slow or 2"),
        equivalent="both bounds round to the same pair of dimensions in this zoo model",
    ),
    torch_bug(
        "cos bf16",
        "qwen3",
        Function(
            "layers.rotary",
            "rotary_embedding",
            "torch.cos(angles_BTR) * scale, torch.sin(angles_BTR) * scale",
            "t_bf16(torch.cos(angles_BTR)) * scale, t_bf16(torch.sin(angles_BTR)) * scale",
        ),
    ),
    torch_bug(
        "norm after rope",
        "qwen3",
        Method(
            A,
            'q_BTNH = tap(self.path, "q_norm", self.q_norm(q_BTNH))',
            'q_BTNH = tap(self.path, "q_norm", self.q_norm(rotate(q_BTNH, step.cos_BTR, step.sin_BTR)))',
        ),
        layer=1,
    ),
    torch_bug(
        "scale bf16",
        "qwen3",
        Method(A, "attend(q_BTNH,", "attend(q_BTNH * 1.05,"),
        layer=1,
        dtype="bfloat16",
        stored="BF16",
    ),
    jax_bug("scale1pct", "qwen3", Method(A, "attend(q_BTNH,", "attend(q_BTNH * 1.01,"), layer=1),
    jax_bug(
        "window+1",
        "qwen3-sliding",
        Function("layers.step", "visible", "> query_T1 - window", "> query_T1 - window - 1"),
    ),
    jax_bug(
        "v heads",
        "qwen3",
        Method(
            A, "self.v_proj(x_BTD)).reshape(heads)", "self.v_proj(x_BTD)).reshape(heads)[:, :, jnp.array([0, 2, 1])]"
        ),
        layer=0,
    ),
    jax_bug(
        "rope sign",
        "qwen3",
        Method(A, "rotate(q_BTNH, step.cos_BTR, step.sin_BTR)", "rotate(q_BTNH, step.cos_BTR, -step.sin_BTR)"),
        layer=2,
    ),
    jax_bug("k norm gone", "qwen3", Method(A, "self.k_norm(k_BTKH)", "k_BTKH"), layer=3),
    jax_bug("gqa tile", "qwen3-moe", Method(A, "attend(q_BTNH,", "attend(j_tile(q_BTNH, k_BSKH.shape[2]),"), layer=2),
    jax_bug("q bf16", "qwen3", Method(A, "attend(q_BTNH,", "attend(j_bf16(q_BTNH),"), layer=1),
    jax_bug("softcap", "gemma3-capped", Method(A, "softcap=self.softcap", "softcap=4.1"), layer=2),
    jax_bug(
        "pos pad",
        "qwen3",
        Function("layers.step", "visible", "(causal_TS[None] & key_mask_BS[:, None, :])", "causal_TS[None]"),
        options={"padding": "left"},
    ),
    torch_bug("gelu", "qwen3", Method(M, "self.activation(gate_BTF)", "TF.gelu(gate_BTF)"), layer=1),
    torch_bug(
        "gateup",
        "qwen3",
        Method(M, "self.activation(gate_BTF) * up_BTF", "self.activation(up_BTF) * gate_BTF"),
        layer=2,
    ),
    torch_bug("row7", "qwen3", Method(M, "* up_BTF)", "* t_scaled_chan(up_BTF, 7, 1.1))"), layer=3),
    torch_bug("row7 1pct", "qwen3", Method(M, "* up_BTF)", "* t_scaled_chan(up_BTF, 7, 1.01))"), layer=1),
    torch_bug(
        "down1pct", "qwen3", Method(M, "self.down_proj(product_BTF)", "self.down_proj(product_BTF) * 1.01"), layer=0
    ),
    torch_bug(
        "down1pct bf16",
        "qwen3",
        Method(M, "self.down_proj(product_BTF)", "(self.down_proj(product_BTF).float() * 1.01).to(x_BTD.dtype)"),
        layer=2,
        dtype="bfloat16",
        stored="BF16",
    ),
    torch_bug("clamp", "qwen3", Method(M, "self.gate_proj(x_BTD)", "self.gate_proj(x_BTD).clamp(max=3)"), layer=3),
    torch_bug("gelu exact", "gemma3", Method(M, "self.activation(gate_BTF)", "TF.gelu(gate_BTF)"), layer=3),
    jax_bug("gelu exact", "gemma3", Method(M, "self.activation(gate_BTF)", "jax.nn.gelu(gate_BTF, approximate=False)")),
    jax_bug(
        "gateup",
        "gemma3",
        Method(M, "self.activation(gate_BTF) * up_BTF", "self.activation(up_BTF) * gate_BTF"),
        layer=4,
    ),
    jax_bug(
        "one tok",
        "qwen3",
        Method(M, "self.down_proj(product_BTF)", "self.down_proj(product_BTF).at[:, 63].multiply(1.5)"),
        layer=1,
    ),
    jax_bug("up bf16", "qwen3-deep", Method(M, "self.up_proj(x_BTD)", "j_bf16(self.up_proj(x_BTD))"), layer=7),
)
