"""What can go wrong with an update goes wrong here, and the old model serves on, bit for bit."""

from __future__ import annotations

import gc
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import torch
from lives import BACKENDS, Benches

import jax_models
import torch_models
from loaders import CheckpointError
from loaders.checkpoint import Checkpoint
from loaders.config import config_from_json
from loaders.reading.filling import Filling
from loaders.reading.place import weight_loader
from loaders.sources.local import LocalFile
from parity.lifecycle.faults import (
    FAULTS,
    MATCHING,
    OPENING,
    broken_checkpoint,
    changed_deliveries,
    never_delivered,
    other_architecture,
    other_config,
)
from parity.lifecycle.live_model import LiveModel, same_bits
from parity.zoo import make_checkpoint

pytestmark = pytest.mark.usefixtures("young_heap")

ZOO = ("qwen3", "qwen3-moe")
# two kinds of layers, fused experts, a wrapper's names, tensors that no load reads
OTHERS = ("qwen3_5", "qwen3_5-moe", "qwen3_5-wrapped", "gemma3")
# the error about another architecture says nothing about the fields of its config
PAIRS = [
    pair
    for kind in (OPENING, MATCHING)
    for pair in itertools.combinations(kind, 2)
    if set(pair) != {other_config, other_architecture}
]


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    return Benches(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module", params=[f"{backend}-{zoo}" for backend in BACKENDS for zoo in ZOO])
def life(request, benches):
    """One model for all tests of the module: none of them may leave a trace."""
    backend, _, zoo = request.param.partition("-")
    life = LiveModel(benches.bench(backend, zoo), "A")
    yield life
    life.check()


def refused(life, *faults):
    version, root = life.model.version, life.root
    text = life.broken_reload("B", *faults)
    assert (life.model.version, life.root) == (version, root)
    return text


@pytest.mark.parametrize("name", FAULTS)
def test_a_reload_with_this_fault_is_refused_by_name_and_changes_nothing(name, life):
    refused(life, FAULTS[name])


def test_of_two_faults_in_one_checkpoint_both_are_named(life):
    for pair in PAIRS:
        refused(life, *pair)


def test_every_fault_of_a_kind_at_once_is_named_in_one_error(life):
    for kind in (OPENING, [fault for fault in MATCHING if fault is not other_architecture]):
        text = refused(life, *kind)
        assert int(text.split(": ")[1].split(" problem")[0]) >= len(kind)


def test_a_checkpoint_with_faults_cannot_be_loaded_as_a_new_model_either(life):
    for name, fault in FAULTS.items():
        if name in ("wrong dtype", "other config"):
            continue  # another model, not a broken one
        with (
            broken_checkpoint(life.bench.checkpoints["B"], life.bench.scratch, fault) as (directory, _),
            pytest.raises(ValueError, match="problem|weight is|config"),
        ):
            life.bench.load(directory)
    life.check()


@pytest.mark.parametrize(
    ("backend", "zoo"),
    [(backend, zoo) for backend in BACKENDS for zoo in OTHERS if (backend, zoo) != ("jax", "qwen3_5")],  # as wrapped
)
@pytest.mark.slow_unless("torch-*", "jax-gemma3")
def test_every_family_refuses_every_fault_alone_and_with_all_of_its_kind(backend, zoo, benches):
    life = LiveModel(benches.bench(backend, zoo), "A")
    for fault in FAULTS.values():
        refused(life, fault)
    for kind in (OPENING, [fault for fault in MATCHING if fault is not other_architecture]):
        text = refused(life, *kind)
        assert int(text.split(": ")[1].split(" problem")[0]) >= len(kind)
    life.reload("B")


@pytest.mark.parametrize("zoo", [*ZOO, *OTHERS])
def test_another_config_or_architecture_is_a_good_config_and_the_checkpoint_keeps_its_own(zoo, benches):
    good = benches.bench("torch", zoo).checkpoints["B"]
    for fault, is_ours in ((other_config, True), (other_architecture, False)):
        with broken_checkpoint(good, benches.root, fault) as (directory, _):
            found, problems = config_from_json(json.loads((directory / "config.json").read_text()))
        assert problems == []
        assert found is not None
        assert (found.architecture == good.config.architecture) == is_ours
        assert found != good.config
        assert good.config_document == json.loads((good.source.path / "config.json").read_text())


def test_whichever_read_fails_the_old_model_serves_on(life, monkeypatch):
    """A disk error at the first read of tensor bytes, at the second, ... at the last."""
    original = LocalFile.scatter_into
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", 1 << 10)  # else all of it is read at once
    reads = {"left": -1, "done": 0}

    def scatter_into(self, outs, position):
        reads["done"] += 1
        if reads["left"] == 0:
            raise OSError(5, "Input/output error")
        reads["left"] -= 1
        original(self, outs, position)

    monkeypatch.setattr(LocalFile, "scatter_into", scatter_into)
    before = life.model.digests()
    life.bench.load(life.bench.path("B"))
    total = reads["done"]
    assert total > len(life.holds)
    for failing in range(total):
        reads["left"] = failing
        with pytest.raises(CheckpointError, match="Input/output error"):
            life.model.update_weights_from_disk(life.bench.path("B"))
        assert life.model.digests() == before
    reads["left"] = -1
    life.check()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_json_that_is_replaced_while_weights_are_read_is_an_error_at_the_end(file, backend, tmp_path, monkeypatch):
    """As a checkpoint is being copied over another one: the weights may be those of the other config."""
    models, path = {"jax": jax_models, "torch": torch_models}[backend], tmp_path / "it"
    make_checkpoint("qwen3", path, num_hidden_layers=2, max_file_bytes=1 << 15)
    (path / "generation_config.json").write_text("{}")
    model = models.load(path)
    before, receive = model.digests(), Filling.receive

    def replaced(self, tensors):
        (path / "copy").write_bytes((path / file).read_bytes())
        (path / "copy").replace(path / file)
        return receive(self, tensors)

    monkeypatch.setattr(Filling, "receive", replaced)
    for attempt in (lambda: models.load(path), lambda: model.update_weights_from_disk(path)):
        with pytest.raises(CheckpointError, match=rf"{file} changed since the checkpoint was opened"):
            attempt()
    assert (model.version, model.digests()) == (1, before)
    monkeypatch.undo()
    assert model.update_weights_from_disk(path).version == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_json_that_is_replaced_once_all_was_found_good_takes_no_model_out_of_service(backend, tmp_path, monkeypatch):
    """The first reading found the files good, the second has them in the old weights' place."""
    models, paths = {"jax": jax_models, "torch": torch_models}[backend], []
    for seed in range(2):
        paths.append(make_checkpoint("qwen3", tmp_path / str(seed), seed=seed, num_hidden_layers=2))
    model, expected, receive = models.load(paths[0]), models.load(paths[1]).digests(), Filling.receive
    readings = []

    def replaced(self, tensors):
        readings.append(1)
        if len(readings) == 2:
            (tmp_path / "copy").write_bytes((paths[1] / "config.json").read_bytes())
            (tmp_path / "copy").replace(paths[1] / "config.json")
        return receive(self, tensors)

    monkeypatch.setattr(Filling, "receive", replaced)
    model = model.update_weights_from_disk(paths[1], **({"donate": True} if backend == "jax" else {}))
    assert len(readings) == 2
    assert (model.version, model.digests()) == (2, expected)
    assert np.isfinite(np.asarray(model(np.arange(1, 9)[None]))).all()


def test_any_order_of_delivery_from_one_buffer_that_is_overwritten_gives_the_same_weights(life):
    rng = np.random.default_rng(0)

    def shuffled(checkpoint, delivered):
        tensors = [(name, array.copy()) for name, array in delivered]
        largest = max(array.nbytes for _, array in tensors)
        buffer = np.empty(largest, np.uint8)
        for index in rng.permutation(len(tensors)):
            name, array = tensors[index]
            view = buffer[: array.nbytes].view(array.dtype).reshape(array.shape)
            view[...] = array
            yield name, view
            buffer[...] = 0xFF

    for letter in "BA":
        with changed_deliveries(dropped_destinations, shuffled):
            life.reload(letter)


def dropped_destinations(checkpoint, delivered):
    """Delivers the same, leaving nothing where the loader asked for it to go."""
    for name, array in delivered:
        copy = array.copy()
        array.view(np.uint8)[...] = 0xFF
        yield name, copy


@pytest.mark.slow_unless("*-qwen3")
def test_twenty_times_there_and_back_is_where_it_was(life):
    digests, logits = life.model.digests(), life.bench.logits(life.model)
    process = psutil.Process()
    resident = []

    def there_and_back(model):
        for _ in range(20):
            model = model.update_weights_from_disk(life.bench.path("B")).update_weights_from_disk(life.bench.path("A"))
            assert model.digests() == digests
            assert same_bits(life.bench.logits(model), logits)
            if len(resident) % 5 == 4:
                gc.collect()
            resident.append(process.memory_info().rss)
        return model

    life.change("A", there_and_back, versions=40)  # checks addresses and compilations too
    weights = sum(info.num_bytes for info in life.bench.checkpoints["A"].tensors.values())
    assert max(resident[10:]) - max(resident[:10]) < max(8 * weights, 16 << 20)


@pytest.mark.parametrize("ids", [(0,), (0, 1)])
def test_an_id_given_by_position_is_a_type_error(ids):
    with pytest.raises(TypeError, match="positional"):
        weight_loader(np.zeros((2, 3)), np.ones(3), *ids)


def test_ids_given_by_keyword_choose_the_place():
    param = np.zeros((2, 2, 3))
    weight_loader(param, np.ones(3), shard_id=1, expert_id=0)
    assert param.sum(-1).tolist() == [[0, 3], [0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_embedding_that_never_arrives_is_named_also_where_the_head_is_shipped(backend, benches):
    life = LiveModel(benches.bench(backend, "qwen3-tied"), "A")
    assert "model.embed_tokens.weight" in refused(life, never_delivered)


@pytest.mark.parametrize("event", ["reload", "swap"])
def test_torch_refuses_to_run_a_mixture_until_a_good_load(event, benches, monkeypatch):
    life = LiveModel(benches.bench("torch", "qwen3"), "A")
    original = torch.Tensor.copy_
    copies = iter(range(100))

    def copy_(self, value, *args, **kwargs):
        if next(copies) == 1:
            raise RuntimeError("injected: the device went away")
        return original(self, value, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copy_)
        with pytest.raises(RuntimeError, match="injected"):
            life.reload("B") if event == "reload" else life.swap("B")
    assert life.model.version == 1
    for call in (life.model, life.model.prefill, life.model.generate):
        with pytest.raises(RuntimeError, match="refuses to run"):
            call(life.bench.prompt["input_ids"])
    with pytest.raises(ValueError, match="problem"):
        life.model.update_weights_from_disk(life.bench.scratch)  # a bad load does not end it
    with pytest.raises(RuntimeError, match="refuses to run"):
        life.model(**life.bench.prompt)
    life.reload("A")
    life.generate()


@pytest.mark.parametrize("failing", [0, 1, 7])
def test_jax_keeps_the_old_weights_when_a_device_fails_half_way(failing, benches, monkeypatch):
    life = LiveModel(benches.bench("jax", "qwen3"), "A")
    original = jax.device_put
    puts = iter(range(1000))

    def device_put(*args, **kwargs):
        if next(puts) == failing:
            raise RuntimeError("injected: out of memory")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", device_put)
        with pytest.raises(RuntimeError, match="injected"):
            life.reload("B")
    life.check()
    life.reload("B")


@pytest.mark.parametrize("place", ["jax.numpy", "device_put", "another device"])
def test_jax_compiles_nothing_whatever_array_a_swap_or_replace_is_given(place, benches):
    life = LiveModel(benches.bench("jax", "qwen3"), "A")
    put = {
        "jax.numpy": jnp.asarray,
        "device_put": lambda x: jax.device_put(x, jax.devices("cpu")[0]),
        "another device": lambda x: jax.device_put(x, jax.devices("cpu")[-1]),
    }[place]
    values = {half: put(life.bench.half(half, "B")) for half in ("embed", "head")}
    life.swap("B", values=values)
    if place == "another device":
        return  # replace takes the same shardings only
    weights = jax.tree.map(lambda x: put(np.asarray(x)), jax_models.load(life.bench.path("A")).weights)
    life.change("A", lambda model: model.replace(weights=weights))


def test_fault_injection_leaves_no_trace(life):
    original = Checkpoint.stream
    with changed_deliveries(lambda _, delivered: delivered):
        assert Checkpoint.stream is not original
        with pytest.raises(ValueError, match="problem"):
            life.model.update_weights_from_disk(life.bench.scratch)
    assert Checkpoint.stream is original
    assert list(life.bench.scratch.iterdir()) == []
