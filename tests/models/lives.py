"""Pairs of tiny checkpoints and the benches that models live on, shared by the lifecycle tests."""

from __future__ import annotations

from importlib import import_module

from loaders import open_checkpoint
from parity.backends import open_backend
from parity.lifecycle.live_bench import Bench
from parity.lifecycle.run import LIVE
from parity.zoo import make_checkpoint
from parity.zoo.quantized import ZooQuantization, block_sizes

BACKENDS = ("jax", "torch")
_LINEAR, _SLIDING, _FULL = "linear_attention", "sliding_attention", "full_attention"
_HYBRID, _GEMMA = {"layer_types": [_LINEAR, _FULL]}, {"layer_types": [_SLIDING, _FULL]}
OPTIONS = {
    "qwen3-tied": {"ship_tied_head": True, "dtype": "BF16"},
    "qwen3_5": _HYBRID,
    "qwen3_5-wrapped": _HYBRID,
    "qwen3_5-moe": _HYBRID | {"dtype": "BF16"},
    "gemma3": _GEMMA,
    # quantised: every matrix has global scales of its own, inputs are quantised too
    "qwen3-moe nvfp4": {"quantization": ZooQuantization(unify=False), **block_sizes("qwen3-moe")},
    "qwen3_5-moe nvfp4": {
        "quantization": ZooQuantization(spelling="compressed-tensors", unify=False),
        **block_sizes("qwen3_5-moe"),
        **_HYBRID,
    },
}


class Benches:
    """One bench for each backend and zoo model, made when first asked for; two layers, checkpoints A and B."""

    def __init__(self, root):
        self.root = root
        self._pairs, self._benches = {}, {}

    def pair(self, zoo):
        if zoo not in self._pairs:
            options = OPTIONS.get(zoo, {})
            self._pairs[zoo] = {
                letter: make_checkpoint(
                    zoo.partition(" ")[0], self.root / f"{zoo}-{letter}", seed=seed, num_hidden_layers=2, **options
                )
                for seed, letter in enumerate("AB")
            }
        return self._pairs[zoo]

    def bench(self, backend, zoo):
        if (backend, zoo) not in self._benches:
            pair = {letter: open_checkpoint(path) for letter, path in self.pair(zoo).items()}
            live = import_module(LIVE[backend]).live(open_backend(backend, "cpu"))
            scratch = self.root / f"scratch-{backend}-{zoo}"
            scratch.mkdir()
            self._benches[backend, zoo] = Bench(live, pair, scratch)
        return self._benches[backend, zoo]
