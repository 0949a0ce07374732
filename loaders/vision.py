"""The vision tower of the Qwen3-VL and Qwen3.5 wrappers: its part of config.json, and its tensors as published.

Source: transformers ``Qwen3VLVisionConfig``, ``Qwen3_5VisionConfig`` and the models' saved names (5.23).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loaders.checks import MOST_LAYERS, multiple_problems
from loaders.config import read_fields
from loaders.errors import brief
from loaders.spec import Dim, Rule

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
# keys of the wrapper around text and vision
WRAPPER_KEYS = frozenset(
    """text_config vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id
    tie_word_embeddings language_model_only""".split()
)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """``vision_config`` of config.json, and the wrapper's tokens that stand for what the tower sees.

    What a file leaves out is what transformers takes it for.
    """

    image_token_id: int
    video_token_id: int
    depth: int = 27
    hidden_size: int = 1152  # C
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    spatial_merge_size: int = 2  # so many patches by so many become one token
    temporal_patch_size: int = 2  # frames of a patch
    out_hidden_size: int = 3584  # the text model's hidden_size
    num_position_embeddings: int = 2304  # the first so many of them make a square grid
    # blocks whose output is also added after the first decoder layers; numbers of no block have their weights, unused
    deepstack_visual_indexes: tuple[int, ...] = ()
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_side(self) -> int:
        """Rows, and columns, of the learned position embedding."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def num_levels(self) -> int:
        """Deepstack levels that the tower's blocks make: those of ``deepstack_visual_indexes`` that are blocks."""
        return len(set(self.deepstack_visual_indexes) & set(range(self.depth)))

    def levels_taken(self, num_hidden_layers: int) -> int:
        """Decoder layers that take a level, the first so many: a pipeline's first stage must hold all of them."""
        return min(self.num_levels, num_hidden_layers)

    @property
    def patch_numbers(self) -> int:
        """Numbers of one patch: channels, frames, rows, columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged(self) -> int:
        """Patches of one token."""
        return self.spatial_merge_size**2

    def dims(self) -> dict[str, Dim]:
        """Axes of the tower's tensors, by the letters of ``VISION_RULES``."""
        own = "vision_config: "
        return {
            "VC": Dim(self.hidden_size, f"{own}hidden_size"),
            "3VC": Dim(3 * self.hidden_size, f"{own}hidden_size"),
            "VF": Dim(self.intermediate_size, f"{own}intermediate_size"),
            "VG": Dim(self.num_position_embeddings, f"{own}num_position_embeddings"),
            "VM": Dim(self.merged * self.hidden_size, f"{own}hidden_size, spatial_merge_size"),
            "VO": Dim(self.out_hidden_size, f"{own}out_hidden_size"),
            "VI": Dim(self.in_channels, f"{own}in_channels"),
            "VT": Dim(self.temporal_patch_size, f"{own}temporal_patch_size"),
            "VP": Dim(self.patch_size, f"{own}patch_size"),
        }

    def problems(self, text_size: int) -> list[str]:
        """What this configuration asks for and cannot have beside that text model, one sentence each."""
        own = "config.json: vision_config: "
        found = [
            f"{own}{name} is {value}, expected at least 1"
            for name, value in vars(self).items()
            if type(value) is int and value < 1 and not name.endswith("_token_id")
        ]
        if found:
            return found
        if self.depth > MOST_LAYERS:
            found.append(f"{own}depth is {self.depth}, expected at most {MOST_LAYERS}")
        found += [
            problem.replace("config.json: ", own)
            for problem in multiple_problems(hidden_size=self.hidden_size, num_heads=self.num_heads)
        ]
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            found.append(f"{own}hidden_act {brief(self.hidden_act)} is not implemented. Known: {known}")
        if self.head_dim % 4:
            found.append(f"{own}a head has {self.head_dim} dimensions; two axes of rotary pairs need a multiple of 4")
        if not self.rope_theta > 1:
            found.append(f"{own}rope_theta is {self.rope_theta}, expected more than 1")
        if self.out_hidden_size != text_size:
            sizes = f"out_hidden_size is {self.out_hidden_size}, expected {text_size}"
            found.append(f"{own}{sizes} as the text model's hidden_size")
        if len(self.deepstack_visual_indexes) > MOST_LAYERS:
            levels = f"{len(self.deepstack_visual_indexes)} entries, expected at most {MOST_LAYERS}"
            found.append(f"{own}deepstack_visual_indexes has {levels}")
        if self.image_token_id == self.video_token_id:
            found.append(f"config.json: image_token_id and video_token_id are both {self.image_token_id}")
        return found


def read_vision(
    document: dict[str, Any], *, levels: list[int] | None = None, **tokens: int
) -> tuple[VisionConfig | None, list[str]]:
    """The tower that a wrapper's config.json describes, None where it has none, and every problem.

    ``language_model_only`` says that the checkpoint holds the text model alone.

    Args:
        document: config.json.
        levels: the family's ``deepstack_visual_indexes``; None: it has none, whatever the file says.
        tokens: the family's ``image_token_id`` and ``video_token_id``.
    """
    given, is_text_alone = document.get("vision_config"), document.get("language_model_only")
    if not isinstance(is_text_alone, bool | None):
        return None, [f"config.json: language_model_only is {brief(is_text_alone)}, expected true or false"]
    if given is None or is_text_alone:
        return None, []
    if not isinstance(given, dict):
        return None, [f"config.json: vision_config is {brief(given)}, expected an object"]
    rope = given.get("rope_parameters")
    plain = {key: value for key, value in given.items() if key != "rope_parameters"}
    if plain.get("deepstack_visual_indexes") is None or levels is None:
        plain["deepstack_visual_indexes"] = levels or []
    tokens |= {key: document[key] for key in tokens if document.get(key) is not None}
    problems = []
    if rope is not None:
        theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        if not isinstance(rope, dict) or rope.get("rope_type", "axial") not in _AXIAL_TYPES or set(rope) - _AXIAL:
            problems.append(f"rope_parameters {brief(rope)} is not implemented, expected rope_type 'axial'")
        if theta is not None and plain.setdefault("rope_theta", theta) != theta:
            two = f"{brief(plain['rope_theta'])} beside {brief(theta)} in rope_parameters"
            problems.append(f"rope_theta is {two}. Remove one.")
    config, more = read_fields(VisionConfig, plain | tokens)
    problems += [problem.removeprefix("config.json: ") for problem in more]
    return (None if problems else config), [f"config.json: vision_config: {problem}" for problem in problems]


_AXIAL = {"rope_type", "rope_theta"}
_AXIAL_TYPES = ("axial", "default")  # the latter in older files, for the same


def vision_rules() -> tuple[Rule, ...]:
    """The tower's lines of a family's table."""
    visual, block = "model.visual.", "model.visual.blocks.{layer}."
    return (
        Rule(visual + "patch_embed.proj.weight", "VC VI VT VP VP", on="visual"),
        Rule(visual + "patch_embed.proj.bias", "VC", on="visual"),
        Rule(visual + "pos_embed.weight", "VG VC", on="visual", is_table=True),
        *_norm(block + "norm1", "VC", on="visual"),
        *_norm(block + "norm2", "VC", on="visual"),
        *_linear(block + "attn.qkv", "3VC", "VC", on="visual"),
        *_linear(block + "attn.proj", "VC", "VC", on="visual"),
        *_linear(block + "mlp.linear_fc1", "VF", "VC", on="visual"),
        *_linear(block + "mlp.linear_fc2", "VC", "VF", on="visual"),
        *_norm(visual + "merger.norm", "VC", on="visual"),
        *_linear(visual + "merger.linear_fc1", "VM", "VM", on="visual"),
        *_linear(visual + "merger.linear_fc2", "VO", "VM", on="visual"),
        *_norm(visual + "deepstack_merger_list.{layer}.norm", "VM", on="deepstack"),
        *_linear(visual + "deepstack_merger_list.{layer}.linear_fc1", "VM", "VM", on="deepstack"),
        *_linear(visual + "deepstack_merger_list.{layer}.linear_fc2", "VO", "VM", on="deepstack"),
    )


def _norm(path: str, size: str, *, on: Any) -> tuple[Rule, Rule]:
    return Rule(path + ".weight", size, on=on), Rule(path + ".bias", size, on=on)


def _linear(path: str, rows: str, columns: str, *, on: Any) -> tuple[Rule, Rule]:
    return Rule(path + ".weight", f"{rows} {columns}", on=on), Rule(path + ".bias", rows, on=on)
