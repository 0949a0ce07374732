"""Do JAX and PyTorch compute what a checkpoint says? Then break one of them, and be told what is wrong and whose it is.

    python examples/compare.py [CHECKPOINT]

Without a checkpoint a small random one is made. The oracle reads it whole in float64: take a small one.
"""

import sys
import tempfile

import torch

import parity
from parity.zoo import make_checkpoint


def main(given: list[str]) -> None:
    checkpoint = given[0] if given else make_checkpoint("qwen3", tempfile.mkdtemp())
    pair = parity.live_pair(checkpoint)
    print(pair.compare().to_text())

    layer = pair.b.model.model.layers["1"]  # PyTorch's
    layer.mlp.activation = torch.nn.functional.gelu  # a bug in the code: the checkpoint says silu
    found = pair.compare()
    print(f"\nWith another activation in one layer:\n{found.to_text()}")
    assert (found.verdict, found.whose) == ("FAIL", "b")

    layer.mlp.activation = torch.nn.functional.silu
    with torch.no_grad():
        layer.mlp.down_proj.weight.mul_(1.05)  # a weight that nobody loaded
    found = pair.compare()
    print(f"\nWith one weight five percent off:\n{found.to_text()}")
    assert found.verdict == "INVALID", "different weights are named, and not compared"


if __name__ == "__main__":
    main(sys.argv[1:])
