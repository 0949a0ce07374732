"""The rules of a layer's routed experts in every form that exporters write, for whatever family has such.

The parameters are ``gate_up_proj`` [E, 2, M, D] and ``down_proj`` [E, D, M]. Their tensors come

- fused, [E, 2M, D] and [E, D, M]: Qwen3.5 as published, Qwen3-VL-MoE as transformers 5 saves it again;
- fused transposed, [E, D, 2M] and [E, M, D]: Qwen3-VL-MoE as published;
- per expert, [M, D] twice and [D, M]: what a model made and saved anew by transformers has, and some drafts.

Gate comes before up. The two fused forms have the same names: shapes tell them apart, both tensors of a layer together
(``loaders.expand``). Where D = 2M one shape fits both ways, and where D = M the other does, never both. When the tensor
that could tell is not there, the form the family is published in is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from loaders.spec import Rule


def expert_rules(
    prefix: str,
    *,
    prefers_transposed: bool,
    when: Callable[[Any, int], bool],
    on: Literal["layer", "mtp"] = "layer",
) -> tuple[Rule, ...]:
    """The rules of the experts under ``prefix``. The family's ``dims()`` must have E, D, M and 2M.

    Args:
        prefix: ``"{text}.layers.{layer}.mlp.experts."``, the dot included.
        prefers_transposed: whether the family is published with inputs first.
        when: which layers have experts.
        on: which pipeline stages hold them.
    """
    gate_up, down = prefix + "gate_up_proj", prefix + "down_proj"
    fused = (
        Rule(gate_up, "E 2M D", when=when, on=on, form="fused", param_dims="E 2 M D"),
        Rule(down, "E D M", when=when, on=on, form="fused"),
    )
    transposed = (
        Rule(gate_up, "E D 2M", when=when, on=on, form="fused transposed", param_dims="E 2 M D"),
        Rule(down, "E M D", when=when, on=on, form="fused transposed", param_dims="E D M"),
    )
    per_expert = (
        Rule(prefix + "{expert}.gate_proj.weight", "M D", gate_up, 0, when=when, on=on, form="per expert"),
        Rule(prefix + "{expert}.up_proj.weight", "M D", gate_up, 1, when=when, on=on, form="per expert"),
        Rule(prefix + "{expert}.down_proj.weight", "D M", down, when=when, on=on, form="per expert"),
    )
    first, second = (transposed, fused) if prefers_transposed else (fused, transposed)
    return (*first, *second, *per_expert)
