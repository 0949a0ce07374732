"""Gradients of adapters, against PEFT's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3ForCausalLM

import jax_models
from parity.zoo import make_checkpoint


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers
def test_an_update_that_is_still_zero_has_the_gradient_that_peft_gives_it(tmp_path: Path) -> None:
    """As PEFT begins: B is zero, here of one module of two, for of an adapter that adds nothing there are no arrays."""
    checkpoint = make_checkpoint("qwen3", tmp_path / "checkpoint", num_hidden_layers=2)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[0])
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    for name, param in adapted.named_parameters():
        if "down_proj" in name and "lora_B" in name:
            param.data = torch.randn_like(param) * 0.3
    adapted.save_pretrained(tmp_path / "adapter")
    ids = np.array([[3, 14, 15, 9, 26]], np.int32)
    weight = np.random.default_rng(0).standard_normal((1, 5, model.config.vocab_size)).astype(np.float32)
    (adapted(input_ids=torch.from_numpy(ids.astype(np.int64))).logits * torch.from_numpy(weight)).sum().backward()
    expected = {name: param.grad.numpy() for name, param in adapted.named_parameters() if "lora_" in name}

    ours = jax_models.load(checkpoint).attach_lora(tmp_path / "adapter", "a")
    adapters = ours.of_rows("a", 1)["adapters"]

    def loss(stacks):
        logits = ours.apply(ours.weights, jnp.asarray(ids), adapters=dataclasses.replace(adapters, stacks=stacks))
        return (logits * weight).sum()

    found = jax.jit(jax.grad(loss))(adapters.stacks)
    assert len(found) == 2
    for path, stacks in found.items():
        for half, ours_, rank_axis in (("lora_A", stacks.a[0], 0), ("lora_B", stacks.b[0], 1)):
            (theirs,) = (value for name, value in expected.items() if path in name and half in name)
            mine = np.take(np.asarray(ours_), range(config.r), rank_axis)
            assert np.abs(mine - theirs).max() < 1e-4 * max(1.0, np.abs(theirs).max()), (path, half)
    (begun,) = (value for name, value in expected.items() if "q_proj" in name and "lora_B" in name)
    assert np.abs(begun).max() > 0.1
