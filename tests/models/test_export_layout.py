"""An export is laid out as what it came from, byte for byte, on both backends."""

from __future__ import annotations

import pytest
from planted import PACKAGES
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

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
