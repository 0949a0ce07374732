"""An export is laid out as what it came from, byte for byte, on both backends."""

from __future__ import annotations

import itertools

import pytest
from planted import PACKAGES
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from loaders import Checkpoint, open_checkpoint
from loaders.digest import digests
from parity.zoo import make_checkpoint


@pytest.mark.parametrize("package", PACKAGES)
def test_files_and_what_they_say_of_themselves_are_as_they_were(package, tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "it", num_hidden_layers=2, dtype="F32", max_file_bytes=1 << 15)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 2
    for step, file in enumerate(files[1:]):  # the first says nothing but its format
        save_file(load_file(file), file, metadata={"format": "pt", "step": str(step)})
    model = PACKAGES[package].load(path)
    exported = model.export(tmp_path / "exported")
    for file in files:
        with safe_open(file, "numpy") as ours, safe_open(exported / file.name, "numpy") as theirs:
            assert theirs.metadata() == ours.metadata()
            assert theirs.keys() == ours.keys()
            assert all(theirs.get_tensor(name).tobytes() == ours.get_tensor(name).tobytes() for name in ours.keys())  # noqa: SIM118
    assert {file.name for file in exported.iterdir()} == {file.name for file in path.iterdir()}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("room", [1, 20_000, 1 << 30])
def test_what_was_left_out_is_copied_in_the_order_of_the_new_files(package, room, tmp_path, monkeypatch):
    """Wider dtypes come first there, wherever they lay; no more waits for its turn than there is room for."""
    path = make_checkpoint("qwen3_5-wrapped", tmp_path / "it", max_file_bytes=1 << 16, dtype="BF16")
    for file in path.glob("*.safetensors"):
        found = load_file(file)
        wide = [name for name in sorted(found) if ".visual." in name][::3]
        save_file(found | {name: found[name].astype("float32") for name in wide}, file, metadata={"format": "pt"})
    model = PACKAGES[package].load(path, vision=False)
    assert len({model.checkpoint.tensors[name].file for name in model.report.left_out}) > 1
    monkeypatch.setattr("loaders.writing.export.DEFAULT_BUDGET_BYTES", room)
    lots, stream = [], Checkpoint.stream

    def noted(self, *args, **options):
        lots.extend(options["lots"])
        return stream(self, *args, **options)

    monkeypatch.setattr(Checkpoint, "stream", noted)
    exported = model.export(tmp_path / "exported")
    monkeypatch.undo()
    assert digests(open_checkpoint(exported).stream()) == digests(open_checkpoint(path).stream())
    sizes = [[model.checkpoint.tensors[name].num_bytes for name in lot] for lot in lots]
    assert sorted(name for lot in lots for name in lot) == sorted(model.report.left_out)
    assert all(sum(lot) <= room or len(lot) == 1 for lot in sizes)
    assert all(sum(lot) + following[0] > room for lot, following in itertools.pairwise(sizes))
