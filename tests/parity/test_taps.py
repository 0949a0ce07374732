"""Taps: the same names and shapes everywhere, nothing changed by looking, and values handed in."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import jax_models
import jax_models.layers.mlp
import jax_models.taps
import torch_models
import torch_models.layers.mlp
import torch_models.taps
from loaders import open_checkpoint
from loaders.adapters.opening import open_adapter
from parity.local import distance
from parity.oracle import oracle_forward
from parity.oracles.taps import Taps
from parity.zoo import ZOO, block_sizes, make_checkpoint, prompts
from parity.zoo.adapters import make_adapter
from parity.zoo.quantized import ZooQuantization
from torch_models.taps import collect

LEVELS = ("layers", "modules", "operations")
LAYER = "model.layers.1"


@pytest.fixture(scope="session")
def tapped(tmp_path_factory):
    """(torch model, inputs) of a zoo model, made once."""
    made = {}

    def get(name, dtype="F32", **options):
        key = (name, dtype, *options.items())
        if key not in made:
            path = make_checkpoint(name, tmp_path_factory.mktemp("taps") / "checkpoint", dtype=dtype, **options)
            made[key] = torch_models.load(path), prompts(open_checkpoint(path).config, rows=2, tokens=24)
        return made[key]

    return get


@pytest.fixture(scope="session")
def jax_of(tapped):
    """The JAX model of the same checkpoint."""
    made = {}

    def get(name, dtype="F32", **options):
        source = str(tapped(name, dtype, **options)[0].checkpoint.source)
        if source not in made:
            made[source] = jax_models.load(source)
        return made[source]

    return get


def shapes(taps):
    return [
        (
            path,
            tuple(value.shape),
            np.dtype(str(value.dtype).replace("torch.", "")).kind if "bfloat" not in str(value.dtype) else "f",
        )
        for path, value in taps.items()
    ]


def jax_shapes(model, inputs, level, **rows):
    """Of taps, in order, without compiling anything."""
    entry, checked = model.checked(inputs["input_ids"], inputs["attention_mask"], None, None)
    given = (model.weights, model.batch(checked, entry))
    return shapes(model.programs.forward_with_taps.eval_shape(*given, **rows, level=level)[1])


@pytest.mark.slow_unless("qwen3", "qwen3-moe", "qwen3_5-moe", "qwen3_vl", "gemma3")
@pytest.mark.parametrize("name", ZOO)
def test_both_backends_and_the_oracle_name_the_same_values_in_the_same_order_and_shape(tapped, jax_of, name):
    model, inputs = tapped(name)
    for level in LEVELS:
        ours = shapes(model.with_taps(**inputs, level=level)[1])
        assert jax_shapes(jax_of(name), inputs, level) == ours
    taps = Taps()
    oracle_forward(model.checkpoint, **inputs, taps=taps)
    assert [(path, shape) for path, shape, _ in shapes(taps.found)][:-1] == [(path, shape) for path, shape, _ in ours]
    assert all(shape[:2] == (2, 24) for _, shape, _ in ours)


def test_levels_hold_each_other_and_within_keeps_what_is_below(tapped):
    model, inputs = tapped("qwen3-moe")
    found = [list(model.with_taps(**inputs, level=level)[1]) for level in LEVELS]
    assert set(found[0]) < set(found[1]) < set(found[2])
    assert f"{LAYER}.self_attn" in found[1]
    assert f"{LAYER}.self_attn.q_norm" not in found[1]
    within = list(model.with_taps(**inputs, level="operations", within=f"{LAYER}.self_attn")[1])
    assert within == [path for path in found[2] if path.startswith(f"{LAYER}.self_attn")]
    with pytest.raises(ValueError, match="level is 'everything', expected one of layers, modules, operations"):
        model.with_taps(**inputs, level="everything")


def test_values_of_fused_experts_are_those_of_each_tokens_experts(tapped):
    model, inputs = tapped("qwen3-moe")
    _, taps = model.with_taps(**inputs, level="operations")
    path = "model.layers.0.mlp"
    normed, chosen = taps["model.layers.0.post_attention_layernorm"], taps[f"{path}.gate"]
    stack = model.model.layers["0"].mlp.experts.gate_up_proj
    for row, token, choice in ((0, 3, 0), (1, 7, 1)):
        gate, up = stack[chosen[row, token, choice]] @ normed[row, token]
        torch.testing.assert_close(taps[f"{path}.experts.gate_proj"][row, token, choice], gate)
        torch.testing.assert_close(taps[f"{path}.experts.up_proj"][row, token, choice], up)


@pytest.mark.parametrize("tokens", [1, 6], ids=["copies of weights", "all experts"])
def test_short_runs_through_experts_have_the_same_taps(tapped, tokens):
    model, _ = tapped("qwen3-moe")
    ids = np.arange(20, 20 + tokens)[None]
    logits, taps = model.with_taps(ids, level="operations")
    assert torch.equal(logits, model(ids))
    whole = model.with_taps(np.arange(20, 40)[None], level="operations")[1]
    assert list(taps) == list(whole)
    for path, value in taps.items():
        torch.testing.assert_close(value, whole[path][:, :tokens], rtol=1e-3, atol=1e-4)
    again, _ = model.with_taps(ids, inject=taps)
    assert torch.equal(again, logits)


@pytest.mark.slow_unless("qwen3-*", "qwen3-moe-F32", "qwen3_5-moe-BF16", "gemma3-BF16", "qwen3_vl-F32")
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", ZOO)
def test_looking_changes_nothing_in_torch_nor_does_handing_in_what_was_computed(tapped, name, dtype):
    model, inputs = tapped(name, dtype)
    plain = model(**inputs)
    for level in LEVELS:
        logits, taps = model.with_taps(**inputs, level=level)
        assert torch.equal(logits, plain)
        again, same = model.with_taps(**inputs, level=level, inject=taps)
        assert torch.equal(again, plain)
        assert all(torch.equal(same[path], value) for path, value in taps.items())


@pytest.mark.slow_unless("qwen3-operations")
@pytest.mark.parametrize("level", ["layers", "operations"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "qwen3_vl", "gemma3", "gemma3-capped"])
def test_looking_changes_nothing_in_jax_nor_does_handing_in_what_was_computed(tapped, jax_of, name, level):
    inputs, model = tapped(name)[1], jax_of(name)
    plain = np.asarray(model(**inputs))
    logits, taps = model.with_taps(**inputs, level=level)
    np.testing.assert_array_equal(np.asarray(logits), plain)
    again, same = model.with_taps(**inputs, level=level, inject=taps)
    np.testing.assert_array_equal(np.asarray(again), plain)
    # of Gemma XLA fuses the scale of the embedding into the norm behind it, unless the embedding is handed in
    limit = 2**-20 if name.startswith("gemma3") else 0
    mask = inputs["attention_mask"].astype(bool)
    for path, value in taps.items():
        found, expected = np.asarray(same[path]), np.asarray(value)
        assert np.array_equal(found, expected) or distance(found, expected, mask) < limit, path


@pytest.mark.slow_unless("qwen3-layers")
@pytest.mark.parametrize("level", ["layers", "operations"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "gemma3"])
def test_in_bfloat16_looking_changes_nothing_in_jax_and_handing_in_rounds_once(tapped, jax_of, name, level):
    # XLA may carry more digits than bfloat16 has to the next step (xla_allow_excess_precision); what is told is rounded
    inputs, model = tapped(name, "BF16")[1], jax_of(name, "BF16")
    plain = np.asarray(model(**inputs))
    logits, taps = model.with_taps(**inputs, level=level)
    np.testing.assert_array_equal(np.asarray(logits), plain)
    _, same = model.with_taps(**inputs, level=level, inject=taps)
    mask = inputs["attention_mask"].astype(bool)
    for path, value in taps.items():
        if value.dtype == "bfloat16":
            assert distance(np.asarray(same[path], np.float32), np.asarray(value, np.float32), mask) < 2**-6, path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5-moe"])
def test_looking_at_layers_and_modules_of_a_hybrid_changes_nothing_in_jax(tapped, jax_of, name):
    inputs, model = tapped(name)[1], jax_of(name)
    plain = np.asarray(model(**inputs))
    for level in ("layers", "modules"):  # inside a delta net XLA may fuse otherwise: bisect says so when it does
        np.testing.assert_array_equal(np.asarray(model.with_taps(**inputs, level=level)[0]), plain)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_value_handed_in_is_gone_on_from_and_what_was_computed_is_still_told(tapped, jax_of, backend):
    model, inputs = tapped("qwen3")
    model = model if backend == "torch" else jax_of("qwen3")
    plain, taps = model.with_taps(**inputs)
    other = {LAYER: np.asarray(taps[LAYER]) * np.float32(1.5)}
    logits, found = model.with_taps(**inputs, inject=other)
    np.testing.assert_array_equal(np.asarray(found[LAYER]), np.asarray(taps[LAYER]))
    assert np.abs(np.asarray(found["model.layers.2"]) - np.asarray(taps["model.layers.2"])).max() > 0.1
    assert np.abs(np.asarray(logits) - np.asarray(plain)).max() > 0.01


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_handing_in_what_fits_nothing_is_one_error_that_lists_all_of_it(tapped, jax_of, backend):
    model, inputs = tapped("qwen3")
    model = model if backend == "torch" else jax_of("qwen3")
    wrong = {"model.layers.9": np.zeros((2, 24, 48), np.float32), f"{LAYER}.mlp": np.zeros((2, 3), np.float32)}
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp is \(2, 3\), expected \(2, 24, \d+\).*model\.layers\.9 is no tap"
    ):
        model.with_taps(**inputs, inject=wrong)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_experts_handed_in_are_used_with_the_routers_own_weights_of_them(tapped, jax_of, backend):
    model, inputs = tapped("qwen3-moe")
    _, taps = model.with_taps(**inputs, level="operations")
    path = "model.layers.0.mlp"
    last = torch.softmax(taps[f"{path}.gate.logits"], -1).sort(descending=True)
    if backend == "jax":
        model = jax_of("qwen3-moe")
    given = {f"{path}.gate": last.indices[..., -2:].numpy()}
    _, found = model.with_taps(**inputs, level="operations", within=path, inject=given)
    expected = (last.values[..., -2:] / last.values[..., -2:].sum(-1, keepdim=True)).numpy()
    np.testing.assert_allclose(np.asarray(found[f"{path}.gate.weights"]), expected, rtol=1e-4)


def test_adapters_and_quantised_layers_keep_the_names(tapped, tmp_path):
    plain, inputs = tapped("qwen3-moe")
    expected = shapes(plain.with_taps(**inputs, level="operations")[1])
    adapted = torch_models.load(plain.checkpoint.source)
    adapted.attach_lora(make_adapter(plain.checkpoint.source, tmp_path / "adapter"))
    assert shapes(adapted.with_taps(**inputs, level="operations")[1]) == expected
    sizes = block_sizes("qwen3-moe")
    path = make_checkpoint(
        "qwen3-moe", tmp_path / "nvfp4", dtype="BF16", quantization=ZooQuantization(activations=False), **sizes
    )
    ours = shapes(torch_models.load(path).with_taps(**inputs, level="operations")[1])
    assert [name for name, _, _ in ours] == [name for name, _, _ in expected]
    assert jax_shapes(jax_models.load(path), inputs, "operations") == ours


def test_a_decoded_token_has_the_taps_of_a_prompt_and_a_graph_goes_on_without_any(tapped):
    model, inputs = tapped("qwen3")
    names = list(model.with_taps(**inputs, level="operations")[1])
    logits, cache = model.prefill(**inputs)
    token = logits.argmax(-1)
    with collect("operations") as taps:
        expected, _ = model.decode(token, cache)
    assert list(taps) == names
    assert taps[f"{LAYER}.self_attn.q_norm"].shape[:2] == (2, 1)
    _, batch = model.graphs.prefill(**inputs)
    with collect("operations") as taps:
        replayed = batch.decode(token)
    assert not taps
    torch.testing.assert_close(replayed, expected)


def test_a_class_made_from_one_with_taps_is_named_too():
    class Own(torch_models.layers.mlp.MLP):
        pass

    class OwnOfJax(jax_models.layers.mlp.MLP):
        pass

    theirs = torch.nn.Module()
    theirs.mlp = Own(4, 6)
    ours = nnx.Module()
    ours.mlp = OwnOfJax(4, 6)
    torch_models.taps.name_modules(theirs)
    jax_models.taps.name_modules(ours)
    assert theirs.mlp.path == ours.mlp.path == "mlp"


@pytest.mark.parametrize("package", [pytest.param(jax_models, marks=pytest.mark.slow), torch_models])
def test_a_router_that_an_adapter_brings_whole_says_its_scores_and_hears_others(tapped, package, tmp_path):
    checkpoint = tapped("qwen3-moe")[0].checkpoint
    adapter = make_adapter(checkpoint.source, tmp_path / "adapter", targets=("q_proj",), whole=("gate",))
    inputs = {"input_ids": np.arange(20, 40)[None]}
    told = Taps()
    oracle_forward(checkpoint, **inputs, adapter=open_adapter(adapter, checkpoint.config), taps=told)
    model = package.load(checkpoint.source).attach_lora(adapter)
    scores, chosen = "model.layers.0.mlp.gate.logits", "model.layers.0.mlp.gate"  # layer 1 is dense
    _, taps = model.with_taps(**inputs, level="operations")
    assert distance(np.asarray(taps[scores]), told.found[scores], np.ones((1, 20), bool)) < 1e-5
    _, turned = model.with_taps(**inputs, level="operations", inject={scores: -taps[scores]})
    np.testing.assert_array_equal(np.asarray(turned[chosen])[..., 0], np.asarray(taps[scores]).argmin(-1))


def test_on_a_mesh_it_is_said_why_nothing_is_seen_inside_of_experts(tmp_path):
    path = make_checkpoint("qwen3-moe", tmp_path / "it", num_experts=4, num_hidden_layers=2, mlp_only_layers=[])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("expert",))
    model, inputs = jax_models.load(path, mesh=mesh), {"input_ids": np.arange(8).reshape(2, 4)}
    inside, told = "model.layers.1.mlp.experts.down_proj", "on a mesh nothing is seen inside of experts"
    with pytest.raises(ValueError, match=f"{inside} is no tap of this run: {told}"):
        model.with_taps(**inputs, inject={inside: np.zeros((2, 4, 2, 48), np.float32)})
    with pytest.raises(ValueError, match=f"names nothing .*: {told}"):
        model.with_taps(**inputs, level="operations", within=inside)
    with pytest.raises(ValueError, match=r"nonsense is no tap of this run\. Taps"):
        model.with_taps(**inputs, inject={"nonsense": np.zeros(3, np.float32)})
    _, found = model.with_taps(**inputs, level="operations", within="model.layers.1.mlp")
    assert "model.layers.1.mlp.experts" in found
