"""Decode steps on a CPU in float32, each backend beside a peer of its framework, in turns in the same run.

python -m benchmarks.bench_decode [--rounds 8] [--steps 4] [--layers 8] [--models dense experts] [--readme]

The models are a dense Qwen3 of 159 M parameters at the default depth, and one with 64 experts, of which a token chooses
8, of half as many layers: 388 M. Peers: transformers (sdpa) for torch, tunix for
JAX (its compiled step, as its sampler makes it: cache donated); where tunix is not installed its column is left out
(``pip install --no-deps google-tunix``, and what its import asks for: it wants safetensors below 0.8, ours is newer).
Every one continues the same prompts greedily and its tokens are compared: a fast wrong answer is not counted.
``--readme`` keeps what was measured of the dense one in ``results/decode.json``, and makes the README's table of it.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import jax_models
import torch_models
from benchmarks.decode_table import FIGURES, PEER, README, SECTION, Seconds, section, summed_up, table
from parity.zoo import make_checkpoint

CASES = {"one row after 512 tokens": (1, 512), "eight rows after 128 tokens": (8, 128)}
VOCABULARY = 32768
SIZES = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},  # tunix knows no other
}
EXPERTS = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 384, "mlp_only_layers": []}
# the zoo's name, sizes, and how many of the layers
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    "dense": ("qwen3", SIZES, 1.0),
    "experts": ("qwen3-moe", SIZES | EXPERTS, 0.5),
}
PACKAGES = ("jax", "google-tunix", "torch", "transformers")

Step = Callable[[np.ndarray], np.ndarray]  # tokens [B] -> the next ones [B]
Start = Callable[[np.ndarray, int], tuple[np.ndarray, Step]]  # prompt [B, T], steps -> first tokens [B], step


def ours_jax(path: Path) -> Start:
    model = jax_models.load(path, dtype="float32")

    def start(prompt_BT: np.ndarray, steps: int) -> tuple[np.ndarray, Step]:
        logits_BV, cache = model.prefill(prompt_BT, max_new_tokens=steps)

        def step(token_B: np.ndarray) -> np.ndarray:
            nonlocal cache
            logits_BV, cache = model.decode(token_B, cache)
            return np.asarray(jnp.argmax(logits_BV, axis=-1))

        return np.asarray(jnp.argmax(logits_BV, axis=-1)), step

    return start


def ours_torch(path: Path) -> Start:
    model = torch_models.load(path, dtype="float32")

    def start(prompt_BT: np.ndarray, steps: int) -> tuple[np.ndarray, Step]:
        logits_BV, cache = model.prefill(prompt_BT, max_new_tokens=steps)
        return logits_BV.argmax(-1).numpy(), lambda token_B: model.decode(token_B, cache)[0].argmax(-1).numpy()

    return start


def of_transformers(path: Path) -> Start:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    @torch.inference_mode()
    def call(token_BT: np.ndarray, cache: Any) -> np.ndarray:
        given = torch.from_numpy(np.asarray(token_BT, np.int64))
        out = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1).numpy()

    def start(prompt_BT: np.ndarray, steps: int) -> tuple[np.ndarray, Step]:
        del steps
        cache = transformers.DynamicCache(config=model.config)
        return call(prompt_BT, cache), lambda token_B: call(token_B[:, None], cache)

    return start


def of_tunix(path: Path) -> Start:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flax import nnx
        from tunix.models.qwen3 import model as qwen3
        from tunix.models.qwen3 import params
    config: Any = transformers.AutoConfig.from_pretrained(path)
    layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    count = getattr(config, "num_experts", None)
    experts = {} if count is None else {"num_experts": count, "num_experts_per_tok": config.num_experts_per_tok}
    shape = qwen3.ModelConfig(
        **experts,
        num_layers=layers,
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        hidden_dim=config.intermediate_size if count is None else config.moe_intermediate_size,
        num_heads=config.num_attention_heads,
        head_dim=width,
        num_kv_heads=heads,
        rope_theta=1_000_000,
        norm_eps=config.rms_norm_eps,
        use_tied_embedding=config.tie_word_embeddings,
    )
    graph, state = nnx.split(params.create_model_from_safe_tensors(str(path), shape, dtype=jnp.dtype("float32")))

    @partial(jax.jit, donate_argnums=0)
    def call(cache: Any, state: Any, token_BT: jax.Array, first: jax.Array) -> tuple[jax.Array, Any]:
        rows, length = token_BT.shape
        position_T = first + jnp.arange(length)
        slots_S = jnp.arange(cache["layer_0"]["k"].shape[1])
        mask_BTS = jnp.broadcast_to(slots_S <= position_T[:, None], (rows, length, slots_S.size))
        positions_BT = jnp.broadcast_to(position_T, (rows, length))
        logits_BTV, cache = nnx.merge(graph, state)(token_BT, positions_BT, cache, mask_BTS)
        return jnp.argmax(logits_BTV[:, -1], axis=-1), cache

    def start(prompt_BT: np.ndarray, steps: int) -> tuple[np.ndarray, Step]:
        rows, length = prompt_BT.shape
        room = (rows, length + steps, heads, width)

        def empty() -> dict[str, jax.Array]:
            return {"k": jnp.zeros(room), "v": jnp.zeros(room), "end_index": jnp.zeros(rows, jnp.int32)}

        first_B, cache = call({f"layer_{n}": empty() for n in range(layers)}, state, prompt_BT, 0)
        position = length

        def step(token_B: np.ndarray) -> np.ndarray:
            nonlocal cache, position
            token_B, cache = call(cache, state, token_B[:, None], position)
            position += 1
            return np.asarray(token_B)

        return np.asarray(first_B), step

    return start


MAKERS: dict[str, Callable[[Path], Start]] = {
    "transformers": of_transformers,
    "torch": ours_torch,
    "jax": ours_jax,
    "tunix": of_tunix,
}


def measure(starts: dict[str, Start], rows: int, length: int, rounds: int, steps: int) -> Seconds:
    """Seconds a step of each, one per round; in turns."""
    prompt_BT = np.random.default_rng(0).integers(100, VOCABULARY, (rows, length)).astype(np.int32)
    total = (rounds + 1) * steps + 1
    lives = {name: start(prompt_BT, total) for name, start in starts.items()}
    tokens = {name: first_B for name, (first_B, _) in lives.items()}
    said = {name: [first_B] for name, first_B in tokens.items()}
    seconds: Seconds = {name: [] for name in starts}
    for turn in range(rounds + 1):
        order = list(starts) if turn % 2 else list(starts)[::-1]
        for name in order:
            began = time.perf_counter()
            for _ in range(steps):
                tokens[name] = lives[name][1](tokens[name])
                said[name].append(tokens[name])
            if turn:  # the first compiles
                seconds[name].append((time.perf_counter() - began) / steps)
    (reference, expected), *others = ((name, np.stack(each)) for name, each in said.items())
    for name, found in others:
        if not np.array_equal(found, expected):
            step = int(np.argmax((found != expected).any(1)))
            print(f"{name} says other tokens than {reference} from step {step} on")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 8, "rounds": 8, "steps": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="+", choices=list(MAKERS), default=list(MAKERS), help="leave out the others")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    if "tunix" in options.only and not importlib.util.find_spec("tunix"):
        print("tunix is not installed (pip install google-tunix): not measured")
        options.only.remove("tunix")
    if options.readme and not ({*PEER, *PEER.values()} <= {*options.only} and "dense" in options.models):
        parser.error("--readme needs tunix, and all four measured over the dense model")
    cases = {}
    for model in options.models:
        name, sizes, share = MODELS[model]
        with tempfile.TemporaryDirectory() as scratch:
            layers = max(1, round(share * options.layers))
            path = make_checkpoint(name, Path(scratch) / "model", num_hidden_layers=layers, **sizes)
            starts = {name: make(path) for name, make in MAKERS.items() if name in options.only}
        for case, (rows, length) in CASES.items():
            seconds = measure(starts, rows, length, options.rounds, options.steps)
            cases[case if model == "dense" else f"{model}, {case}"] = summed_up(seconds)
    print(table(cases))
    if options.readme:
        figures = {
            "date": str(datetime.date.today()),
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "cases": {case: cases[case] for case in CASES},
        }
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
        README.write_text(SECTION.sub(lambda _: section(figures), README.read_text()))


if __name__ == "__main__":
    main()
