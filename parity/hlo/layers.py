"""What each layer of a compiled model costs: an instruction belongs to the deepest layer whose parameters it needs.

XLA names no layers, fuses across operations and moves weights ahead of their use; what depends on what remains. The
residual stream of a layer needs all layers before it, so weights on their way to VMEM, activations, updates of a cache
and sums over devices all find theirs.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.hlo.module import Module
from parity.hlo.traffic import Traffic, Walk

OUTSIDE = -1  # what needs no layer: token ids, rotary embeddings, weights of embedding and head on their way


def traffic_by_layer(text: str, layer_of: Callable[[str], int | None]) -> dict[int, Traffic]:
    """Of the program whose optimised HLO text this is, by layer; what follows the last layer counts as its own.

    ``layer_of``: the layer of a parameter by what JAX called it, ``weights['model']['layers']['3']['mlp'][...]``, with
    no backslashes; None: it is no layer's.

    Raises:
        ValueError: it is not the text of an HLO module.
    """
    module = Module.parse(text)
    layers: dict[str, int] = {}
    found: dict[int, Traffic] = {}
    for one, cost in Walk(module).each(module.entry):
        if one.opcode == "parameter":
            layer = layer_of(one.source.replace("\\", ""))
            layers[one.name] = OUTSIDE if layer is None else layer
        else:
            layers[one.name] = max((layers[name] for name in one.operands if name in layers), default=OUTSIDE)
        found.setdefault(layers[one.name], Traffic()).add(cost)
    return found
