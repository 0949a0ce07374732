"""Checkpoints, adapters and PEFT's own models of them, shared by the tests of LoRA."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from loaders import open_checkpoint
from parity.zoo import make_checkpoint, prompts
from parity.zoo.adapters import ATTENTION, DENSE, EXPERTS, TABLES, make_adapter

TWO = {"num_hidden_layers": 2}
HYBRID = TWO | {"layer_types": ["linear_attention", "full_attention"]}
SHAPES = {"qwen3_5": HYBRID, "qwen3_5-moe": HYBRID, "qwen3_5-wrapped": HYBRID}
DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
RANKS = {"rank_pattern": {"layers.1.self_attn.q_proj": 7, "k_proj": 2}, "alpha_pattern": {r".*\.0\..*v_proj": 2}}
WEIGHTS = ("embed_tokens.weight", "lm_head.weight", "up_proj.weight")  # as target_parameters name them
OF_WEIGHTS = {"rank_pattern": {"embed_tokens.weight": 3, "up_proj": 7}, "alpha_pattern": {"0.mlp.up_proj.weight": 2}}
# name -> zoo model and what its adapter is
CASES = {
    "linears": ("qwen3", {}),
    "patterns": ("qwen3", {"use_rslora": True, **RANKS}),
    "a regex": ("qwen3", {"targets": r".*layers\.1\..*(q_proj|down_proj)"}),
    "tables": ("qwen3", {"targets": (*ATTENTION, *TABLES)}),
    "tied tables": ("qwen3-tied", {"targets": (*ATTENTION, *TABLES)}),
    "tied embedding": ("qwen3-tied", {"targets": ("q_proj", "embed_tokens"), "use_rslora": True}),
    "tied head": ("qwen3-tied", {"targets": ("q_proj", "lm_head")}),
    "biased": ("qwen3-bias", {}),
    "whole tables": ("qwen3", {"targets": ATTENTION, "whole": TABLES}),
    "whole norms": ("qwen3", {"targets": ("up_proj", "lm_head"), "whole": ("norm",)}),
    "whole tied embedding": ("qwen3-tied", {"targets": ("lm_head",), "whole": ("embed_tokens",)}),
    "whole tied head": ("qwen3-tied", {"targets": ("embed_tokens",), "whole": ("lm_head",)}),
    "tables by their weights": ("qwen3-tied", {"targets": ("q_proj",), "parameters": WEIGHTS, **OF_WEIGHTS}),
    "experts": ("qwen3-moe", {"targets": (*ATTENTION, "lm_head"), "parameters": (*EXPERTS, "mlp.gate.weight")}),
    "router by name": ("qwen3-moe", {"targets": (*ATTENTION, "gate"), "use_rslora": True}),
    "down of experts": ("qwen3-moe", {"targets": ATTENTION, "parameters": EXPERTS[1:], "use_rslora": True}),
    "delta net": ("qwen3_5", {"targets": (*DENSE, *DELTA, *TABLES)}),
    "all linear": ("qwen3_5", {"targets": "all-linear"}),
    "wrapped": ("qwen3_5-wrapped", {"targets": r".*language_model.*(q_proj|in_proj_qkv|down_proj|embed_tokens)"}),
    "shared expert": ("qwen3_5-moe", {"targets": (*ATTENTION, *DELTA, "shared_expert_gate"), "parameters": EXPERTS}),
    "gemma": ("gemma3", {"targets": (*DENSE, "embed_tokens"), "whole": ("norm",)}),
}
FAST = ("patterns", "tied tables", "whole norms", "experts", "delta net")  # of these, tests compile JAX


class Adapters:
    """Everything for a case, made once."""

    def __init__(self, root):
        self.root = root
        self.checkpoint = cache(self.checkpoint)
        self.adapter = cache(self.adapter)
        self.reference = cache(self.reference)

    def checkpoint(self, zoo, seed=0, **options):
        shape = SHAPES.get(zoo, {"num_hidden_layers": 2, **GEMMA} if zoo == "gemma3" else TWO)
        where = self.root / f"{zoo}-{seed}-{len(list(self.root.iterdir()))}"
        return make_checkpoint(zoo, where, seed=seed, **shape, **options)

    def adapter(self, case, seed=0):
        zoo, options = CASES[case]
        return make_adapter(self.checkpoint(zoo), self.root / f"adapter {case} {seed}", seed=seed, **options)

    def prompt(self, zoo):
        return prompts(open_checkpoint(self.checkpoint(zoo)).config, rows=3, tokens=32, padding="right")

    def reference(self, case, seed=0):
        """Logits and hidden states, by the names of a trace, as PEFT has them in float32."""
        zoo, _ = CASES[case]
        path = self.checkpoint(zoo)
        return peft_forward(path, self.adapter(case, seed), self.prompt(zoo))


GEMMA = {"layer_types": ["sliding_attention", "full_attention"]}


def peft_model(checkpoint, adapter):
    wrapped = "vision_config" in open_checkpoint(checkpoint).config_document
    auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        base = auto.from_pretrained(checkpoint, dtype=torch.float32)
        return PeftModel.from_pretrained(base, str(adapter)).eval()


def peft_forward(checkpoint, adapter, batch):
    model = peft_model(checkpoint, adapter)
    text = model.base_model.model.model
    text = getattr(text, "language_model", text)
    found = {}

    def keep(name):
        def hook(module, args, output):
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [text.embed_tokens.register_forward_hook(keep("hidden_states.0"))]
    hooks += [text.norm.register_forward_hook(keep("final_hidden_state"))]
    hooks += [
        layer.register_forward_hook(keep(f"hidden_states.{number}")) for number, layer in enumerate(text.layers, 1)
    ]
    with torch.no_grad():
        out = model(**{name: torch.from_numpy(array) for name, array in batch.items()}, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {"logits": out.logits.numpy()} | {name: value.numpy() for name, value in found.items()}


def error(found, expected, batch):
    real = batch["attention_mask"] == 1
    found, expected = np.asarray(found)[real], expected[real]
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
