"""A save is the model: to any mesh the same bits, killed in the middle nothing, damaged refused by name."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint.path import atomicity_defaults

import jax_models
from jax_models import orbax_files
from jax_models.weights import flatten
from loaders import CheckpointError, open_checkpoint
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint
from parity.zoo.adapters import make_adapter


def mesh_of(**axes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))])
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def bits_of(model) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in flatten(model.weights).items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint("qwen3-moe", tmp_path_factory.mktemp("checkpoint") / "it", num_experts=4)


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
    """A model on a mesh, at its second version, and where it was saved."""
    model = jax_models.load(checkpoint, mesh=mesh_of(expert=2, tensor=2))
    model = model.set_embed_and_head(np.asarray(model.get_embed_and_head()[0])[::-1].copy())
    directory = tmp_path_factory.mktemp("saves") / "second"
    model.save(directory)
    return model, directory


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


@pytest.mark.parametrize("axes", [{}, {"tensor": 3}, {"data": 2, "expert": 4}, {"expert": 2, "tensor": 2}])
def test_a_save_is_restored_to_any_mesh_bit_for_bit(axes, saved):
    model, directory = saved
    mesh = mesh_of(**axes) if axes else None
    restored = jax_models.restore(directory, mesh)
    assert bits_of(restored) == bits_of(model)
    assert restored.version == model.version == 2
    assert [event.kind for event in restored.events] == ["load", "swap", "restore"]
    assert (restored.config, restored.report, restored.dtype) == (model.config, model.report, model.dtype)
    expected = jax_models.load(model.report.checkpoint, mesh=mesh)
    shardings = {name: array.sharding for name, array in flatten(restored.weights).items()}
    assert shardings == {name: array.sharding for name, array in flatten(expected.weights).items()}
    assert restored.programs is expected.programs  # so that nothing is compiled


def test_a_restored_model_lives_on(saved, checkpoint, tmp_path):
    restored = jax_models.restore(saved[1])
    assert restored.update_weights_from_disk(checkpoint).digests() == jax_models.load(checkpoint).digests()
    again = jax_models.load(restored.export(tmp_path / "export"))
    assert bits_of(again) == bits_of(restored)
    restored.save(tmp_path / "third")
    assert jax_models.restore(tmp_path / "third", verify=False).events[-1].detail == str(tmp_path / "third")


def test_a_save_knows_what_it_was_loaded_from_by_a_relative_path(tmp_path, monkeypatch):
    make_checkpoint("qwen3_5-wrapped", tmp_path / "it")
    monkeypatch.chdir(tmp_path)
    jax_models.load("it", vision=False).save("save")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    exported = jax_models.restore(tmp_path / "save").export("again")  # with the tower, which is read from there
    assert open_checkpoint(exported).tensors.keys() == open_checkpoint(tmp_path / "it").tensors.keys()


KINDS = {
    "nvfp4": ("qwen3-moe", {"quantization": ZooQuantization(), **block_sizes("qwen3-moe")}, {}),
    "quantised while read": ("qwen3", block_sizes("qwen3"), {"quantize": "nvfp4"}),
    "a stage": ("qwen3", {}, {"stage": (1, 2)}),
    "a tower and a draft left out": ("qwen3_5-wrapped", {}, {"vision": False}),
    "experts one by one": ("qwen3_5-moe", {"experts": "per expert", "num_experts": 4}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow_unless("a stage", "a tower and a draft left out", "quantised while read", "experts one by one")
def test_so_is_every_kind_of_model(kind, tmp_path):
    name, sizes, options = KINDS[kind]
    path = make_checkpoint(name, tmp_path / "it", **sizes)
    model = jax_models.load(path, mesh=mesh_of(tensor=2), **options)
    model.save(tmp_path / "save")
    restored = jax_models.restore(tmp_path / "save")
    assert restored.digests() == model.digests()
    assert (restored.stage, restored.quantize, restored.kernels) == (model.stage, model.quantize, model.kernels)
    first, second = model.export(tmp_path / "a"), restored.export(tmp_path / "b")
    assert {file.name: file.read_bytes() for file in first.iterdir()} == {
        file.name: file.read_bytes() for file in second.iterdir()
    }
    seen, again = model.checkpoint, restored.checkpoint
    assert (again.tensors, again.config, again.metadata) == (seen.tensors, seen.config, seen.metadata)
    assert all(again.read(name).tobytes() == seen.read(name).tobytes() for name in seen.tensors)
    assert again.fingerprint() == seen.fingerprint()
    if kind == "a tower and a draft left out":
        shutil.rmtree(path)
        lost = [jax_models.restore(tmp_path / "save") for _ in range(3)]
        calls = [lambda: lost[0].export(tmp_path / "c"), lost[1].checkpoint.fingerprint]
        calls.append(lambda: lost[2].checkpoint.files.check(seen.files.identities))
        for call in calls:
            with pytest.raises(CheckpointError, match="cannot be opened"):
                call()
        lost[2].checkpoint.documents.check()  # there are none


def test_of_a_source_that_changed_since_nothing_is_exported(tmp_path):
    path = make_checkpoint("qwen3_5-wrapped", tmp_path / "it")
    model = jax_models.load(path, vision=False)
    model.save(tmp_path / "save")
    for file in make_checkpoint("qwen3_5-wrapped", tmp_path / "other", seed=1).glob("*.safetensors"):
        before = (path / file.name).stat()
        shutil.copy(file, path / file.name)  # of the same names and sizes
        os.utime(path / file.name, ns=(before.st_atime_ns, before.st_mtime_ns))
    restored = jax_models.restore(tmp_path / "save")
    assert bits_of(restored) == bits_of(model)
    with pytest.raises(CheckpointError, match="changed since"):
        restored.export(tmp_path / "export")  # with the tower, which would be another one's
    assert not (tmp_path / "export").exists()


def test_an_array_that_is_another_than_was_saved_is_named(saved, monkeypatch):
    """Whatever Orbax and the disk made of it."""
    name, read_arrays = "model.layers.1.mlp.up_proj.weight", orbax_files.read_arrays

    def altered(*args):
        arrays = read_arrays(*args)
        return arrays | {name: arrays[name].at[3, 5].add(1)}

    monkeypatch.setattr(orbax_files, "read_arrays", altered)
    with pytest.raises(CheckpointError) as caught:
        jax_models.restore(saved[1])
    (problem,) = caught.value.problems
    assert problem.startswith(f"tensor '{name}' is damaged: its digest is ")
    assert jax_models.restore(saved[1], verify=False).version == 2


def test_every_array_that_is_damaged_is_named(saved, copy):
    """Its files hold what they hold in an order of their own: what is damaged and can be read has another digest."""
    for data in copy.glob("weights/ocdbt.process_0/d/*"):
        raw = bytearray(data.read_bytes())
        raw[::16] = (byte ^ 0x10 for byte in raw[::16])
        data.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        jax_models.restore(copy)
    large = {name for name, array in flatten(saved[0].weights).items() if array.nbytes > 1000}  # others are beside them
    named = {problem.split("'")[1] for problem in caught.value.problems}
    assert named >= large
    assert len(named) == len(caught.value.problems)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("a digit of the document", "what it says of the model is damaged"),
        ("half a document", "it is no complete save"),
        ("no document", "it is no complete save"),
        ("another format", "its format is 7, expected 4"),
        ("no arrays", "its arrays cannot be read"),
    ],
)
def test_what_is_no_whole_save_is_refused(damage, expected, copy):
    document = copy / "model" / "metadata"
    text = document.read_text()
    match damage:
        case "a digit of the document":
            document.write_text(
                text.replace('"version": 2', '"version": 3', 1).replace('"version":2', '"version":3', 1)
            )
        case "half a document":
            document.write_text(text[: len(text) // 2])
        case "no document":
            shutil.rmtree(copy / "model")
        case "another format":
            document.write_text('{"format": 7}')
        case "no arrays":
            shutil.rmtree(copy / "weights")
    with pytest.raises(CheckpointError, match=expected):
        jax_models.restore(copy)


@pytest.mark.parametrize("axes", [{}, {"expert": 2, "tensor": 2}])
def test_arrays_that_are_cut_short_are_one_error_and_nothing_is_printed(axes, copy, capfd, caplog):
    """Of every array it had begun Orbax would print a traceback and the whole setup of TensorStore."""
    for data in copy.glob("weights/ocdbt.process_0/d/*"):
        data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"tensor 'model\.\S+' cannot be read: .*in OCDBT database"):
        jax_models.restore(copy, mesh_of(**axes) if axes else None)
    gc.collect()  # which tells of tasks that nobody asked how they went
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_where_one_array_fails_the_others_are_not_left_to_a_loop_that_has_ended(copy, caplog, monkeypatch):
    """The same, whichever of them is first."""
    ended = []

    async def another():
        await asyncio.sleep(0.3)
        ended.append(1)
        raise ValueError("another")

    async def failing(*_):
        asyncio.ensure_future(another())  # noqa: RUF006 - as Orbax, which drops what it began
        await asyncio.sleep(0)
        raise ValueError("one of them")

    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", failing)
    with pytest.raises(CheckpointError, match="cannot be read: one of them"):
        jax_models.restore(copy)
    gc.collect()
    assert ended
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_orbax_was_still_writing_is_refused_however_much_of_it_is_there(copy):
    unfinished = copy.rename(copy.with_name("copy.orbax-checkpoint-tmp"))
    with pytest.raises(CheckpointError, match="it was not finished"):
        jax_models.restore(unfinished)


def test_a_save_is_a_checkpoint_of_orbax_like_any_other(saved):
    model, directory = saved
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax, pytest.warns(UserWarning, match="Sharding info"):
        found = orbax.restore(directory)  # finds out for itself how to read it
    assert found["model"]["version"] == model.version
    assert {name: np.asarray(array).tobytes() for name, array in found["weights"].items()} == bits_of(model)


def test_large_arrays_lie_in_parts_so_that_nobody_reads_all_of_one_for_a_part(checkpoint, tmp_path, monkeypatch):
    """By default an array, or a shard of it, is one chunk, which each process reads and unpacks whole."""
    monkeypatch.setattr(orbax_files, "CHUNK_BYTES", 1 << 10)
    model = jax_models.load(checkpoint)
    model.save(tmp_path / "save")
    store = {"driver": "ocdbt", "base": f"file://{tmp_path / 'save' / orbax_files.WEIGHTS}"}
    found = {}
    for name, array in flatten(model.weights).items():
        stored = tensorstore.open({"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}).result()
        found[name] = stored.chunk_layout.read_chunk.shape
        assert np.prod(found[name]) * array.dtype.itemsize <= 1 << 10
    assert found["model.layers.0.mlp.experts.down_proj"][0] == 1
    assert found["model.norm.weight"] == model.weights["model"]["norm"]["weight"].shape
    assert bits_of(jax_models.restore(tmp_path / "save", mesh_of(expert=2, tensor=2))) == bits_of(model)


def test_nothing_that_is_there_is_written_over(saved):
    model, directory = saved
    before = {file: file.stat().st_mtime_ns for file in directory.rglob("*")}
    with pytest.raises(FileExistsError, match="Save to a new directory"):
        model.save(directory)
    assert {file: file.stat().st_mtime_ns for file in directory.rglob("*")} == before


@pytest.mark.parametrize(
    ("before", "winner"),
    [("begin", "second"), ("write_ours", "first"), ("finish", "first")],
    ids=["it had not begun", "it had begun", "it had written"],
)
def test_of_two_saves_to_one_directory_one_is_there_whole_and_the_other_is_told(
    before, winner, saved, checkpoint, tmp_path, monkeypatch
):
    """Orbax would remove what the first one writes, or give it the second one's arrays."""
    models = {"first": saved[0], "second": jax_models.load(checkpoint)}
    errors, together = {}, orbax_files.together

    def save(name):
        try:
            models[name].save(tmp_path / "save")
        except FileExistsError as error:
            errors[name] = str(error)

    def stepped(mesh, step):
        if step.__name__ == before:
            monkeypatch.setattr(orbax_files, "together", together)
            save("second")
        return together(mesh, step)

    monkeypatch.setattr(orbax_files, "together", stepped)
    save("first")
    assert "save exists now" in errors["first"] if winner == "second" else "by another" in errors["second"]
    assert len(errors) == 1
    assert jax_models.restore(tmp_path / "save").digests() == models[winner].digests()
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


@pytest.mark.parametrize("name", ["a\\b", "run\\x2d1/save", "v1.orbax-checkpoint-tmp", "of \udc80"])
def test_what_would_not_be_found_under_its_name_is_not_saved(name, saved, tmp_path):
    with pytest.raises(ValueError, match="cannot be saved to: .* Save to a directory of another name"):
        saved[0].save(f"{tmp_path}/{name}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("RESOURCE_EXHAUSTED: no space"), OSError(28, "No space left on device")])
def test_what_the_disk_refuses_is_an_os_error_that_says_where(error, saved, tmp_path, monkeypatch):
    async def refused(self):
        raise error

    monkeypatch.setattr(atomicity_defaults.get_default_temporary_path_class(epath.Path(tmp_path)), "finalize", refused)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "save"))):
        saved[0].save(tmp_path / "save")
    assert list(tmp_path.iterdir()) == []


def test_after_an_interrupt_one_may_save_there_again(saved, tmp_path, monkeypatch):
    """What goes on writing for a moment is waited for, and nothing of it is left."""
    late, together = [], orbax_files.together

    def interrupted(mesh, step):
        if step.__name__ != "write_ours":
            return together(mesh, step)
        directory = tmp_path / "save.orbax-checkpoint-tmp" / "weights"

        def write():
            time.sleep(0.2)
            directory.mkdir(exist_ok=True)
            (directory / "late").touch()

        late.append(threading.Thread(target=write))
        late[0].start()
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax_files, "together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved[0].save(tmp_path / "save")
    monkeypatch.undo()
    assert not late[0].is_alive()
    assert list(tmp_path.iterdir()) == []
    saved[0].save(tmp_path / "save")
    assert jax_models.restore(tmp_path / "save").digests() == saved[0].digests()


def test_while_a_failed_save_is_removed_no_other_one_begins(saved, tmp_path, monkeypatch):
    """What TensorStore still makes there is removed for a while, and would be the other one's."""
    told, remove = [], orbax_files._remove

    async def refused(self):
        raise OSError(28, "No space left on device")

    def removing(directory):
        with pytest.raises(FileExistsError, match="by another at this moment"):
            saved[0].save(tmp_path / "save")
        told.append(directory)
        monkeypatch.undo()
        remove(directory)

    monkeypatch.setattr(atomicity_defaults.get_default_temporary_path_class(epath.Path(tmp_path)), "finalize", refused)
    monkeypatch.setattr(orbax_files, "_remove", removing)
    with pytest.raises(OSError, match="No space"):
        saved[0].save(tmp_path / "save")
    assert told
    saved[0].save(tmp_path / "save")
    assert jax_models.restore(tmp_path / "save").digests() == saved[0].digests()


@pytest.mark.parametrize("limit", [100, 3000, 30_000])
@pytest.mark.slow_unless("30000")
def test_a_full_disk_is_an_error_that_leaves_nothing_behind(limit, checkpoint, tmp_path):
    program = Path(__file__).with_name("full_disk.py")
    command = [sys.executable, str(program), str(checkpoint), str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "File too large" in done.stdout


def test_adapters_are_not_lost_in_silence(checkpoint, tmp_path):
    model = jax_models.load(checkpoint)
    adapted = model.attach_lora(make_adapter(checkpoint, tmp_path / "adapter"), "a")
    with pytest.raises(ValueError, match="'a' would be lost. Save the model that detach_lora returns"):
        adapted.save(tmp_path / "save")
    with pytest.raises(ValueError, match="Save the model that unmerge_lora and then detach_lora returns"):
        adapted.merge_lora("a").save(tmp_path / "save")
    adapted.detach_lora("a").save(tmp_path / "save")
    assert jax_models.restore(tmp_path / "save").digests() == model.digests()


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.9, 0.97, 0.995])
@pytest.mark.slow_unless("0.6")
def test_killed_in_the_middle_nothing_saved_is_lost_and_nothing_half_is_taken(fraction, checkpoint, tmp_path):
    program = Path(__file__).with_name("kill_saving.py")
    command = [sys.executable, str(program), str(checkpoint), str(tmp_path), str(fraction)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "complete\n"), done.stderr
    expected = jax_models.load(checkpoint).digests()
    for name in ("warm", "complete"):
        assert jax_models.restore(tmp_path / name).digests() == expected
    left = [path for path in tmp_path.iterdir() if path.name not in ("warm", "complete", "cut")]
    assert left or fraction < 0.6 or (tmp_path / "cut").exists()  # before that digests are computed
    for path in left:
        with pytest.raises(CheckpointError, match="no complete save"):
            jax_models.restore(path)
    if not (tmp_path / "cut").exists():
        jax_models.restore(tmp_path / "complete").save(tmp_path / "cut")  # leftovers are in nobody's way
    assert jax_models.restore(tmp_path / "cut").digests() == expected


@pytest.mark.parametrize("package", ["s3fs", "gcsfs"])
def test_an_address_without_the_package_for_it_says_which(package, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    where = {"s3fs": "s3://bucket/save", "gcsfs": "gs://bucket/save"}[package]
    with pytest.raises(CheckpointError, match=f"takes a package that is not installed: .*{package}"):
        jax_models.restore(where)
    with pytest.raises(ValueError, match=f"cannot be saved to: .*{package}.* Install that"):
        jax_models.load(checkpoint).save(where)
