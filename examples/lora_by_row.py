"""Several LoRA adapters in one batch, each row with its own; then one of them merged, and taken out again.

    python examples/lora_by_row.py [CHECKPOINT ADAPTER ADAPTER]

Adapters are directories that PEFT wrote. Without arguments small random ones are made.
"""

import sys
import tempfile

import numpy as np

import jax_models
import torch_models
from parity.zoo import make_checkpoint
from parity.zoo.adapters import make_adapter

PROMPT = [3, 14, 15, 92, 65]


def main(given: list[str]) -> None:
    base, *adapters = given or [make_checkpoint("qwen3", tempfile.mkdtemp())]
    adapters = adapters or [make_adapter(base, tempfile.mkdtemp(), seed=seed) for seed in range(2)]

    for package in (jax_models, torch_models):
        model = package.load(base)
        before = model.digests()
        for name, directory in zip(("poet", "lawyer"), adapters, strict=True):
            model = model.attach_lora(directory, name)

        rows = ["poet", None, "lawyer"]  # None: the base alone
        for name, tokens in zip(rows, np.asarray(model.generate([PROMPT] * 3, adapter=rows)), strict=True):
            print(f"{package.__name__}: {name or 'base'}: {tokens.tolist()}")

        model = model.merge_lora("poet")
        model = model.unmerge_lora()
        assert model.digests() == before, "what was merged is taken out bit for bit"


if __name__ == "__main__":
    main(sys.argv[1:])
