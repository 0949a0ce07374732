"""Vision and the multi-token-prediction draft."""

from benchmarks.planted.plant import bugs

SEEN = "layers.vision.Seen.deepened"
MTP = "qwen3_5.Qwen3_5MTP"
DRAFT = "draft.Draft.with_taps"
MTP_TOO = {"mtp": True}
# fmt: off
BUGS = (
    *bugs("torch", SEEN,
        ("deep order", "qwen3_vl", "layer 0", "self.levels[layer]", "self.levels[1 - layer]"),
        ("deep 1pct", "qwen3_vl", "layer 1",
         "self._at(self.levels[layer], x_BTD)", "self._at(self.levels[layer], x_BTD) * (1.01 if layer == 1 else 1)"),
        ("deep last", "qwen3_vl", "layer 1", "layer >= len(self.levels)", "layer >= len(self.levels) - 1"),
    ),
    *bugs("torch", "layers.vision.vision_rotation",
        ("grid rc", "qwen3_vl", "embed", "place_A2[..., None]", "place_A2.flip(-1)[..., None]"),
    ),
    *bugs("torch", "layers.vision.VisionAttention",
        ("frames", "qwen3_vl", "embed",
         "x.transpose(0, 1).split(frames, dim=1)", "x.transpose(0, 1).split((sum(frames),), dim=1)"),
    ),
    *bugs("torch", "layers.vision.VisionTower",
        ("share", "qwen3_vl", "embed", "shown.share_A4[..., None]", "shown.share_A4.round()[..., None]"),
    ),
    *bugs("torch", "layers.vision.PatchMerger",
        ("merger gelu", "qwen3_vl", "embed",
         "gelu(self.linear_fc1(x_UM))", "TF.gelu(self.linear_fc1(x_UM), approximate='tanh')"),
    ),
    *bugs("torch", "layers.rotary._axes", ("mrope hw", "qwen3_vl", None, "axes = [1 if", "axes = [2 if")),
    *bugs("jax", SEEN, ("deep gone", "qwen3_vl", "layer 1", "layer >= len(self.levels)", "layer >= 1")),
    *bugs("jax", "layers.vision.vision_rotation",
        ("v norm eps", "qwen3_vl", "embed", "np.power(theta,", "np.power(theta * 1.02,"),
    ),
    *bugs("jax", "layers.rotary.rotary_embedding",
        ("mrope time", "qwen3_vl", None,
         "position_ids[_axes(rope, rotary_dim)]", "position_ids[0 * _axes(rope, rotary_dim)]"),
    ),
    *bugs("torch", MTP,
        ("mtp halves", "qwen3_5", "mtp", "torch.cat(parts, dim=-1)", "torch.cat(parts[::-1], dim=-1)"),
        options=MTP_TOO,
    ),
    *bugs("torch", DRAFT,
        ("mtp pos", "qwen3_5", "mtp",
         "step_positions[..., 1:]",
         "step_positions[..., :-1]",
         {"equivalent": "rotary positions are relative, and every one is one off"}),
        ("mtp same tok", "qwen3_5", "mtp", "target.embed(ids_BT[:, 1:])", "target.embed(ids_BT[:, :-1])"),
        options=MTP_TOO,
    ),
    *bugs("jax", MTP,
        ("mtp norm", "qwen3_5", "mtp", "self.pre_fc_norm_hidden(hidden_BTD)", "hidden_BTD"),
        options=MTP_TOO,
    ),
)
# fmt: on
