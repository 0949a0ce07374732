"""The life of quantised weights: every event, quantising while reading, storage that is source and derived in turn."""

from __future__ import annotations

import copy
import gc
import json

import numpy as np
import pytest
import torch
from lives import BACKENDS, Benches

import jax_models
import torch_models
from loaders import Checkpoint, CheckpointError, open_checkpoint
from loaders.quantization.quantize import quantized
from loaders.reading.plan import specs_of
from loaders.writing.writer import write_checkpoint
from parity.backends import open_backend
from parity.lifecycle.live_model import differing
from parity.lifecycle.run import run_lifecycle
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts
from torch_models import pointer_census
from torch_models.aliased_storage import remembered_bytes
from torch_models.census import moved, tensors_of
from torch_models.derived import derive, holds_derived
from torch_models.kernels.nvfp4_blackwell import swizzled

pytestmark = pytest.mark.usefixtures("young_heap")

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    return Benches(tmp_path_factory.mktemp("life"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two unquantised mixtures of experts, as a trainer sends them."""
    root = tmp_path_factory.mktemp("plain")
    sizes = {**block_sizes("qwen3-moe"), "num_hidden_layers": 2, "dtype": "BF16"}
    return [make_checkpoint("qwen3-moe", root / letter, seed=seed, **sizes) for seed, letter in enumerate("AB")]


@pytest.fixture(scope="module")
def written(plain, tmp_path_factory):
    """The same two in NVFP4, on disk."""
    root = tmp_path_factory.mktemp("written")
    found = []
    for path in plain:
        view = quantized(open_checkpoint(path))
        beside = view.quantization_document
        config = view.config_document
        found.append(write_checkpoint(root / path.name, view.tensors, view.read, config=config, quantization=beside))
    return found


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """Two dense models whose block scales are as many in the kernel's order: that order takes their storage."""
    root = tmp_path_factory.mktemp("aligned")
    sizes = {**block_sizes("qwen3", aligned=True), "num_hidden_layers": 2}
    options = {"quantization": ZooQuantization(unify=False), **sizes}
    return [make_checkpoint("qwen3", root / letter, seed=seed, **options) for seed, letter in enumerate("AB")]


def batch(path):
    return prompts(open_checkpoint(path).config, rows=2, tokens=12, padding="left")


def logits(model, inputs):
    out = model(**inputs)
    return out.detach().numpy() if isinstance(out, torch.Tensor) else np.asarray(out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zoo", ["qwen3-moe nvfp4", pytest.param("qwen3_5-moe nvfp4", marks=SLOW)])
@pytest.mark.slow_unless("*-torch")
def test_every_law_holds_through_every_event(zoo, backend, benches, tmp_path):
    pair = benches.pair(zoo)
    results = run_lifecycle(pair["A"], pair["B"], backends=[backend], scratch=tmp_path)
    assert [result for result in results if result.verdict == "fail"] == []
    assert sum(result.verdict == "pass" for result in results) > 25


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantising_while_reading_is_loading_what_quantize_writes(backend, plain, written):
    module = open_backend(backend).module
    inputs = batch(plain[0])
    live = module.load(plain[0], quantize="nvfp4")
    cold = module.load(written[0])
    assert live.digests() == cold.digests()
    assert logits(live, inputs).tobytes() == logits(cold, inputs).tobytes()
    assert set(live.kernels) == set(cold.kernels) != set()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_quantises_while_reading_is_reloaded_from_both_and_exports_nvfp4(
    backend, plain, written, tmp_path
):
    module = open_backend(backend).module
    inputs = batch(plain[0])
    cold = [module.load(path) for path in written]
    model = module.load(plain[0], quantize="nvfp4")
    for letter, path in ((1, plain[1]), (0, written[0]), (1, plain[1]), (0, plain[0]), (1, written[1])):
        model = model.update_weights_from_disk(path)
        assert model.digests() == cold[letter].digests()
        assert logits(model, inputs).tobytes() == logits(cold[letter], inputs).tobytes()
    model.export(tmp_path / "export")
    exported = open_checkpoint(tmp_path / "export")
    assert exported.config == open_checkpoint(written[1]).config
    assert module.load(tmp_path / "export").digests() == cold[1].digests()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_nvfp4_model_refuses_bf16_unless_it_was_told_to_quantise(backend, plain, written):
    model = open_backend(backend).load(written[0])
    before = model.digests()
    with pytest.raises(CheckpointError, match="it is not quantised, and the model is"):
        model.update_weights_from_disk(plain[1])
    assert model.digests() == before
    assert model.version == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_way_of_quantising_is_another_model(backend, written, tmp_path):
    """All modules that differ are named at once; nothing changes."""
    sizes = {**block_sizes("qwen3-moe"), "num_hidden_layers": 2, "dtype": "BF16"}
    how = ZooQuantization(activations=False, exclude=("*.o_proj",))
    other = make_checkpoint("qwen3-moe", tmp_path / "other", quantization=how, **sizes)
    model = open_backend(backend).load(written[0])
    with pytest.raises(CheckpointError, match="Load it as a new model") as caught:
        model.update_weights_from_disk(other)
    assert str(caught.value).count("o_proj is not quantised, expected NVFP4, weights only") == 2
    assert logits(model, batch(written[0])).shape


def test_jax_can_give_up_the_old_weights_and_a_refused_reload_gives_up_nothing(written, plain):
    inputs = batch(written[0])
    cold = [logits(jax_models.load(path), inputs) for path in written]
    model = old = jax_models.load(written[0])
    with pytest.raises(CheckpointError):
        model.update_weights_from_disk(plain[1], donate=True)
    assert logits(model, inputs).tobytes() == cold[0].tobytes()
    compiled = model.programs.forward._cache_size()
    for letter in (1, 0, 1):
        model = model.update_weights_from_disk(written[letter], donate=True)
        assert logits(model, inputs).tobytes() == cold[letter].tobytes()
    assert model.programs.forward._cache_size() == compiled
    with pytest.raises(RuntimeError, match="were given up to an update"):
        logits(old, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_stay_within_two_percent_of_the_checkpoint(backend, written):
    """No second copy, whether it is called derived or forgotten: after a load, runs, digests, and reloads."""
    expected = sum(info.num_bytes for info in open_checkpoint(written[0]).tensors.values())
    others = live_buffers().keys()
    model = open_backend(backend).load(written[0])
    for letter in (None, 1, 0, 1):
        model = model if letter is None else model.update_weights_from_disk(written[letter])
        logits(model, batch(written[0]))
        model.digests()
        found = live_buffers()
        kept = sum(size for buffer, size in found.items() if buffer not in others)
        assert (resident(model) if backend == "torch" else kept) <= 1.02 * expected


def live_buffers():
    """Every buffer that JAX holds for anybody, with its bytes; two arrays over one are one."""
    import jax

    gc.collect()
    return {array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays() if len(array.devices()) == 1}


def resident(model):
    """Bytes of everything a torch model reaches; of a JAX model's arrays."""
    if isinstance(model, torch.nn.Module):
        storages = {tensor.untyped_storage().data_ptr(): tensor for _, tensor in tensors_of(model)}
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.weights))


def aliased(model):
    """Modules whose block scales' storage holds the kernel's order."""
    return [
        name for name, part in model.named_modules() if hasattr(part, "alpha") and holds_derived(part, "weight_scale")
    ]


def test_block_scales_in_the_kernels_order_take_their_sources_storage_through_every_reload(aligned):
    inputs = batch(aligned[0])
    cold = [torch_models.load(path) for path in aligned]
    expected = [logits(model, inputs) for model in cold]
    model = torch_models.load(aligned[0], kernel="reference-128x4")
    assert len(aliased(model)) == 14
    assert resident(model) == resident(cold[0])
    assert remembered_bytes(model) <= 0.02 * resident(model)
    assert logits(model, inputs).tobytes() == expected[0].tobytes()
    before = pointer_census(model)
    for reload in range(1, 101):
        model.update_weights_from_disk(aligned[reload % 2])
        if reload in (1, 2, 50, 99, 100):
            assert logits(model, inputs).tobytes() == expected[reload % 2].tobytes()
            assert model.digests() == cold[reload % 2].digests()
    assert moved(before, pointer_census(model)) == []


def test_what_is_exported_is_what_was_loaded_though_storage_holds_another_order(aligned, tmp_path):
    model = torch_models.load(aligned[0], kernel="reference-128x4")
    model.export(tmp_path / "export")
    for name, array in open_checkpoint(tmp_path / "export").stream():
        assert array.tobytes() == open_checkpoint(aligned[0]).read(name).tobytes(), name


def test_a_reload_that_breaks_half_way_is_refused_and_the_next_one_is_a_cold_load(aligned, monkeypatch):
    """Some storages then hold new sources, some old derived bytes; nothing is derived from the wrong ones."""
    inputs = batch(aligned[0])
    expected = logits(torch_models.load(aligned[1]), inputs)
    model = torch_models.load(aligned[0], kernel="reference-128x4")
    from torch_models import staging

    real, calls = staging._sums, []

    def failing(*args, **options):
        calls.append(None)
        if len(calls) == 9:
            raise OSError("the device is gone")
        return real(*args, **options)

    monkeypatch.setattr(staging, "_sums", failing)
    with pytest.raises(OSError, match="device is gone"):
        model.update_weights_from_disk(aligned[1])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="refuses to run"):
        logits(model, inputs)
    model.update_weights_from_disk(aligned[1])
    assert logits(model, inputs).tobytes() == expected.tobytes()


def test_sleep_wake_and_copies_keep_what_the_storage_holds(aligned):
    inputs = batch(aligned[0])
    model = torch_models.load(aligned[0], kernel="reference-128x4")
    expected = logits(model, inputs)
    model.sleep()
    model.wake()
    assert logits(model, inputs).tobytes() == expected.tobytes()
    other = copy.deepcopy(model)
    other.update_weights_from_disk(aligned[1])
    assert logits(model, inputs).tobytes() == expected.tobytes()
    assert logits(other, inputs).tobytes() != expected.tobytes()
    model.update_weights_from_disk(aligned[1])
    assert differing(model.digests(), other.digests()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantised_head_is_not_swapped_without_its_scales(backend, tmp_path):
    sizes = {**block_sizes("qwen3"), "num_hidden_layers": 2}
    path = make_checkpoint("qwen3", tmp_path / "A", quantization=ZooQuantization(head=True), **sizes)
    model = open_backend(backend).load(path)
    embed, head = model.get_embed_and_head()
    assert model.set_embed_and_head(embed, head).version == 1
    other = head.clone() if backend == "torch" else head + 0
    with pytest.raises(ValueError, match="head is quantised: its codes mean nothing without their scales"):
        model.set_embed_and_head(head=other)


@pytest.mark.parametrize("how", ["tensor", "expert"])
@pytest.mark.slow_unless("expert")
def test_on_a_mesh_quantised_weights_compute_the_same(how, written):
    """Codes are cut between blocks; experts and their scales go together."""
    import jax

    inputs = batch(written[0])
    expected = logits(jax_models.load(written[0], dtype="float32"), inputs)
    axes = {"tensor": (("tensor",), (3,)), "expert": (("expert", "tensor"), (5, 1))}[how]
    mesh = jax.make_mesh(axes[1], axes[0], devices=jax.devices()[: int(np.prod(axes[1]))])
    model = jax_models.load(written[0], dtype="float32", mesh=mesh)
    is_real = inputs["attention_mask"].astype(bool)
    found = logits(model, inputs)[is_real]
    assert np.linalg.norm(found - expected[is_real]) <= 1e-5 * np.linalg.norm(expected[is_real])
    codes = traverse_of(model.weights)["model.layers.0.self_attn.o_proj.weight"]
    if how == "tensor":
        assert codes.sharding.shard_shape(codes.shape) != codes.shape


def traverse_of(weights):
    from flax import traverse_util

    return traverse_util.flatten_dict(weights, sep=".")


def test_a_layer_whose_scales_were_written_behind_its_back_derives_from_all_of_them_or_refuses(aligned):
    model = torch_models.load(aligned[0], kernel="reference-128x4")
    layer = model.get_submodule("model.layers.0.mlp.gate_proj")
    new = torch_models.load(aligned[1]).get_submodule("model.layers.0.mlp.gate_proj").weight_scale
    layer.derive()  # nothing changed: nothing is derived
    layer.weight_scale.data.copy_(new)
    layer.derive()
    assert torch.equal(layer.source("block").view(torch.uint8), new.view(torch.uint8))
    layer.weight_scale.data[:128] = new[:128]
    with pytest.raises(RuntimeError, match="would be derived twice"):
        layer.derive()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_an_fp8_cache_are_part_of_the_model(backend, tmp_path):
    """A successor has them too; one without is refused, and nothing of the old model is lost."""
    sizes = {**block_sizes("qwen3"), "num_hidden_layers": 2}
    with_scales = ZooQuantization(activations=False, kv_cache=True)
    path = make_checkpoint("qwen3", tmp_path / "A", quantization=with_scales, **sizes)
    other = make_checkpoint("qwen3", tmp_path / "B", seed=1, quantization=with_scales, **sizes)
    for name in ("config.json", "hf_quant_config.json"):
        document = json.loads((other / name).read_text())
        inner = document.get("quantization_config", document.get("quantization"))
        inner.pop("kv_cache_scheme", None)
        inner.pop("kv_cache_quant_algo", None)
        (other / name).write_text(json.dumps(document))
    load = open_backend(backend).module.load
    model = load(path)
    before = model.digests()
    with pytest.raises(CheckpointError, match="it has no FP8 cache, expected an FP8 cache with scales"):
        model.update_weights_from_disk(other)
    assert model.digests() == before
    assert model.update_weights_from_disk(path).digests() == before
    inputs = batch(path)
    assert (model.quantizes_inputs, model.rounds_cache) == (False, True)
    assert logits(load(path, activation_quantization=False), inputs).tobytes() != logits(load(path), inputs).tobytes()
    with pytest.raises(ValueError, match="no scales for inputs"):
        load(path, activation_quantization=True)


def fails_the_second_time(monkeypatch, kind, after):
    """Streams break in the second pass over a checkpoint, after so many tensors."""
    real, delivered = Checkpoint.stream, []

    def stream(self, *args, **kwargs):
        for found in real(self, *args, **kwargs):
            if len(delivered) == len(self.tensors) + after:
                raise kind(self.source, ["the disk is gone"]) if kind is CheckpointError else kind("no room")
            delivered.append(None)
            yield found

    monkeypatch.setattr(Checkpoint, "stream", stream)


@pytest.mark.parametrize("kind", [CheckpointError, MemoryError])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_breaks_when_weights_are_given_up_says_so_and_a_good_reload_helps(backend, kind, written, monkeypatch):
    if backend == "torch" and kind is MemoryError:
        kind = CheckpointError  # torch reports what is not about the checkpoint as it is
    options = {"donate": True} if backend == "jax" else {}
    inputs = batch(written[0])
    expected = logits(open_backend(backend).load(written[1]), inputs)
    model = open_backend(backend).load(written[0])
    with monkeypatch.context() as patched:
        fails_the_second_time(patched, kind, after=60)
        with pytest.raises(RuntimeError, match="pdate again with good weights"):
            model.update_weights_from_disk(written[1], **options)
    with pytest.raises(RuntimeError):
        logits(model, inputs)
    model = model.update_weights_from_disk(written[1], **options)
    assert logits(model, inputs).tobytes() == expected.tobytes()


def test_a_second_pass_that_fails_before_it_writes_leaves_the_old_weights_serving(written, monkeypatch):
    inputs = batch(written[0])
    model = torch_models.load(written[0])
    before = logits(model, inputs)
    with monkeypatch.context() as patched:
        fails_the_second_time(patched, CheckpointError, after=0)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            model.update_weights_from_disk(written[1])
    assert logits(model, inputs).tobytes() == before.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draft_is_not_bound_to_a_target_that_computes_otherwise(backend, benches):
    load, path = open_backend(backend).module.load, benches.pair("qwen3_5-moe nvfp4")["A"]
    source, target = load(path, mtp=True), load(path, mtp=True, activation_quantization=False)
    with pytest.raises(ValueError, match="one quantises the inputs of layers, the other does not"):
        source.draft.bind(target)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantising_while_reading_refuses_to_begin_with_what_it_could_not_go_on_from(backend, benches):
    with pytest.raises(CheckpointError, match="quantised already, and not as quantize='nvfp4' would"):
        open_backend(backend).module.load(benches.pair("qwen3-moe nvfp4")["A"], quantize="nvfp4")


def test_a_stage_without_quantised_layers_takes_the_kernel_that_the_others_run(tmp_path):
    sizes = {**block_sizes("qwen3"), "num_hidden_layers": 2}
    how = ZooQuantization(exclude=("*.layers.0.*",))
    path = make_checkpoint("qwen3", tmp_path / "A", quantization=how, **sizes)
    stages = [torch_models.load(path, stage=(index, 2), kernel="reference") for index in range(2)]
    assert [bool(stage.kernels) for stage in stages] == [False, True]


def written_by_name(model, other):
    """A trainer's way: every tensor of the checkpoint, past ``update_weights_from_disk``."""
    for spec in specs_of(model.config, model.stage):
        model.get_parameter(spec.name).data.copy_(other.get_parameter(spec.name).data)


@pytest.mark.parametrize("which", ["written", "aligned"])
def test_a_model_follows_weights_that_are_written_by_name(which, written, aligned):
    """Under a captured step too: what is derived from scalars is derived where it is used."""
    pair = {"written": written, "aligned": aligned}[which]
    inputs = batch(pair[0])
    model, other = (torch_models.load(path) for path in pair)
    before = pointer_census(model)
    first, recording = model.graphs.prefill(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=4)
    recording.decode([1, 2])
    written_by_name(model, other)
    assert logits(model, inputs).tobytes() == logits(other, inputs).tobytes()
    found, expected = (
        one.graphs.prefill(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=4)[1].decode([1, 2])
        for one in (model, other)
    )
    assert torch.equal(found, expected)
    assert model.graphs.num_captures == 1
    assert moved(before, {name: one for name, one in pointer_census(model).items() if name in before}) == []


@pytest.mark.parametrize("zoo", ["qwen3", "qwen3-moe"])
def test_scales_that_are_written_by_name_are_exported_as_they_were_written_and_derived_anew(zoo, tmp_path):
    sizes = {**block_sizes(zoo, aligned=True), "num_hidden_layers": 2}
    how = ZooQuantization(unify=False)
    pair = [
        make_checkpoint(zoo, tmp_path / letter, seed=seed, quantization=how, **sizes)
        for seed, letter in enumerate("AB")
    ]
    model = torch_models.load(pair[0], kernel="reference-128x4")
    written_by_name(model, torch_models.load(pair[1]))
    assert model.digests() == torch_models.load(pair[1]).digests()
    model.export(tmp_path / "export")
    for name, array in open_checkpoint(tmp_path / "export").stream():
        assert array.tobytes() == open_checkpoint(pair[1]).read(name).tobytes(), name
    derive(model)
    inputs = batch(pair[0])
    assert logits(model, inputs).tobytes() == logits(torch_models.load(pair[1]), inputs).tobytes()


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight_scale", "mlp.down_proj.weight_scale"])
def test_scales_that_are_written_in_part_are_neither_exported_nor_published(name, aligned, tmp_path):
    model, other = torch_models.load(aligned[0], kernel="reference-128x4"), torch_models.load(aligned[1])
    scale, new = (one.get_parameter(f"model.layers.0.{name}") for one in (model, other))
    half = len(scale) // 2
    scale.data.view(torch.uint8)[:half] = new.data.view(torch.uint8)[:half]
    with pytest.raises(RuntimeError, match="still, not what was loaded: .* pieces are as they were"):
        model.export(tmp_path / "export")
    embed, _ = model.get_embed_and_head()
    with pytest.raises(RuntimeError, match="would be derived twice"):
        model.set_embed_and_head(embed.clone())
    assert model.version == 1
    with pytest.raises(RuntimeError, match="refuses to run"):
        logits(model, batch(aligned[0]))
    model.update_weights_from_disk(aligned[1])
    assert logits(model, batch(aligned[0])).tobytes() == logits(other, batch(aligned[0])).tobytes()


def test_experts_keep_their_block_scales_in_the_kernels_order_in_the_storage_of_those_that_were_loaded(tmp_path):
    """The case of the seed: 15 GiB a rank."""
    sizes = {**block_sizes("qwen3-moe", aligned=True), "num_hidden_layers": 2}
    for activations in (True, False):
        how = ZooQuantization(unify=False, activations=activations)
        paths = [
            make_checkpoint("qwen3-moe", tmp_path / f"{activations}{seed}", seed=seed, quantization=how, **sizes)
            for seed in range(2)
        ]
        cold = [torch_models.load(path) for path in paths]
        model = torch_models.load(paths[0], kernel="reference-128x4")
        experts = model.get_submodule("model.layers.0.mlp.experts")
        for stack in ("w13", "w2"):
            source = experts.get_parameter(f"{stack}_weight_scale")
            assert experts.get_parameter(f"{stack}_blockscale_swizzled") is source
            assert holds_derived(experts, f"{stack}_weight_scale")
            loaded = cold[0].get_parameter(f"model.layers.0.mlp.experts.{stack}_weight_scale")
            assert torch.equal(source.view(torch.uint8), swizzled(loaded).view(torch.uint8))
        assert set(model.kernels.values()) == {"reference-128x4"}
        before, inputs = pointer_census(model), batch(paths[0])
        assert resident(model) == resident(cold[0])
        for letter in (0, 1, 1, 0):
            model.update_weights_from_disk(paths[letter])
            assert logits(model, inputs).tobytes() == logits(cold[letter], inputs).tobytes()
            assert model.digests() == cold[letter].digests()
        assert moved(before, pointer_census(model)) == []
