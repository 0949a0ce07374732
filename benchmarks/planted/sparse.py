"""Experts, and what hybrid models have: gated attention, gated delta nets, a shared expert."""

from benchmarks.planted.plant import Function, Method, jax_bug, torch_bug

G = "layers.gated_attention.GatedAttention"
DN = "layers.gated_delta.GatedDeltaNet"
MO = "layers.moe"
BUGS = (
    torch_bug("gate swap", "qwen3_5", Method(G, "q_BTNH, gate_BTNH = ", "gate_BTNH, q_BTNH = "), layer=2),
    torch_bug(
        "gate 2pct", "qwen3_5", Method(G, "torch.sigmoid(gate_BTNH)", "torch.sigmoid(gate_BTNH * 1.02)"), layer=2
    ),
    torch_bug(
        "partial rope",
        "qwen3_5",
        Method(
            G,
            "rotate(k_BTKH, step.cos_BTR, step.sin_BTR)",
            "rotate(k_BTKH, step.cos_BTR[..., :-1], step.sin_BTR[..., :-1])",
        ),
        layer=2,
    ),
    jax_bug(
        "gate half", "qwen3_5", Method(G, "jax.nn.sigmoid(gate_BTNH)", "jax.nn.sigmoid(gate_BTNH[:, :, ::-1])"), layer=2
    ),
    torch_bug(
        "topk-1",
        "qwen3-moe",
        Method(MO + ".TopKRouter", "[..., : self.top_k]", "[..., : self.top_k - 1]", count=2, name="choose"),
        layer=2,
    ),
    torch_bug(
        "last expert zero",
        "qwen3-moe",
        Method(
            MO + ".SparseMoeBlock",
            "self.experts(x_BTD, weights_BTX,",
            "self.experts(x_BTD, weights_BTX * torch.tensor([1.0, 0.0]),",
        ),
        layer=2,
    ),
    torch_bug(
        "nonorm",
        "qwen3-moe",
        Method(MO + ".TopKRouter", "if self.norm_topk_prob:", "if False:", name="choose"),
        layer=0,
    ),
    torch_bug(
        "router bf16",
        "qwen3-moe",
        Method(
            MO + ".TopKRouter",
            "F.linear(x_BTD.float(), weight_ED)",
            "t_bf16(F.linear(x_BTD.float(), weight_ED))",
            name="logits",
        ),
        layer=2,
    ),
    torch_bug(
        "router bf16 in bf16",
        "qwen3-moe",
        Method(
            MO + ".TopKRouter",
            "F.linear(x_BTD.float(), weight_ED)",
            "t_bf16(F.linear(x_BTD.float(), weight_ED))",
            name="logits",
        ),
        layer=2,
        dtype="bfloat16",
        stored="BF16",
        equivalent="transformers' own router rounds its scores so in bfloat16, and a rounding is what it is",
    ),
    torch_bug(
        "experts12",
        "qwen3-moe",
        Method(MO + ".SparseMoeBlock", "weights_BTX, experts_BTX)", "weights_BTX, t_swap(experts_BTX, 1, 2))", count=1),
        layer=3,
    ),
    torch_bug(
        "weights rev",
        "qwen3-moe",
        Method(MO + ".SparseMoeBlock", "self.experts(x_BTD, weights_BTX,", "self.experts(x_BTD, weights_BTX.flip(-1),"),
        layer=2,
    ),
    torch_bug(
        "nonorm softmax",
        "qwen3-moe-nonorm",
        Method(MO + ".TopKRouter", "if self.norm_topk_prob:", "if True:", name="choose"),
        layer=1,
    ),
    torch_bug(
        "softmax after",
        "qwen3-moe-nonorm",
        Method(
            MO + ".TopKRouter",
            "F.softmax(logits_BTE, dim=-1).sort(dim=-1, descending=True, stable=True)",
            "(lambda s: (s[0][..., :self.top_k].softmax(-1), s[1]))(logits_BTE.sort(dim=-1, descending=True, stable=True))",
            name="choose",
        ),
        layer=3,
    ),
    torch_bug(
        "expert3 2pct",
        "qwen3-moe",
        Method(
            MO + ".Experts",
            "out_AD = F.linear(hidden_AM, self.down_proj[expert].to(x_UD.dtype))",
            "out_AD = F.linear(hidden_AM, self.down_proj[expert].to(x_UD.dtype)) * (1.02 if expert == 3 else 1)",
            name="_of_hit",
        ),
        layer=2,
    ),
    torch_bug(
        "capacity",
        "qwen3-moe",
        Method(
            MO + ".Experts",
            "(place_A,) = (experts_UX.flatten() == expert).nonzero(as_tuple=True)",
            "(place_A,) = (experts_UX.flatten() == expert).nonzero(as_tuple=True); out_UXD.flatten(0, 1)[place_A[100:]] = 0; place_A = place_A[:100]",
            name="_of_hit",
        ),
        layer=3,
    ),
    torch_bug(
        "shared gate",
        "qwen3_5-moe",
        Method(
            "layers.shared_expert.SharedExpertMoeBlock", "torch.sigmoid(gate_BT1)", "torch.sigmoid(gate_BT1 * 1.02)"
        ),
        layer=1,
    ),
    torch_bug(
        "router row",
        "qwen3-moe",
        Method(
            MO + ".TopKRouter",
            "F.linear(x_BTD.float(), weight_ED)",
            "F.linear(x_BTD.float(), weight_ED) + torch.tensor([0, 0, 0, 0.02, 0])",
            name="logits",
        ),
        layer=0,
    ),
    torch_bug(
        "router w bf16",
        "qwen3-moe",
        Method(
            MO + ".TopKRouter",
            "weight_ED = self.weight.to(x_BTD.dtype).float()",
            "weight_ED = t_bf16(self.weight.float())",
            name="logits",
        ),
        layer=3,
    ),
    jax_bug(
        "topk wrong second",
        "qwen3-moe",
        Method(
            MO + ".TopKRouter",
            "weights_BTX, experts_BTX = jax.lax.top_k(jax.nn.softmax(logits_BTE, axis=-1), self.top_k)",
            "weights_BTX, experts_BTX = jax.lax.top_k(jax.nn.softmax(logits_BTE, axis=-1), self.top_k + 1); weights_BTX, experts_BTX = weights_BTX[..., jnp.array([0, 2])], experts_BTX[..., jnp.array([0, 2])]",
            name="choose",
        ),
        layer=3,
    ),
    jax_bug(
        "down neighbour",
        "qwen3-moe",
        Method(
            MO + ".Experts",
            "self.down_proj[...].astype(x_BTD.dtype)",
            "jnp.roll(self.down_proj[...], 1, axis=0).astype(x_BTD.dtype)",
        ),
        layer=0,
    ),
    jax_bug(
        "shared gone",
        "qwen3_5-moe",
        Method(
            "layers.shared_expert.SharedExpertMoeBlock",
            "experts_BTD + jax.nn.sigmoid(gate_BT1) * shared_BTD",
            "experts_BTD",
        ),
        layer=2,
    ),
    jax_bug(
        "router w bf16",
        "qwen3-moe",
        Method(MO + ".TopKRouter", "self.weight[...].astype(x_BTD.dtype)", "j_bf16(self.weight[...])", name="logits"),
        layer=2,
    ),
    jax_bug(
        "weights1pct",
        "qwen3-moe",
        Method(MO + ".SparseMoeBlock", "self.experts(x_BTD, weights_BTX,", "self.experts(x_BTD, weights_BTX * 1.01,"),
        layer=3,
    ),
    jax_bug(
        "router temp",
        "qwen3_5-moe",
        Method(
            MO + ".TopKRouter",
            "jax.nn.softmax(logits_BTE, axis=-1), self.top_k",
            "jax.nn.softmax(logits_BTE * 1.01, axis=-1), self.top_k",
            name="choose",
        ),
        layer=0,
    ),
    torch_bug("decay1pct", "qwen3_5", Method(DN, "* rate_BTJ * mask_BT1", "* rate_BTJ * mask_BT1 * 1.01"), layer=1),
    torch_bug(
        "conv rev",
        "qwen3_5",
        Method(DN, "self.conv1d(window_BSZ, T)", "self.conv1d(window_BSZ.roll(1, 1), T)"),
        layer=0,
    ),
    torch_bug("beta2", "qwen3_5", Method(DN, "beta_BTJ.sigmoid()", "2 * beta_BTJ.sigmoid()"), layer=3),
    torch_bug(
        "state bf16",
        "qwen3_5",
        Function(
            "layers.gated_delta",
            "chunked_delta_rule",
            "state_BJPY * fading_BJ11 +",
            "t_bf16(state_BJPY) * fading_BJ11 +",
        ),
    ),
    torch_bug(
        "gnorm eps",
        "qwen3_5",
        Method(
            DN,
            "self.norm(out_BTJY, gate_BTJY)",
            "(setattr(self.norm, 'eps', 1e-5), self.norm(out_BTJY, gate_BTJY), setattr(self.norm, 'eps', 1e-6))[1]",
        ),
        layer=3,
    ),
    torch_bug(
        "gnorm act",
        "qwen3_5",
        Method(
            DN,
            "self.norm(out_BTJY, gate_BTJY)",
            "self.norm(out_BTJY, gate_BTJY) / TF.silu(gate_BTJY) * torch.sigmoid(gate_BTJY)",
        ),
        layer=0,
    ),
    torch_bug("l2eps", "qwen3_5", Method(DN, "+ L2_EPS", "+ 1e-5", name="_spread")),
    torch_bug("l2eps local", "qwen3_5", Method(DN, "+ L2_EPS", "+ 1e-5", name="_spread"), layer=3),
    torch_bug(
        "key tile",
        "qwen3_5",
        Method(
            DN,
            "normed_BTIP.repeat_interleave(self.num_value_heads // self.num_key_heads, dim=2)",
            "normed_BTIP.repeat(1, 1, self.num_value_heads // self.num_key_heads, 1)",
            name="_spread",
        ),
        layer=1,
    ),
    torch_bug("dt bias", "qwen3_5", Method(DN, "rate_BTJ + self.dt_bias.float()", "rate_BTJ"), layer=3),
    torch_bug(
        "chunk fade",
        "qwen3_5",
        Function(
            "layers.gated_delta", "chunked_delta_rule", "(decay[..., -1:] - decay)", "(decay[..., -1:] - 0.9 * decay)"
        ),
    ),
    torch_bug("pad in conv", "qwen3_5", Method(DN, "x_BTD = x_BTD * mask_BT1", "pass"), layer=1),
    jax_bug("decay1pct", "qwen3_5", Method(DN, "* rate_BTJ * mask_BT1", "* rate_BTJ * mask_BT1 * 0.99"), layer=3),
    jax_bug(
        "conv tap",
        "qwen3_5",
        Method(DN, "self.conv1d(window_BSZ, T)", "self.conv1d(jnp.roll(window_BSZ, 1, axis=1), T)"),
        layer=1,
    ),
    jax_bug(
        "q scale",
        "qwen3_5",
        Method(DN, "self.key_head_dim**-0.5", "self.value_head_dim**-0.5"),
        layer=0,
    ),
    jax_bug("beta bias", "qwen3_5", Method(DN, "jax.nn.sigmoid(beta_BTJ)", "jax.nn.sigmoid(beta_BTJ + 0.01)"), layer=3),
    jax_bug(
        "z order",
        "qwen3_5",
        Method(
            DN,
            "self.norm(out_BTJY, gate_BTJY)",
            "self.norm(out_BTJY * jax.nn.silu(gate_BTJY), jnp.ones_like(gate_BTJY))",
        ),
        layer=1,
    ),
    jax_bug("pad rows", "qwen3_5", Method(DN, "x_BTD = x_BTD * mask_BT1", "pass")),
)
