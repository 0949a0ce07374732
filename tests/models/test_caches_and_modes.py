"""Caches belong to the weights they were computed with, whoever changed them; odd callers get errors, not corpses."""

import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from planted import TWO_LAYERS
from safetensors.numpy import load_file, save_file

import jax_models
import torch_models
from loaders import CheckpointError
from parity.zoo import make_checkpoint
from parity.zoo.draft import make_drafting_checkpoint

IDS = [[3, 14, 15, 92, 65]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return [make_checkpoint("qwen3", root / str(seed), seed=seed, num_hidden_layers=2) for seed in range(2)]


def test_two_jax_models_of_one_version_do_not_read_each_others_caches(pair):
    model = jax_models.load(pair[0])
    embed, head = model.get_embed_and_head()
    first, second = model.set_embed_and_head(embed * 2), model.set_embed_and_head(None, head * 2)
    assert first.version == second.version
    _, cache = first.prefill(IDS)
    with pytest.raises(ValueError, match="other weights"):
        second.decode([1], cache)


def test_two_torch_models_of_one_version_do_not_read_each_others_caches(pair):
    first, second = (torch_models.load(path) for path in pair)
    _, cache = first.prefill(IDS)
    with pytest.raises(ValueError, match="other weights"):
        second.decode([1], cache)


def test_updating_the_target_makes_the_caches_of_a_draft_that_shares_its_parameter_stale(pair):
    target, draft = torch_models.load(pair[0]), torch_models.load(pair[0])
    draft.model.embed_tokens.weight = target.model.embed_tokens.weight
    _, cache = draft.prefill(IDS)
    draft.decode([1], cache)
    target.update_weights_from_disk(pair[1])
    with pytest.raises(ValueError, match="other weights"):
        draft.decode([1], cache)


def test_a_torch_model_loaded_in_inference_mode_can_be_reloaded_and_its_caches_used_outside(pair):
    with torch.inference_mode():
        model = torch_models.load(pair[0])
        _, cache = model.prefill(IDS)
    model.decode([1], cache)
    model.update_weights_from_disk(pair[1])
    assert model.digests() == torch_models.load(pair[1]).digests()


def test_a_half_without_values_is_refused_and_the_model_serves_on(pair):
    model = torch_models.load(pair[0])
    before = model(IDS)
    embed, _ = model.get_embed_and_head()
    with pytest.raises(ValueError, match="no plain storage"):
        model.set_embed_and_head(torch.empty_like(embed, device="meta"))
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("package", [jax_models, torch_models])
def test_a_row_that_ended_is_filled_with_the_pad_id_even_when_that_is_no_token(package, tmp_path):
    made = make_checkpoint("qwen3", tmp_path / "plain", num_hidden_layers=2)
    ids = np.array([[3, 14, 15], [92, 65, 35]])
    free = np.asarray(package.load(made).generate(ids, max_new_tokens=6, ignore_eos=True))
    end = int(free[0, 1])
    path = make_checkpoint("qwen3", tmp_path / "ends", num_hidden_layers=2, eos_token_id=end, pad_token_id=-1)
    found = np.asarray(package.load(path).generate(ids, max_new_tokens=6))
    for row in range(2):
        stop = list(free[row]).index(end) + 1 if end in free[row] else 6
        expected = [*free[row][:stop], *[-1] * 6][: found.shape[1]]
        assert found[row].tolist() == expected


def test_pad_id_of_generation_config_wins(tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "c", num_hidden_layers=2)
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "pad_token_id": 7}')
    opened = torch_models.load(path).checkpoint
    assert (opened.eos_token_ids, opened.pad_token_id) == ((5, 6), 7)


def test_token_ids_of_generation_config_that_are_no_integers_are_named_together(tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "c", num_hidden_layers=1)
    (path / "generation_config.json").write_text('{"eos_token_id": "end", "pad_token_id": "pad"}')
    with pytest.raises(CheckpointError) as caught:
        torch_models.load(path)
    assert [problem.split(" is ")[0] for problem in caught.value.problems] == [
        "generation_config.json: eos_token_id",
        "generation_config.json: pad_token_id",
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_dtype_may_be_a_name_or_a_framework_dtype(pair, dtype):
    assert torch_models.load(pair[0], dtype=dtype).dtype == torch.bfloat16
    assert jax_models.load(pair[0], dtype=dtype).dtype.name == "bfloat16"


def test_numpy_and_jax_dtype_objects_are_understood(pair):
    import jax.numpy as jnp

    for dtype in (np.float32, np.dtype("float32"), jnp.float32, jnp.dtype("float32")):
        assert torch_models.load(pair[0], dtype=dtype).dtype == torch.float32
        assert jax_models.load(pair[0], dtype=dtype).dtype.name == "float32"
    with pytest.raises(ValueError, match="not computed in"):
        jax_models.load(pair[0], dtype=jnp.float16)


@pytest.mark.parametrize("package", [jax_models, torch_models])
def test_a_stage_or_mesh_of_another_kind_says_what_is_expected(package, pair):
    with pytest.raises(ValueError, match=r"stage=1, expected \(index, count\) of a pipeline, or None"):
        package.load(pair[0], stage=1)
    for mesh, kind in (("tensor", "str"), (2, "int"), ({"tensor": 2}, "dict"), (np.array([0]), "ndarray")):
        with pytest.raises(ValueError, match=rf"is a {kind}, expected a .*Mesh"):
            package.load(pair[0], mesh=mesh)


@pytest.mark.parametrize("package", [jax_models, torch_models])
def test_all_stages_compute_in_the_dtype_that_most_of_the_model_has(package, tmp_path):
    """A head in float32 is most of what the last of three stages holds."""
    path = make_checkpoint("qwen3", tmp_path / "it", dtype="BF16", num_hidden_layers=3)
    file = path / "model.safetensors"
    found = load_file(file)
    save_file(found | {"lm_head.weight": found["lm_head.weight"].astype(np.float32)}, file, metadata={"format": "pt"})
    sizes = {name: found[name].size for name in found}
    last = sum(size for name, size in sizes.items() if ".layers.2." in name)
    assert 2 * last < 4 * sizes["lm_head.weight"] < sum(sizes.values())
    stages = [(0, 1), *((index, 3) for index in range(3))]
    assert {str(package.load(path, stage=stage).dtype).split(".")[-1] for stage in stages} == {"bfloat16"}


@pytest.mark.parametrize("package", [jax_models, torch_models])
def test_a_later_stage_takes_hidden_states_of_any_library(package, tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "it", dtype="BF16", num_hidden_layers=2)
    first, last = (package.load(path, stage=(index, 2)) for index in range(2))
    x_BTD = first(IDS)
    if package is torch_models:
        handed = x_BTD.float().numpy().astype(ml_dtypes.bfloat16)
        kinds = [handed, handed.astype(np.float64), handed.astype(np.float32).tolist(), jnp.asarray(handed)]
    else:
        handed = np.asarray(x_BTD)
        kinds = [handed, handed.astype(np.float64), handed.astype(np.float32).tolist()]
    expected = np.asarray(last(hidden_states=x_BTD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in kinds:
            np.testing.assert_array_equal(np.asarray(last(hidden_states=kind)), expected)
    with pytest.raises((ValueError, TypeError)):
        last(hidden_states="x")


@pytest.mark.parametrize("package", [jax_models, torch_models])
def test_what_a_draft_cannot_be_shown_is_a_value_error(package, tmp_path):
    path = make_drafting_checkpoint("qwen3_5", tmp_path / "it", **TWO_LAYERS)
    model = package.load(path, mtp=True)
    for bad in (5, np.int64(5), [[3]], [3, 14], None):
        with pytest.raises(ValueError, match="input_ids"):
            model.mtp_forward(bad)
    for bad in (5, np.int64(5), [3, 14], None):
        with pytest.raises(ValueError, match="input_ids"):
            model.generate(bad, draft=model.draft)
    assert model.generate([[3, 14]], max_new_tokens=2, draft=model.draft).shape == (1, 2)
