"""What JAX is set to around a call changes nothing: a model runs where its weights are, by the rules of its layers."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_models
from parity.zoo import block_sizes, make_checkpoint, prompts
from parity.zoo.adapters import make_adapter
from parity.zoo.draft import make_drafting_checkpoint
from parity.zoo.pictures import pictures

pytestmark = pytest.mark.usefixtures("eight_devices")


def mesh_of(kind):
    """None: of other devices, and another number of them."""
    if kind is None:
        return jax.make_mesh((3,), ("tensor",), devices=jax.devices()[5:])
    return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("ambient") / "c", num_hidden_layers=2)


@pytest.mark.parametrize("is_sharded", [True, False], ids=["on a mesh", "on one device"])
@pytest.mark.parametrize("around", [AxisType.Explicit, AxisType.Auto, None], ids=str)
def test_a_model_says_the_same_under_any_mesh(around, is_sharded, checkpoint):
    mesh = mesh_of(AxisType.Explicit)
    model = jax_models.load(checkpoint, mesh=mesh if is_sharded else None)
    inputs = prompts(model.config, rows=2, tokens=16)

    def said():
        logits, taps = model.with_taps(**inputs)
        token_ids = model.generate(**inputs, max_new_tokens=3, ignore_eos=True)
        return [np.asarray(each) for each in (model(**inputs), token_ids, logits, *taps.values())]

    expected = said()
    with jax.set_mesh(mesh_of(around)):
        found = said()
        changed = model.update_weights_from_disk(checkpoint)
        assert np.array_equal(np.asarray(changed(**inputs)), expected[0])
    assert all(map(np.array_equal, found, expected))


@pytest.mark.parametrize("name", ["draft", "pictures"])
@pytest.mark.parametrize("is_sharded", [True, False], ids=["on a mesh", "on one device"])
def test_so_do_its_draft_its_eyes_and_steps_taken_one_by_one(name, is_sharded, tmp_path):
    mesh = mesh_of(AxisType.Explicit) if is_sharded else None
    if name == "draft":
        model = jax_models.load(make_drafting_checkpoint("qwen3_5", tmp_path / "c"), mtp=True, mesh=mesh)
        inputs = prompts(model.config, rows=2, tokens=16)
    else:
        model = jax_models.load(make_checkpoint("qwen3_vl", tmp_path / "c"), mesh=mesh)
        inputs = pictures(model.config, tokens=48)

    def said():
        logits_BV, cache = model.prefill(**inputs, max_new_tokens=2)
        token_ids = model.next_ids(np.asarray(logits_BV).argmax(axis=-1), cache)
        found = [logits_BV, model.decode(token_ids, cache)[0]]
        if name == "draft":
            return [*found, *model.mtp_forward(**inputs), *model.draft(**inputs)]
        shown = inputs["pixel_values"], inputs["image_grid_thw"]
        return [*found, *model.get_image_features(*shown), *model.get_video_features(*shown)]

    expected = [np.asarray(each) for each in said()]
    with jax.set_mesh(mesh_of(None)):
        found = [np.asarray(each) for each in said()]
    assert all(map(np.array_equal, found, expected))


@pytest.mark.parametrize("name", ["qwen3_5-moe", "gemma3", "qwen3_vl", "nvfp4", "draft"])
def test_it_says_the_same_whatever_jax_would_forbid(name, tmp_path):
    """Promotion of dtypes and of ranks, which layers rely on; host arrays as inputs; and other bits for a seed."""
    if name == "draft":
        path = make_drafting_checkpoint("qwen3_5", tmp_path / "c")
    elif name == "nvfp4":
        path = make_checkpoint("qwen3", tmp_path / "c", dtype="BF16", num_hidden_layers=2, **block_sizes("qwen3"))
    else:
        path = make_checkpoint(name, tmp_path / "c")
    options = {"quantize": "nvfp4" if name == "nvfp4" else None, "mtp": name == "draft"}

    def said():
        model = jax_models.load(path, **options)
        inputs = pictures(model.config, tokens=48) if name == "qwen3_vl" else prompts(model.config, rows=2, tokens=16)
        logits, taps = model.with_taps(**inputs)
        drafted = {"draft": model.draft} if name == "draft" else {}
        found = [model.generate(**inputs, max_new_tokens=3, ignore_eos=True, temperature=2.0, **drafted)]
        model.update_weights_from_disk(path)
        return [np.asarray(each) for each in (model(**inputs), logits, *taps.values(), *found)]

    expected = said()
    promotion = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    bits = jax.default_prng_impl("rbg"), jax.threefry_partitionable(False)
    with promotion[0], promotion[1], bits[0], bits[1], jax.transfer_guard("disallow"):
        found = said()
    assert all(map(np.array_equal, found, expected))
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        found = said()
    assert all(map(np.array_equal, found, expected))


@pytest.mark.parametrize("is_sharded", [True, False], ids=["on a mesh", "on one device"])
def test_weights_come_and_go_also_where_transfers_are_forbidden(is_sharded, checkpoint, tmp_path):
    mesh = mesh_of(AxisType.Explicit) if is_sharded else None
    adapter = make_adapter(checkpoint, tmp_path / "adapter")

    def life(name):
        model = jax_models.load(checkpoint, mesh=mesh)
        model.save(tmp_path / name)
        model = jax_models.restore(tmp_path / name, mesh=mesh).attach_lora(adapter).detach_lora()
        model = model.attach_lora(adapter).merge_lora().unmerge_lora()
        embed, head = (np.asarray(each) + 1 for each in model.get_embed_and_head())
        model = model.set_embed_and_head(embed, head)
        yield model.digests()
        model = model.update_weights_from_disk(checkpoint).update_weights_from_disk(checkpoint, donate=True)
        yield model.replace(weights=model.weights).digests()
        model.export(tmp_path / f"{name} exported")

    expected = list(life("free"))
    with jax.transfer_guard_host_to_device("disallow_explicit"), jax.transfer_guard_device_to_device("disallow"):
        found = list(life("guarded"))
    assert found == expected
