"""Derived tensors: one address for the model's life, and never stale, under a captured graph least of all.

The bug of the seed (sglang #22673, #26430): ``self.gemma_weight = weight + 1`` in a loader is another tensor, so graphs
went on reading the old one, and log-probabilities were off by about 3 from the first update on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import torch_models
from parity.zoo import make_checkpoint
from torch_models.derived import derive
from torch_models.layers.norm import GemmaRMSNorm
from torch_models.storage import same_bits

IDS = np.random.default_rng(0).integers(0, 200, (4, 9))
NORM = "model.layers.1.input_layernorm"


@pytest.fixture(scope="module", params=["gemma3", "qwen3_5"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp(request.param)
    return [make_checkpoint(request.param, root / str(seed), seed=seed) for seed in range(2)]


@pytest.fixture
def model(pair: list[Path]) -> torch_models.Model:
    return torch_models.load(pair[0])


def norms(model: torch_models.Model) -> dict[str, GemmaRMSNorm]:
    return {name: part for name, part in model.named_modules() if isinstance(part, GemmaRMSNorm)}


def replayed(model: torch_models.Model) -> torch.Tensor:
    """Logits of a prefill and of one replayed step, [2, B, V]."""
    first_BV, batch = model.graphs.prefill(IDS, max_new_tokens=4)
    return torch.stack([first_BV, batch.decode([1, 2, 3, 4])])


def log_probability_off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.log_softmax(-1) - b.log_softmax(-1)).abs().max())


def reload(model: torch_models.Model, path: Path) -> None:
    model.update_weights_from_disk(path)


def copy(model: torch_models.Model, path: Path) -> None:
    with torch.no_grad():
        for name, value in torch_models.load(path).named_parameters():
            model.get_parameter(name).copy_(value)


def data_copy(model: torch_models.Model, path: Path) -> None:
    for name, value in torch_models.load(path).named_parameters():
        model.get_parameter(name).data.copy_(value.data)


def one_by_one(model: torch_models.Model, path: Path) -> None:
    """Partial updates, with a run between them."""
    with torch.no_grad():
        for name, value in torch_models.load(path).named_parameters():
            model.get_parameter(name).copy_(value)
            if "norm" in name:
                model(IDS[:1, :2])


WAYS = [reload, copy, data_copy, one_by_one]


def test_every_norm_derives_its_factor_where_it_was_allocated(model: torch_models.Model) -> None:
    assert len(norms(model)) > 8
    for norm in norms(model).values():
        assert norm.gemma_weight.dtype == torch.float32
        assert same_bits(norm.gemma_weight, norm.weight.float() + 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_derived_tensor_has_one_address_for_life(model: torch_models.Model, pair: list[Path], way: Callable) -> None:
    census = torch_models.pointer_census(model)
    assert f"{NORM}.gemma_weight" in census
    for path in (pair[1], pair[0], pair[1]):
        way(model, path)
        model(IDS)
        assert torch_models.pointer_census(model) == census
        for name, norm in norms(model).items():
            assert same_bits(norm.gemma_weight, norm.weight.float() + 1), name


@pytest.mark.parametrize("way", WAYS)
def test_a_replay_after_an_update_equals_a_cold_load(
    model: torch_models.Model, pair: list[Path], way: Callable
) -> None:
    before = replayed(model)
    way(model, pair[1])
    after = replayed(model)
    assert model.graphs.num_captures == 1
    assert same_bits(after, replayed(torch_models.load(pair[1])))
    assert log_probability_off(after, before) > 3


def test_a_replay_follows_a_single_norm(model: torch_models.Model) -> None:
    before = replayed(model)
    weight = model.get_parameter(f"{NORM}.weight")
    weight.data.mul_(-1)
    assert log_probability_off(replayed(model)[1], before[1]) > 0.1
    weight.data.mul_(-1)
    assert same_bits(replayed(model), before)


# the mutant: derived outside the run, and rebound


def rebinding(original: type[GemmaRMSNorm]) -> type[GemmaRMSNorm]:
    class Rebinding(original):
        def derive(self) -> None:
            self.gemma_weight = self.weight.detach().float() + 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x32 = x.float()
            return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps) * self.gemma_weight).to(x.dtype)

    return Rebinding


@pytest.fixture
def mutant(pair: list[Path]) -> torch_models.Model:
    model = torch_models.load(pair[0])
    for norm in norms(model).values():
        norm.__class__ = rebinding(GemmaRMSNorm)
    return model


def test_a_rebound_factor_is_stale_under_a_replay_and_named(mutant: torch_models.Model, pair: list[Path]) -> None:
    _, batch = mutant.graphs.prefill(IDS, max_new_tokens=4)
    batch.decode([1, 2, 3, 4])
    copy(mutant, pair[1])
    derive(mutant)  # what the loader of the seed did
    cold = replayed(torch_models.load(pair[1]))
    eager_BV, cache = mutant.prefill(IDS, max_new_tokens=4)
    assert same_bits(eager_BV, cold[0]), "without a graph nothing shows"
    with pytest.raises(RuntimeError, match=rf"{len(norms(mutant))} tensors are not where .*gemma_weight"):
        mutant.graphs.prefill(IDS, max_new_tokens=4)
    names = mutant.graphs[4, 16].moved()
    assert sorted(names) == sorted(f"{name}.gemma_weight" for name in norms(mutant))
    # unchecked, on the cache of the new weights: what the seed's users saw
    graph = mutant.graphs[4, 16]
    for name, parts in graph.cache.layers.items():
        for key, part in parts.items():
            part.copy_(cache.layers[name][key])
    for name in ("key_mask", "position", "slot"):
        getattr(graph.cache, name).copy_(getattr(cache, name))
    graph.token_ids.copy_(torch.tensor([[1], [2], [3], [4]]))
    graph.program.replay()
    assert log_probability_off(graph.logits, cold[1]) > 1


def test_an_update_that_rebinds_a_factor_is_refused_by_name(mutant: torch_models.Model, pair: list[Path]) -> None:
    with pytest.raises(RuntimeError, match=r"moved storage in .*gemma_weight"):
        mutant.update_weights_from_disk(pair[1])
    with pytest.raises(RuntimeError, match="refuses to run"):
        mutant(IDS)
