"""A wrapper offers the whole interface of what it wraps: every public name, with the value it has there."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import jax_models
import torch_models
from jax_models.layers.install import module_at
from jax_models.layers.lora import active_rows as jax_rows
from jax_models.layers.lora import unwrapped as jax_unwrapped
from loaders.adapters.sites import sites_of
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint
from parity.zoo.adapters import ATTENTION, EXPERTS, TABLES, make_adapter
from torch_models.layers.lora import Wrapper, active_rows, unwrapped

OPTIONS = {
    "qwen3": {"targets": (*ATTENTION, *TABLES), "whole": ("norm",)},
    "qwen3-tied": {"targets": ("q_proj", "embed_tokens"), "whole": ("lm_head",)},
    "qwen3-moe": {"targets": (*ATTENTION, "gate"), "parameters": EXPERTS, "whole": (*TABLES, "norm")},
    "nvfp4": {"targets": ("q_proj",), "whole": ("up_proj",)},
}
ALL = {"LinearWithLoRA", "VocabParallelEmbeddingWithLoRA", "RouterWithLoRA", "ExpertsWithLoRA", "ModuleWithCopies"}
OWN = {"__call__", "forward", "project", "add_norm", "logits"}  # what an adapter may change


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoint and adapter of a zoo model, made once."""
    root = tmp_path_factory.mktemp("wrappers")
    nvfp4 = {"quantization": ZooQuantization(activations=False, unify=False), **block_sizes("qwen3")}
    found = {}

    def of(zoo):
        if zoo not in found:
            model, options = ("qwen3", nvfp4) if zoo == "nvfp4" else (zoo, {})
            path = make_checkpoint(model, root / zoo, num_hidden_layers=2, **options)
            found[zoo] = path, make_adapter(path, root / f"{zoo} adapter", **OPTIONS[zoo])
        return found[zoo]

    return of


def public(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def check(name, wrapper, base, package):
    """Every public name of the base, the base's own value under it, and no name the base lacks but the adapters'."""
    nested = [wrapper] if wrapper.base_layer is base else [wrapper, wrapper.base_layer]
    slots = {slot for one in nested for kind in type(one).__mro__ for slot in getattr(kind, "__slots__", ())}
    assert public(base) <= public(wrapper), (name, public(base) - public(wrapper))
    assert public(wrapper) - public(base) <= {"base_layer", *slots}, name
    assert nested[-1].base_layer is base, name
    for attribute in sorted(public(base)):
        ours, theirs = getattr(wrapper, attribute), getattr(base, attribute)
        if inspect.ismethod(theirs):
            is_own = attribute in OWN and theirs.__func__.__module__.startswith(package)
            of_torch = theirs.__func__.__module__.startswith("torch.")  # of any module: it is run on what both hold
            assert callable(ours), (name, attribute)
            assert is_own or of_torch or ours.__func__ is theirs.__func__, (name, attribute)
        else:
            assert ours is theirs or ours == theirs, (name, attribute)
    for method in ("project", "add_norm", "logits", "choose", "no_such_name"):
        assert hasattr(wrapper, method) == hasattr(base, method), (name, method)
    wrapper.given = kept = object()
    assert base.given is kept, name
    del base.given
    assert not hasattr(wrapper, "given"), name


@pytest.mark.parametrize("zoo", OPTIONS)
def test_a_wrapper_in_torch_has_every_public_attribute_and_method_of_its_base(made, zoo):
    path, adapter = made(zoo)
    model = torch_models.load(path).attach_lora(adapter)
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, Wrapper)}
    assert zoo != "qwen3-moe" or {type(one).__name__ for one in wrappers.values()} == ALL
    assert len({type(one) for one in wrappers.values()}) > 1
    for name, wrapper in wrappers.items():
        base = unwrapped(wrapper)
        check(name, wrapper, base, "torch_models")
        assert dict(wrapper.named_parameters()).keys() == dict(base.named_parameters()).keys()


@pytest.mark.parametrize("zoo", OPTIONS)
def test_a_wrapper_in_jax_has_every_public_attribute_and_method_of_its_base(made, zoo):
    path, adapter = made(zoo)
    model, seen = jax_models.load(path).attach_lora(adapter), set()
    for name, wrapper in inside(model, lambda found: wrappers_of(model, found)).items():
        check(name, wrapper, jax_unwrapped(wrapper), "jax_models")
        seen.add(type(wrapper).__name__)
    assert seen == ALL or zoo != "qwen3-moe"
    assert len(seen) > 1


def inside(model, act):
    """What ``act`` makes of the module of a program, with adapters in it."""
    with model.programs.module(model.weights, model.of_rows(None, 1)["adapters"]) as found:
        return act(found)


def wrappers_of(model, module):
    sites = sites_of(model.config)
    paths = {sites.low_rank[path].module for path in model.room.stacks}
    paths |= {sites.layer(path) for path in model.room.copies}
    return {path: module_at(module, path) for path in paths}


def test_an_embedding_with_an_adapter_is_an_embedding(made):
    path, adapter = made("qwen3")
    model = torch_models.load(path).attach_lora(adapter)
    embedding = model.model.embed_tokens
    assert type(embedding).__name__ == "VocabParallelEmbeddingWithLoRA"
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.org_vocab_size) == (211, 40, 211)
    assert embedding.weight is model.get_parameter("model.embed_tokens.weight")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = embedding.no_such_name


PLACEHOLDERS, CLAMPED = [[1, 5000, -1]], [[1, 210, 0]]


@pytest.mark.parametrize("slot", [None, -1, 0], ids=["no rows", "a row without", "a row with"])
@pytest.mark.parametrize(
    ("zoo", "options"),
    [
        ("qwen3", {"targets": TABLES}),
        ("qwen3", {"targets": (), "whole": TABLES}),
        ("qwen3-tied", {"targets": TABLES[1:]}),
        ("qwen3-tied", {"targets": (), "whole": TABLES[1:]}),
    ],
    ids=["looked up", "whole", "tied head", "whole tied head"],
)
def test_an_id_beyond_the_table_finds_a_row_of_the_base_whatever_the_adapter_is_of(made, tmp_path, zoo, options, slot):
    path, _ = made(zoo)
    adapter = make_adapter(path, tmp_path / "adapter", **options)
    # then placeholders have the base's rows, clamped ids have not
    is_lookup = slot == 0 and options["targets"] == TABLES
    model = torch_models.load(path).attach_lora(adapter)
    with active_rows(None if slot is None else torch.tensor([slot])):
        rows = [model.model.embed_tokens(torch.tensor(ids), torch.float32) for ids in (PLACEHOLDERS, CLAMPED)]
    base = unwrapped(model.model.embed_tokens)(torch.tensor(CLAMPED), torch.float32)
    assert torch.equal(rows[0], rows[1]) != is_lookup
    assert not is_lookup or torch.equal(rows[0][:, 1:], base[:, 1:])
    ours = jax_models.load(path).attach_lora(adapter)

    def look(module):
        with jax_rows(None if slot is None else np.array([slot])):
            return module.model.embed_tokens(np.array(PLACEHOLDERS), np.dtype("float32"))

    np.testing.assert_allclose(np.asarray(inside(ours, look)), rows[0].numpy(), rtol=1e-5, atol=1e-6)
