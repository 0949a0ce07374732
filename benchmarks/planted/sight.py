"""Vision and the multi-token-prediction draft."""

from benchmarks.planted.plant import Function, Method, jax_bug, torch_bug

BUGS = (
    torch_bug(
        "deep order",
        "qwen3_vl",
        Method("layers.vision.Seen", "self.levels[layer]", "self.levels[1 - layer]", name="deepened"),
        where="layer 0",
    ),
    torch_bug(
        "deep 1pct",
        "qwen3_vl",
        Method(
            "layers.vision.Seen",
            "self._at(self.levels[layer], x_BTD)",
            "self._at(self.levels[layer], x_BTD) * (1.01 if layer == 1 else 1)",
            name="deepened",
        ),
        where="layer 1",
    ),
    torch_bug(
        "deep last",
        "qwen3_vl",
        Method("layers.vision.Seen", "layer >= len(self.levels)", "layer >= len(self.levels) - 1", name="deepened"),
        where="layer 1",
    ),
    torch_bug(
        "grid rc",
        "qwen3_vl",
        Function("layers.vision", "vision_rotation", "place_A2[..., None]", "place_A2.flip(-1)[..., None]"),
        where="embed",
    ),
    torch_bug(
        "frames",
        "qwen3_vl",
        Method(
            "layers.vision.VisionAttention",
            "x.transpose(0, 1).split(frames, dim=1)",
            "x.transpose(0, 1).split((sum(frames),), dim=1)",
        ),
        where="embed",
    ),
    torch_bug(
        "share",
        "qwen3_vl",
        Method("layers.vision.VisionTower", "shown.share_A4[..., None]", "shown.share_A4.round()[..., None]"),
        where="embed",
    ),
    torch_bug(
        "merger gelu",
        "qwen3_vl",
        Method(
            "layers.vision.PatchMerger",
            "gelu(self.linear_fc1(x_UM))",
            "TF.gelu(self.linear_fc1(x_UM), approximate='tanh')",
        ),
        where="embed",
    ),
    torch_bug("mrope hw", "qwen3_vl", Function("layers.rotary", "_axes", "axes = [1 if", "axes = [2 if")),
    jax_bug(
        "deep gone",
        "qwen3_vl",
        Method("layers.vision.Seen", "layer >= len(self.levels)", "layer >= 1", name="deepened"),
        where="layer 1",
    ),
    jax_bug(
        "v norm eps",
        "qwen3_vl",
        Function("layers.vision", "vision_rotation", "np.power(theta,", "np.power(theta * 1.02,"),
        where="embed",
    ),
    jax_bug(
        "mrope time",
        "qwen3_vl",
        Function(
            "layers.rotary",
            "rotary_embedding",
            "position_ids[_axes(rope, rotary_dim)]",
            "position_ids[0 * _axes(rope, rotary_dim)]",
        ),
    ),
    torch_bug(
        "mtp halves",
        "qwen3_5",
        Method("qwen3_5.Qwen3_5MTP", "torch.cat(parts, dim=-1)", "torch.cat(parts[::-1], dim=-1)"),
        options={"mtp": True},
        where="mtp",
    ),
    torch_bug(
        "mtp pos",
        "qwen3_5",
        Method("draft.Draft", "step_positions[..., 1:]", "step_positions[..., :-1]", name="with_taps"),
        options={"mtp": True},
        where="mtp",
        equivalent="rotary positions are relative, and every one is one off",
    ),
    torch_bug(
        "mtp same tok",
        "qwen3_5",
        Method("draft.Draft", "target.embed(ids_BT[:, 1:])", "target.embed(ids_BT[:, :-1])", name="with_taps"),
        options={"mtp": True},
        where="mtp",
    ),
    jax_bug(
        "mtp norm",
        "qwen3_5",
        Method("qwen3_5.Qwen3_5MTP", "self.pre_fc_norm_hidden(hidden_BTD)", "hidden_BTD"),
        options={"mtp": True},
        where="mtp",
    ),
)
