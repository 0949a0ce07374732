"""Other people's models behind ``parity.Backend``: transformers against ours, a torch module, a JAX function."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import torch_models
from loaders import open_checkpoint
from loaders.digest import digests
from parity import Backend, Oracle, assert_parity, record_backend
from parity.backends import open_backend
from parity.foreign.jax_function import JaxFunction
from parity.foreign.torch_module import TorchModule
from parity.foreign.transformers import TransformersModel
from parity.model_backend import ModelBackend
from parity.plugin.fixtures import BackendPair, ParityMark
from parity.record import default_inputs
from parity.record_oracle import OracleBackend
from parity.zoo import make_checkpoint, prompts

TWO = {"num_hidden_layers": 2}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], **TWO}
CASES = {
    "qwen3": ("qwen3", {}),
    "qwen3 bfloat16": ("qwen3", {"dtype": "BF16"}),
    "qwen3-moe": ("qwen3-moe", TWO),
    "qwen3-moe bfloat16": ("qwen3-moe", {"dtype": "BF16", **TWO}),
    "qwen3_5": ("qwen3_5", HYBRID),
    "qwen3_vl": ("qwen3_vl", {}),
    "gemma3": ("gemma3", {}),
    "gemma3 bfloat16": ("gemma3", {"dtype": "BF16"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoint, oracle and transformers' trace of a case, once."""

    @cache
    def make(case):
        zoo, options = CASES[case]
        path = make_checkpoint(zoo, tmp_path_factory.mktemp("zoo") / "checkpoint", **options)
        inputs = default_inputs(open_checkpoint(path))
        return path, Oracle(path), inputs, record_backend(TransformersModel.load(path), inputs)

    return make


def ours(name, path):
    framework = open_backend(name)
    return ModelBackend(framework.load(path), framework)


@pytest.mark.slow_unless("qwen3-torch", "qwen3-moe-torch", "qwen3 bfloat16-torch", "qwen3_5-torch", "qwen3-jax")
@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize("case", CASES)
def test_ours_compute_what_transformers_does(made, case, name):
    path, oracle, inputs, theirs = made(case)
    comparison = assert_parity(ours(name, path), theirs, oracle, inputs=inputs)
    layers = open_checkpoint(path).config.num_hidden_layers
    assert [row.name for row in comparison.rows] == [
        *(f"hidden_states.{layer}" for layer in range(layers + 1)),
        "final_hidden_state",
        "logits",
    ]
    assert all(row.basis == "oracle" for row in comparison.rows)
    roots = {trace.meta["weights"]["root"] for trace in (theirs, oracle(inputs, theirs))}
    assert len(roots) == 1  # what transformers holds is what the files say


def test_a_layer_that_is_off_in_transformers_is_named(made):
    path, oracle, inputs, _ = made("qwen3")
    model = TransformersModel.load(path)
    with torch.no_grad():
        model.model.model.layers[2].mlp.act_fn = nn.GELU()
    with pytest.raises(AssertionError, match=r"transformers is wrong in model\.layers\.2\."):
        assert_parity(ours("torch", path), model, oracle, inputs=inputs)


def test_weights_that_differ_are_not_compared(made):
    path, oracle, inputs, _ = made("qwen3")
    model = TransformersModel.load(path)
    with torch.no_grad():
        model.model.model.norm.weight[3] += 1
    with pytest.raises(AssertionError, match=r"(?s)parity INVALID.*model\.norm\.weight"):
        assert_parity(ours("torch", path), model, oracle, inputs=inputs)


def test_left_padding_is_counted_as_a_generation_would(made):
    path, oracle, _, _ = made("qwen3")
    inputs = prompts(oracle.checkpoint.config, padding="left")
    assert_parity(ours("torch", path), TransformersModel.load(path), oracle, inputs=inputs)


def test_transformers_says_which_weights_a_checkpoint_lacks(tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "whole", **TWO)
    document = open_checkpoint(path).config_document | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2\.input_layernorm\.weight"):
        TransformersModel.load(path)


def test_our_own_module_by_hooks_is_our_own_model_by_taps(made):
    """A torch module and a mapping from its paths are enough."""
    path, oracle, inputs, _ = made("qwen3")
    model = torch_models.load(path)
    taps = {"model.embed_tokens": "hidden_states.0", "model.norm": "final_hidden_state"}
    taps |= {f"model.layers.{i}": f"hidden_states.{i + 1}" for i in range(4)}
    hooked = TorchModule(module=model, taps=taps, name="hooked", checkpoint=str(path))
    found, known = (record_backend(backend, inputs) for backend in (hooked, ours("torch", path)))
    assert found.tensors.keys() == known.tensors.keys()
    assert all(np.array_equal(found.tensors[name], known.tensors[name]) for name in known.tensors)
    assert_parity(hooked, ours("torch", path), oracle)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = x + self.block(x)
        x.mul_(1)  # what a tap was handed is written to later
        return (self.head(x),)


TOY_TAPS = {"embed": "hidden_states.0", "head:in": "hidden_states.1"}
IDS = {"input_ids": np.arange(12).reshape(2, 6) % 11}


def toy_in_jax(weights, input_ids):
    x = weights["embed.weight"][input_ids]
    x = x + x @ weights["block.weight"].T + weights["block.bias"]
    return {"hidden_states.1": x, "logits": x @ weights["head.weight"].T}


def test_any_torch_module_against_any_jax_function():
    module = Toy()
    params = {name: param.detach().numpy() for name, param in module.named_parameters()}
    theirs = JaxFunction(function=toy_in_jax, params=params)
    mine = TorchModule(module=module, taps=TOY_TAPS)
    assert isinstance(mine, Backend)
    assert isinstance(theirs, Backend)
    comparison = assert_parity(mine, theirs, inputs=IDS)
    assert [row.name for row in comparison.rows] == ["hidden_states.1", "logits"]
    assert comparison.meta[0]["root"] == comparison.meta[1]["root"]
    nested = JaxFunction(function=toy_in_jax, params={"a": {"b": [params["embed.weight"]]}})
    assert [name for name, _ in nested.weights()] == ["a.b.0"]
    assert JaxFunction(function=toy_in_jax, params=params, checkpoint_name=None).weights() is None


def test_params_are_any_pytree_and_a_module_may_have_none():
    params = {name: param.detach().numpy() for name, param in Toy().named_parameters()}
    assert JaxFunction(function=toy_in_jax, params=params | {"scale": 3.0}).info.dtype == "float32"
    assert JaxFunction(function=toy_in_jax, params=params | {"count": 3}).info.dtype == "float32"
    whole = JaxFunction(function=toy_in_jax, params={"e": np.ones((9, 4), np.int32)}, name="whole numbers")
    with pytest.raises(ValueError, match="whole numbers: no leaf of params is a float, so say what it computes in"):
        _ = whole.info
    assert TorchModule(module=nn.Identity()).info.dtype == "float32"


def test_a_jax_function_may_return_logits_alone():
    params = {name: param.detach().numpy() for name, param in Toy().named_parameters()}
    bare = JaxFunction(function=lambda weights, **inputs: toy_in_jax(weights, **inputs)["logits"], params=params)
    assert set(record_backend(bare, IDS).tensors) == {"logits", "input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("taps", "says"),
    [
        ({"block2": "hidden_states.1"}, "no module of Toy is called block2"),
        ({"embed": "x", "block": "x"}, "two taps give x"),
        ({"block": "hidden_state.1"}, "'hidden_state.1' is no tensor of a trace, 'hidden_states.1' is"),
        ({"block": "Hidden_states.12"}, "'Hidden_states.12' is no tensor of a trace, 'hidden_states.12' is"),
        ({"block": "final_hidden_states"}, "'final_hidden_states' is no tensor of a trace, 'final_hidden_state' is"),
    ],
)
def test_taps_are_checked(taps, says):
    with pytest.raises(ValueError, match=says):
        TorchModule(module=Toy(), taps=taps)


@pytest.mark.parametrize(
    "name", ["hidden_states.0", "hidden_states.36", "routing.10", "logits", "mtp.logits", "mine", "hidden_states_in.3"]
)
def test_names_of_a_trace_and_ones_of_my_own_are_no_misspellings(name):
    assert list(TorchModule(module=Toy(), taps={"block": name}).taps.values()) == [name]


def test_a_module_at_random_is_refused_and_one_in_training_mode_that_is_not_is_run():
    module = nn.Sequential()
    module.embed, module.dropout = nn.Embedding(11, 6), nn.Dropout(0.5)
    backend = TorchModule(module=module, call=lambda input_ids: module.dropout(module.embed(input_ids)))
    with pytest.raises(ValueError, match=r"in training mode, where dropout is at random\. Call its eval\(\) first"):
        record_backend(backend, IDS)
    module.eval()
    assert record_backend(backend, IDS).shape == (2, 6)


def test_a_module_in_float64_keeps_what_it_computes_and_may_be_the_oracle():
    torch.manual_seed(0)
    mine, peer, exact = Toy(), Toy(), Toy()
    for other in (peer, exact):
        other.load_state_dict(mine.state_dict())
    exact.double()
    said = record_backend(TorchModule(module=exact, taps=TOY_TAPS, held=lambda: None), IDS)
    assert (said.meta["dtype"], said.tensors["logits"].dtype) == ("float64", np.float64)
    sides = [TorchModule(module=module, taps=TOY_TAPS) for module in (mine, peer)]
    assert assert_parity(*sides, said, inputs=IDS).rows[-1].e_a > 0
    with torch.no_grad():
        peer.head.weight[3] *= 1.01
    with pytest.raises(AssertionError, match="is wrong in lm_head"):
        assert_parity(sides[0], replace(sides[1], held=lambda: None), said, inputs=IDS)
    stored = dict(TorchModule(module=exact).weights())
    assert np.array_equal(stored["head.weight"], exact.head.weight.detach().numpy())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.float8_e5m2, torch.float64])
def test_a_weight_of_any_dtype_has_a_digest(dtype):
    module = nn.Module()
    module.packed = nn.Parameter(torch.arange(6).to(dtype), requires_grad=False)
    (array,) = dict(TorchModule(module=module).weights()).values()
    assert np.array_equal(array.astype(np.float64), module.packed.double().numpy())


def test_inputs_are_tensors_of_either_library_and_none_is_no_input():
    backend = TorchModule(module=Toy())
    known = record_backend(backend, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids in (torch.tensor(IDS["input_ids"]), jnp.asarray(IDS["input_ids"]), IDS["input_ids"].tolist()):
            found = record_backend(backend, {"input_ids": ids, "attention_mask": None})
            assert found.meta == known.meta
            assert np.array_equal(found.tensors["logits"], known.tensors["logits"])
    with pytest.raises(ValueError, match=r"input_ids are \[3\], expected \[B, T\]: a row for each prompt"):
        record_backend(backend, {"input_ids": np.arange(3)})


def test_an_oracle_is_asked_about_tensors_and_none_too(made):
    path, oracle, inputs, _ = made("qwen3")
    given = {"input_ids": torch.tensor(inputs["input_ids"]), "attention_mask": None}
    asked = {"input_ids": inputs["input_ids"]}
    comparison, known = (
        assert_parity(ours("torch", path), ours("torch", path), oracle, inputs=i) for i in (given, asked)
    )
    assert comparison.rows == known.rows


def test_a_tap_that_is_not_passed_once_is_an_error():
    module = Toy()
    module.idle = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"hidden_states\.2 0 times"):
        TorchModule(module=module, taps={"idle": "hidden_states.2"}).run(IDS)


def test_a_backend_that_gives_no_trace_is_told_so(tmp_path):
    class Odd:
        info = TorchModule(module=Toy()).info

        def run(self, inputs):
            return {"logits": np.zeros((2, 6))}

        def weights(self):
            return None

    with pytest.raises(ValueError, match=r"'torch module' did not give a trace: tensor 'logits' is float64 \[2, 6\]"):
        record_backend(Odd(), IDS)
    with pytest.raises(ValueError, match="expected input_ids"):
        record_backend(Odd(), {})
    with pytest.raises(ValueError, match="nothing says what to run"):
        assert_parity(Odd(), Odd())
    own = torch_models.load(make_checkpoint("qwen3", tmp_path / "own", **TWO))
    with pytest.raises(ValueError, match=r"neither a trace.*parity\.ModelBackend\(model, .*open_backend\('torch'\)\)"):
        assert_parity(own, own, inputs=IDS)
    with pytest.raises(ValueError, match=r"Toy is neither a trace, a trace file nor a backend.*parity\.foreign"):
        assert_parity(Toy(), Toy(), inputs=IDS)


def test_traces_and_files_are_held_as_backends_are(made, tmp_path):
    path, oracle, inputs, theirs = made("qwen3")
    mine = record_backend(ours("torch", path), inputs)
    files = [trace.save(tmp_path / f"{trace.backend}.trace") for trace in (mine, theirs)]
    said = oracle(inputs)
    verdicts = [
        assert_parity(mine, theirs, said),
        assert_parity(*files, said.save(tmp_path / "oracle.trace")),
        assert_parity(mine, theirs, path),  # a checkpoint's directory, and the inputs that tandem run takes
        assert_parity(mine, theirs, oracle.checkpoint),
    ]
    assert len({comparison.summary for comparison in verdicts}) == 1
    assert oracle(inputs) is said


def test_the_plugin_pairs_ours_with_transformers(made):
    path, oracle, inputs, _ = made("qwen3")
    pair = BackendPair.load(ParityMark(a="torch", b="transformers:cpu"), path)
    assert assert_parity(*pair, oracle, inputs=pair.inputs).labels == ("torch", "transformers")


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_our_weights_are_the_files(made, name):
    path, oracle, _, _ = made("qwen3")
    assert digests(ours(name, path).weights()) == digests(oracle.checkpoint.stream())
    assert digests(OracleBackend(oracle.checkpoint).weights()) == digests(oracle.checkpoint.stream())
