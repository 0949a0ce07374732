"""Push new weights into live models, and see that a bad push changes nothing.

    python examples/hot_reload.py [CHECKPOINT NEXT_CHECKPOINT]

Both checkpoints are of one config. Without them two small random ones are made.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import jax_models
import torch_models
from loaders import CheckpointError
from parity.zoo import make_checkpoint

PROMPT = [[3, 14, 15, 92, 65]]


def main(checkpoints: list[str]) -> None:
    first, second = checkpoints or [make_checkpoint("qwen3", tempfile.mkdtemp(), seed=seed) for seed in range(2)]
    damaged = make_checkpoint("qwen3-moe", tempfile.mkdtemp())  # any other model will do

    for package in (jax_models, torch_models):
        model = package.load(first)
        print(f"{package.__name__}: version {model.version} says {np.asarray(model.generate(PROMPT))[0].tolist()}")

        model = model.update_weights_from_disk(second)  # all of it, or nothing
        served = np.asarray(model(PROMPT))
        print(f"{package.__name__}: version {model.version} says {np.asarray(model.generate(PROMPT))[0].tolist()}")

        try:
            model = model.update_weights_from_disk(damaged)
        except CheckpointError as error:
            print(f"{package.__name__}: refused: {error.problems[0]}")
        assert np.array_equal(np.asarray(model(PROMPT)), served), "the old weights go on serving"

        exported = model.export(Path(tempfile.mkdtemp()) / "exported")
        print(f"{package.__name__}: exported bit for bit to {exported}")


if __name__ == "__main__":
    main(sys.argv[1:])
