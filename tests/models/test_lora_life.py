"""What becomes of adapters in copies, graphs, on meshes, over quantised weights and in the command."""

from __future__ import annotations

import copy
import importlib
import pickle
from contextlib import suppress

import numpy as np
import pytest
import torch
from interrupts import interrupt_at, interrupting

import jax_models
import torch_models
from loaders import CheckpointError, open_checkpoint
from loaders.adapters import merging
from loaders.adapters.opening import open_adapter
from parity import cli
from parity.backends import open_backend
from parity.compare import compare
from parity.oracle import oracle_forward
from parity.record import record
from parity.record_oracle import record_oracle
from parity.trace import Trace
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts
from parity.zoo.adapters import ATTENTION, DENSE, EXPERTS, TABLES, make_adapter
from torch_models.census import pointer_census
from torch_models.layers.lora import Wrapper as TorchWrapper

BACKENDS = ("torch", "jax")
OPTIONS = {
    "qwen3": {"targets": (*DENSE, *TABLES), "whole": ("norm",)},
    "qwen3-tied": {"targets": ("q_proj", "embed_tokens"), "whole": ("lm_head",)},
    "qwen3-moe": {"targets": ATTENTION, "parameters": (*EXPERTS, "mlp.gate.weight")},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoint and two adapters of a zoo model, by name."""
    root = tmp_path_factory.mktemp("lora-life")
    found = {}

    def of(zoo, **options):
        key = (zoo, *sorted(options.items()))
        if key not in found:
            here = root / str(len(found))
            path = make_checkpoint(zoo, here / "base", num_hidden_layers=2, **options)
            adapters = [make_adapter(path, here / str(seed), seed=seed, **OPTIONS[zoo]) for seed in range(2)]
            found[key] = path, *adapters
        return found[key]

    return of


def load(side, path, **options):
    return importlib.import_module(f"{side}_models").load(path, **options)


def batch(path, **options):
    return prompts(open_checkpoint(path).config, **({"rows": 3, "tokens": 16} | options))


@pytest.mark.parametrize("zoo", OPTIONS)
def test_names_and_bits_of_the_base_are_the_same_under_adapters_and_after(made, zoo, tmp_path):
    path, adapter, other = made(zoo)
    model = torch_models.load(path)
    given = batch(path)
    names, digests, logits = list(dict(model.named_parameters())), model.digests(), model(**given)
    state = list(model.state_dict())
    addresses = {name: param.data_ptr() for name, param in model.named_parameters()}
    model.attach_lora(adapter).attach_lora(other, "other")
    assert (list(dict(model.named_parameters())), list(model.state_dict())) == (names, state)
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == addresses
    assert model.digests() == digests
    exported = open_checkpoint(model.export(tmp_path / "exported"))
    assert {name: exported.read(name).tobytes() for name in exported.tensors} == {
        name: open_checkpoint(path).read(name).tobytes() for name in exported.tensors
    }
    model.detach_lora("other").detach_lora()
    assert not any(isinstance(module, TorchWrapper) for module in model.modules())
    assert torch.equal(model(**given), logits)
    assert {name for name in pointer_census(model) if "lora" in name} == set()


@pytest.mark.parametrize("zoo", OPTIONS)
def test_a_copy_of_a_model_has_adapters_of_its_own(made, zoo):
    path, adapter, other = made(zoo)
    model, given = torch_models.load(path).attach_lora(adapter), batch(path)
    expected = model(**given)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**given), expected)
    twin.attach_lora(other)
    assert not torch.equal(twin(**given), expected)
    assert torch.equal(model(**given), expected)
    assert torch.equal(twin.detach_lora()(**given), torch_models.load(path)(**given))
    assert torch.equal(model(**given), expected)


def test_a_tied_head_is_the_embedding_under_adapters(made):
    path, adapter, _ = made("qwen3-tied")
    model = torch_models.load(path).attach_lora(adapter)
    assert model.lm_head is model.model.embed_tokens
    embed, head = model.get_embed_and_head()
    assert embed is head
    with pytest.raises(ValueError, match="embedding and head are one table"):
        model.merge_lora()


@pytest.mark.parametrize("side", BACKENDS)
def test_each_row_of_a_generated_batch_is_as_if_it_were_alone(made, side):
    path, adapter, other = made("qwen3")
    model = load(side, path).attach_lora(adapter, "a").attach_lora(other, "b")
    given = batch(path, padding="left")
    options = {"max_new_tokens": 6, "ignore_eos": True}
    mixed = np.asarray(model.generate(**given, **options, adapter=["a", None, "b"]))
    for row, name in enumerate(("a", [None] * 3, "b")):
        assert mixed[row].tolist() == np.asarray(model.generate(**given, **options, adapter=name))[row].tolist()
    assert len({tuple(row) for row in mixed.tolist()}) == 3


def test_a_graph_survives_a_switch_and_is_captured_anew_for_more_room(made):
    path, adapter, other = made("qwen3")
    model = torch_models.load(path)
    given, options = batch(path, padding="left"), {"max_new_tokens": 5, "ignore_eos": True}
    model.generate(**given, **options, graphs=True)
    model.attach_lora(adapter, "a").attach_lora(other, "b")
    captured = model.graphs.num_captures
    for rows in (["a", None, "b"], "a", "b", [None, "b", None]):
        eager = model.generate(**given, **options, adapter=rows)
        assert torch.equal(model.generate(**given, **options, adapter=rows, graphs=True), eager)
    model.attach_lora(other, "a").detach_lora("b").attach_lora(adapter, "c")
    for rows in ("a", "c"):
        eager = model.generate(**given, **options, adapter=rows)
        assert torch.equal(model.generate(**given, **options, adapter=rows, graphs=True), eager)
    assert model.graphs.num_captures == captured + 1
    model.attach_lora(make_adapter(path, path.parent / "layers", targets=ATTENTION), "c").merge_lora("c")
    assert torch.equal(model.generate(**given, **options, graphs=True), model.generate(**given, **options))
    model.unmerge_lora()
    assert model.graphs.num_captures == captured + 1
    _, batch_before = model.graphs.prefill(**given)
    model.attach_lora(adapter, "a")
    with pytest.raises(ValueError, match="adapters"):
        batch_before.decode([1, 2, 3])


@pytest.mark.parametrize("side", BACKENDS)
@pytest.mark.parametrize("kind", ["bf16", "nvfp4"])
def test_over_bfloat16_and_nvfp4_weights_the_ruler_passes(made, side, kind, tmp_path):
    quantization = ZooQuantization(activations=False, unify=False) if kind == "nvfp4" else None
    options = {"quantization": quantization, **block_sizes("qwen3")} if quantization else {}
    path, adapter, _ = made("qwen3", dtype="BF16", **options)
    checkpoint, given = open_checkpoint(path), batch(path, tokens=32)
    peer = "jax" if side == "torch" else "torch"
    traces = [record(path, open_backend(name), given, dtype="bfloat16", adapter=adapter) for name in (side, peer)]
    oracle = record_oracle(checkpoint, given, adapter=adapter)
    found = compare(*traces, oracle)
    assert found.verdict == "PASS", found.summary
    plain = record(path, open_backend(side), given, dtype="bfloat16")
    assert compare(plain, traces[1], oracle).verdict == "INVALID"  # two runs of different things
    assert compare(Trace(plain.tensors, traces[0].meta), traces[1], oracle).verdict == "FAIL"  # attached, and not run


def test_over_nvfp4_experts_both_backends_say_what_the_oracle_says(made):
    quantization = ZooQuantization(activations=False, unify=False)
    path, adapter, _ = made("qwen3-moe", quantization=quantization, **block_sizes("qwen3-moe"))
    checkpoint, given = open_checkpoint(path), batch(path, padding=None)
    expected = oracle_forward(checkpoint, **given, adapter=open_adapter(adapter, checkpoint.config))["logits"]
    for side in BACKENDS:
        found = np.asarray(load(side, path, dtype="float32").attach_lora(adapter)(**given))
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) <= 2e-5, side


@pytest.mark.parametrize("zoo", ["qwen3", pytest.param("qwen3-moe", marks=pytest.mark.slow)])
def test_on_a_mesh_adapters_say_what_they_say_on_one_device(made, zoo):
    import jax

    path, adapter, other = made(zoo)
    mesh = jax.make_mesh(
        (1, 1, 3) if zoo == "qwen3" else (1, 1, 2),
        ("data", "expert", "tensor"),
        devices=jax.devices()[: 3 if zoo == "qwen3" else 2],
    )
    given, rows = batch(path), ["a", None, "b"]
    found = []
    for options in ({}, {"mesh": mesh}):
        model = jax_models.load(path, **options).attach_lora(adapter, "a").attach_lora(other, "b")
        found.append(np.asarray(model(**given, adapter=rows)))
    real = given["attention_mask"] == 1
    np.testing.assert_allclose(found[1][real], found[0][real], rtol=2e-4, atol=2e-4)
    stacks = model.room.stacks
    if zoo == "qwen3":
        assert stacks["model.embed_tokens"].a.sharding.is_fully_replicated
        assert stacks["model.embed_tokens"].b.sharding.is_fully_replicated
        assert stacks["model.layers.0.self_attn.q_proj"].b.sharding.spec[1] == "tensor"


def of_one_layout(path, directory):
    """Four adapters of the same targets, with ranks of one bucket, by name."""
    ranks = {"a": 4, "b": 7, "c": 1, "d": 8}
    made = {name: directory / name for name in ranks}
    for seed, (name, rank) in enumerate(ranks.items()):
        make_adapter(path, made[name], seed=seed, rank=rank, targets=("q_proj", "down_proj", *TABLES))
    return made


def test_one_program_serves_four_adapters_of_a_layout_from_the_first_on(made, tmp_path):
    path, _, _ = made("qwen3")
    model, given = jax_models.load(path), batch(path)
    model(**given)
    before = model.programs.forward._cache_size()
    adapters = of_one_layout(path, tmp_path)
    for name, adapter in adapters.items():
        model = model.attach_lora(adapter, name)
        model(**given)
    for change in (
        lambda model: model.attach_lora(adapters["b"], "a"),
        lambda model: model.detach_lora("b").detach_lora("c"),
        lambda model: model.attach_lora(adapters["c"], "e"),
    ):
        model = change(model)
        for rows in (None, "a", ["a", None, "d"]):
            model(**given, adapter=rows)
    assert model.programs.forward._cache_size() == before + 1


def test_a_graph_goes_on_when_more_adapters_of_its_layout_come(made, tmp_path):
    path, _, _ = made("qwen3")
    model, given, captured = torch_models.load(path), batch(path, padding="left"), set()
    for name, adapter in of_one_layout(path, tmp_path).items():
        model.attach_lora(adapter, name)
        options = {"max_new_tokens": 4, "ignore_eos": True}
        assert torch.equal(model.generate(**given, **options, graphs=True), model.generate(**given, **options))
        captured.add(model.graphs.num_captures)
    assert captured == {1}


@pytest.mark.parametrize("side", BACKENDS)
def test_a_failed_attach_leaves_everything_as_it_was(made, side, tmp_path, monkeypatch):
    path, adapter, other = made("qwen3")
    model = load(side, path).attach_lora(adapter)
    given = batch(path)
    logits, version = np.asarray(model(**given)), model.version
    with pytest.raises(CheckpointError):
        model.attach_lora(tmp_path)
    if side == "torch":
        module = importlib.import_module("torch_models.adapter_room")
        put, count = module._put, iter(range(1000))

        def fails(*args):
            if next(count) == 5:
                raise RuntimeError("the device is gone")
            put(*args)

        monkeypatch.setattr(module, "_put", fails)
        with pytest.raises(RuntimeError, match="the device is gone"):
            model.attach_lora(other)
    assert model.version == version
    np.testing.assert_array_equal(np.asarray(model(**given)), logits)


def test_after_an_attach_that_failed_caches_of_before_go_on_and_none_of_meanwhile_ever_does(made, monkeypatch):
    path, adapter, other = made("qwen3")
    model = load("torch", path).attach_lora(adapter)
    ids, meanwhile = [[3, 14, 15]], []
    _, before = model.prefill(ids)
    module = importlib.import_module("torch_models.adapter_room")
    put = module._put

    def fails(*args):
        put(*args)
        if not meanwhile:  # as another thread would
            meanwhile.append(model.prefill(ids)[1])
            raise RuntimeError("the device is busy")

    monkeypatch.setattr(module, "_put", fails)
    with pytest.raises(RuntimeError, match="the device is busy"):
        model.attach_lora(other)
    monkeypatch.undo()
    model.decode([7], before)
    model.attach_lora(other)
    for cache in (before, *meanwhile):
        with pytest.raises(ValueError, match="other weights or adapters"):
            model.decode([7], cache)


def test_where_a_failed_attach_cannot_be_undone_either_no_adapter_is_left(made, monkeypatch):
    path, adapter, other = made("qwen3")
    model = load("torch", path)
    given = batch(path)
    base = np.asarray(model(**given)).copy()
    model.attach_lora(adapter)
    logits, version = np.asarray(model(**given)).copy(), model.version
    module = importlib.import_module("torch_models.adapter_room")
    put, count = module._put, iter(range(1000))

    def fails(*args):
        if next(count) >= 5:
            raise RuntimeError("the device is gone")
        put(*args)

    monkeypatch.setattr(module, "_put", fails)
    with pytest.raises(RuntimeError, match=r"Nor could adapters be brought back: .* Attach 'default' again"):
        model.attach_lora(other)
    monkeypatch.undo()
    np.testing.assert_array_equal(np.asarray(model(**given)), base)
    assert (model.version, model.events[-1].kind) == (version + 1, "detach")
    with pytest.raises(ValueError, match="no adapter is called 'default'. Attached: none"):
        model(**given, adapter="default")
    np.testing.assert_array_equal(np.asarray(model.attach_lora(adapter)(**given)), logits)


@pytest.mark.parametrize("side", BACKENDS)
def test_a_merge_that_fails_half_way_leaves_the_weights_as_they_were_wherever_they_came_from(made, side, monkeypatch):
    path, adapter, _ = made("qwen3")
    model = load(side, path).attach_lora(adapter)
    given, before, version = batch(path), model.digests(), model.version
    logits = np.asarray(model(**given)).copy()
    whole, count = merging.merged, iter(range(1000))

    def fails(*args):
        if next(count) == 2:
            raise MemoryError("no room")
        return whole(*args)

    monkeypatch.setattr(merging, "merged", fails)
    with pytest.raises(MemoryError, match="no room"):
        model.merge_lora()
    monkeypatch.undo()
    assert (model.version, model.digests()) == (version, before)
    np.testing.assert_array_equal(np.asarray(model(**given)), logits)
    merged = model.merge_lora()
    assert merged.digests() != before
    assert merged.unmerge_lora().digests() == before


def test_a_merge_that_can_neither_be_finished_nor_undone_can_be_undone_later(made, monkeypatch):
    path, adapter, _ = made("qwen3")
    model = load("torch", path).attach_lora(adapter)
    before = model.digests()
    staging = importlib.import_module("torch_models.staging").DeviceStaging
    send, count = staging.send, iter(range(1000))

    def fails(self, *args):
        if next(count) >= 2:
            raise RuntimeError("the device is gone")
        send(self, *args)

    monkeypatch.setattr(staging, "send", fails)
    with pytest.raises(RuntimeError, match="the device is gone"):
        model.merge_lora()
    with pytest.raises(RuntimeError, match="refuses to run: .* Call unmerge_lora again"):
        model(**batch(path))
    monkeypatch.undo()
    assert model.unmerge_lora().digests() == before


@pytest.mark.parametrize("side", BACKENDS)
def test_a_bad_name_is_told_before_what_is_merged(made, side):
    path, adapter, _ = made("qwen3")
    with pytest.raises(ValueError, match="name is '', expected the adapter's name"):
        load(side, path).attach_lora(adapter).merge_lora().attach_lora(adapter, "")


def test_a_torch_model_under_adapters_is_pickled_with_them(made):
    path, adapter, other = made("qwen3")
    model = load("torch", path).attach_lora(adapter, "a")
    given = batch(path)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**given), model(**given))
    assert again.attach_lora(other, "b").detach_lora("a").detach_lora("b").digests() == model.digests()
    assert list(model.adapters) == ["a"]


@pytest.mark.parametrize("side", BACKENDS)
@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda model, given: model(**given, adapter="a"), "no adapter is called 'a'. Attached: none"),
        (lambda model, given: model(**given, adapter=5), "adapter has 5, expected a name, or for each row a name or"),
        (lambda model, given: model(**given, adapter=[None, b"a", None]), "adapter has b'a', expected a name"),
        (lambda model, given: model(**given, adapter=np.asarray("a")), r"adapter has array\('a'.*, expected a name"),
        (lambda model, given: model.attach_lora("nowhere", ""), "name is '', expected the adapter's name"),
        (lambda model, given: model.attach_lora("nowhere", None), "name is None, expected the adapter's name"),
        (lambda model, given: model.detach_lora(), "no adapter is called 'default'"),
        (lambda model, given: model.merge_lora(), "no adapter is called 'default'"),
        (lambda model, given: model.unmerge_lora(), "no adapter is merged"),
    ],
    ids=["run", "number", "bytes", "no rows", "empty", "nameless", "detach", "merge", "unmerge"],
)
def test_what_cannot_be_meant_is_refused(made, side, act, told):
    path, _, _ = made("qwen3")
    with pytest.raises(ValueError, match=told):
        act(load(side, path), batch(path))


def test_the_command_records_and_generates_with_adapters(made, tmp_path, capsys):
    path, adapter, other = made("qwen3")
    assert cli.main(["record", str(path), "--backend", "torch", "--adapter", str(adapter), "-o", f"{tmp_path}/t"]) == 0
    trace = Trace.load(tmp_path / "t")
    assert [event["kind"] for event in trace.meta["events"]] == ["load", "attach"]
    assert cli.main(["record", str(path), "--backend", "oracle", "--adapter", str(adapter), "-o", f"{tmp_path}/o"]) == 0
    assert compare(trace, trace, Trace.load(tmp_path / "o")).verdict == "PASS"
    capsys.readouterr()
    ids = ["--prompt-ids", "3,14,15", "--prompt-ids", "3,14,15", "--prompt-ids", "3,14,15"]
    adapters = ["--adapter", f"a={adapter}", "--adapter", f"b={other}"]
    rows = ["--row-adapter", "a", "--row-adapter", "none", "--row-adapter", "b"]
    assert cli.main(["generate", str(path), "--backend", "torch", *ids, *adapters, *rows]) == 0
    lines = capsys.readouterr().out.split()
    assert len(set(lines)) == 3


@pytest.mark.parametrize("event", ["attach", "replace", "detach"])
def test_an_interrupt_at_any_line_of_an_event_in_torch_leaves_the_adapters_of_before_or_after(event, tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "base", num_hidden_layers=1)
    a, b = (make_adapter(path, tmp_path / str(seed), seed=seed, targets=("q_proj",)) for seed in range(2))
    ids = [[3, 14, 15]]
    changes = {
        "attach": lambda model: model.attach_lora(b, "b"),
        "replace": lambda model: model.attach_lora(b, "a"),
        "detach": lambda model: model.detach_lora("a"),
    }

    def fresh():
        model = torch_models.load(path).attach_lora(a, "a")
        return model if event == "attach" else model.attach_lora(b, "c")

    def said(model):
        return {name: model(ids, adapter=name).numpy().tobytes() for name in (None, *sorted(model.adapters))}

    before, after = said(fresh()), said(changes[event](fresh()))
    model = fresh()
    with interrupting("torch_models/adapters.py", lambda number: None) as lines:
        changes[event](model)
    found = []
    for line in range(1, lines[0] + 1):
        model = fresh()
        token, cache = [7], model.prefill(ids, adapter="a")[1]
        with suppress(KeyboardInterrupt), interrupting("torch_models/adapters.py", interrupt_at(line)):
            changes[event](model)
        found.append(said(model))
        assert found[-1] in (before, after), line
        if found[-1] == after:
            with pytest.raises(ValueError, match="other weights or adapters"):
                model.decode(token, cache)
    assert before in found
    assert after in found


def test_an_interrupt_while_torch_changes_the_room_leaves_the_adapters_from_before(tmp_path, monkeypatch):
    from torch_models.adapter_room import Room

    path = make_checkpoint("qwen3", tmp_path / "base")
    adapters = [make_adapter(path, tmp_path / str(rank), rank=rank, seed=rank) for rank in (4, 20)]
    model = torch_models.load(path).attach_lora(adapters[0], "a")
    ids = [[3, 14, 15]]
    expected = model(ids).clone()

    def half(self):
        for parent, leaf, _, wrapper in self.stands[:5]:
            parent._modules[leaf] = wrapper
        raise KeyboardInterrupt

    for name in ("install", "remove"):
        whole, calls = getattr(Room, name), []

        def once(self, whole=whole, calls=calls):
            calls.append(self)
            return half(self) if len(calls) == 1 else whole(self)

        monkeypatch.setattr(Room, name, once)
        with pytest.raises(KeyboardInterrupt):
            model.attach_lora(adapters[1], "b")
        monkeypatch.undo()
        assert list(model.adapters) == ["a"]
        assert model.version == 2
        assert torch.equal(model(ids), expected)
    other = torch_models.load(path).attach_lora(adapters[0], "a").attach_lora(adapters[1], "b")
    assert torch.equal(model.attach_lora(adapters[1], "b")(ids), other(ids))
