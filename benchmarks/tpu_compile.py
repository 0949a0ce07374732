"""Compile serving programs for TPUs that are not there, and read off what the compiler made of them.

    python benchmarks/tpu_compile.py --model qwen3-8b --program decode --mesh tensor=4 [--layers 4] [--json FILE]

Needs ``libtpu`` (the ``tpu-compiler`` extra), no TPU and no weights. Per device: bytes of arguments, temporaries,
aliased (donated) outputs and the peak; how often, and with how many result bytes, each collective runs in a step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from pathlib import Path

# before jax is imported: no TPU, no metadata server to ask, and several compilers at once
os.environ.update(TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jax_models.abstract import abstract_cache, abstract_rows, abstract_weights
from jax_models.programs import programs_for
from jax_models.sharding import MESH_AXES
from loaders.config import config_from_json
from loaders.stage import Stage

_SHARED = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
}
# three gated delta nets, then full attention, again and again
_HYBRID = {
    "vocab_size": 248320,
    "head_dim": 256,
    "num_attention_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": False,
}
MODELS = {
    "qwen3-8b": {
        **_SHARED,
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        **_SHARED,
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen3.5-9b": {
        **_HYBRID,
        "architectures": ["Qwen3_5ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
    },
    "qwen3.5-35b-a3b": {
        **_HYBRID,
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
}
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
COLLECTIVE = re.compile(
    r"= (?P<type>\([^=]*?\)|\S+) (?P<kind>all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)"
    r"(?:-start)?\("
)
SHAPE = re.compile(r"\b(pred|bf16|[sfu]\d+)\[([\d,]*)\]")


NVFP4 = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["lm_head"]}


def config_of(model: str, layers: int | None, *, nvfp4: bool = False) -> object:
    document = MODELS[model] | ({"num_hidden_layers": layers} if layers else {})
    document = document | ({"quantization_config": NVFP4} if nvfp4 else {})
    config, problems = config_from_json(document)
    assert config is not None, problems
    return config


def mesh_of(text: str, topology: str) -> Mesh:
    """``expert=2,tensor=2`` over the devices of a topology that need not exist."""
    sizes = {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[: math.prod(shape)]
    return Mesh(np.array(devices).reshape(shape), MESH_AXES)


def lowered_of(config: object, program: str, rows: int, length: int, mesh: Mesh) -> jax.stages.Lowered:
    """Prefill of ``length`` tokens into a cache of as many slots, or one decode step over such a cache."""
    dtype = jnp.dtype("bfloat16")
    programs = programs_for(config, Stage(), dtype, mesh)
    weights = abstract_weights(config, mesh, dtype)
    cache = abstract_cache(config, rows, length, dtype, mesh)
    if program == "decode":
        return programs.decode.lower(weights, abstract_rows((rows, 1), jnp.int32, mesh), cache=cache)
    ids = abstract_rows((rows, length), jnp.int32, mesh)
    mask = abstract_rows((rows, length), jnp.bool_, mesh)
    return programs.prefill.lower(weights, ids, mask, ids, cache=cache)


def bytes_of(shapes: str) -> int:
    """Bytes of every array in the text of an HLO type."""
    found = SHAPE.findall(shapes)
    return sum(ITEM_BYTES[kind] * math.prod(int(size) for size in dims.split(",") if size) for kind, dims in found)


def collectives_of(hlo: str) -> dict[str, dict[str, int]]:
    """Kind -> how many there are in the optimised program, and their result bytes on one device."""
    found: dict[str, dict[str, int]] = {}
    for match in COLLECTIVE.finditer(hlo):
        entry = found.setdefault(match["kind"], {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += bytes_of(match["type"])
    return found


def held_bytes(tree: object) -> int:
    """Bytes of a tree's arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def full_vocabulary_shapes(hlo: str, vocab_size: int, length: int, parts: int) -> list[str]:
    """Arrays that have an axis of the vocabulary (or a device's part of it) and one of the prompt."""
    vocabulary = {vocab_size, vocab_size // parts}
    shapes = {f"{kind}[{dims}]" for kind, dims in SHAPE.findall(hlo)}
    sizes = {shape: {int(size) for size in shape[shape.index("[") + 1 : -1].split(",") if size} for shape in shapes}
    return sorted(shape for shape, found in sizes.items() if found & vocabulary and length in found)


def measure(args: argparse.Namespace) -> dict[str, object]:
    config = config_of(args.model, args.layers, nvfp4=args.nvfp4)
    mesh = mesh_of(args.mesh, args.topology)
    rows, length = args.rows or {"prefill": 1, "decode": 8}[args.program], args.length
    length = length or {"prefill": 1024, "decode": 2048}[args.program]
    dtype = jnp.dtype("bfloat16")
    started = time.perf_counter()
    lowered = lowered_of(config, args.program, rows, length, mesh)
    lowered_s = time.perf_counter() - started
    compiled = lowered.compile()
    compiled_s = time.perf_counter() - started - lowered_s
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    if args.hlo:
        Path(args.hlo).write_text(hlo, encoding="utf-8")
    weights = abstract_weights(config, mesh, dtype)
    weight_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    return {
        "model": args.model,
        "nvfp4": args.nvfp4,
        "layers": config.num_hidden_layers,
        "program": args.program,
        "rows": rows,
        "length": length,
        "topology": args.topology,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "jax": jax.__version__,
        "lower_s": round(lowered_s, 1),
        "compile_s": round(compiled_s, 1),
        "total_weight_bytes": weight_bytes,
        "weight_bytes": held_bytes(weights),
        "cache_bytes": held_bytes(abstract_cache(config, rows, length, dtype, mesh)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "collectives": collectives_of(hlo),
        "full_vocabulary": full_vocabulary_shapes(hlo, config.vocab_size, length, mesh.size)
        if args.program == "prefill"
        else [],
        "hlo_lines": hlo.count("\n"),
    }


def table(row: dict[str, object]) -> str:
    """One measurement for people."""
    lines = [f"{row['model']}, {row['layers']} layers, {row['program']} B={row['rows']} S={row['length']},"]
    lines[0] += f" {row['topology']} {row['mesh']}, jax {row['jax']}"
    lines.append(f"  lower {row['lower_s']} s, compile {row['compile_s']} s")
    names = [name for name in row if name.endswith("_bytes") and name != "total_weight_bytes"]
    lines += [f"  {name.removesuffix('_bytes'):9} {row[name] / 1e6:10.1f} MB per device" for name in names]
    lines += [
        f"  {kind:18} {found['count']:4} {found['bytes'] / 1e6:9.2f} MB" for kind, found in row["collectives"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--program", choices=("prefill", "decode"), required=True)
    parser.add_argument("--mesh", default="tensor=4", help="axis=size, comma separated")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--nvfp4", action="store_true", help="weights in NVFP4, but for the head")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--rows", type=int, help="B: 1 for prefill, 8 for decode")
    parser.add_argument("--length", type=int, help="T: 1024 for prefill, 2048 for decode")
    parser.add_argument("--json", help="file to write the measurement to")
    parser.add_argument("--hlo", help="file to write the optimised program to")
    args = parser.parse_args()
    row = measure(args)
    print(table(row))
    if args.json:
        Path(args.json).write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
