"""What ``bench_load.py`` compares: loaders of ours, through the front door, and of others, each with its destinations.

Every one returns what is to be timed; that returns all arrays there are at the end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from loaders.config import config_from_json
from loaders.dtypes import to_numpy
from loaders.expand import expand
from loaders.families import family_module
from loaders.reading.memory import aligned_empty
from loaders.reading.place import place_of
from loaders.reading.plan import plan_load
from loaders.stage import Stage
from loaders.writing.writer import TensorType, write_checkpoint

Run = Callable[[], list[np.ndarray]]
PIECE = 8 << 20
RUNAI = {"RUNAI_STREAMER_CONCURRENCY": "4"}
RING = {"RUNAI_STREAMER_MEMORY_LIMIT": str(1 << 30)}
BUFFERED = {"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}


def write_noise(directory: Path, document: dict[str, Any], *, num_files: int) -> Path:
    """A checkpoint of a config.json in bfloat16, quick to make and of no use but to be read."""
    config, problems = config_from_json(document)
    assert config is not None, problems
    specs = expand(family_module(config.architecture).RULES, config)
    plan = {placement.tensor: TensorType("BF16", spec.tensor_shape) for spec in specs for placement in spec.placements}
    total = sum(2 * int(np.prod(kind.shape)) for kind in plan.values())
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2**14, 1 << 22, dtype=np.uint16)

    def read(name: str) -> np.ndarray:
        shape = plan[name].shape
        return np.resize(np.roll(noise, rng.integers(1 << 22)), shape).view(ml_dtypes.bfloat16)

    return write_checkpoint(directory, plan, read, config=document, max_file_bytes=int(total / num_files + 4e7))


class Case:
    """A checkpoint to be loaded, as a child process sees it."""

    def __init__(self, path: str) -> None:
        from loaders import open_checkpoint

        self.path = path
        self.files = sorted(str(file) for file in Path(path).glob("*.safetensors"))
        self.checkpoint = open_checkpoint(path)

    def size(self) -> tuple[int, float]:
        return len(self.checkpoint.tensors), self.checkpoint.num_bytes / 1e9

    def destinations(self) -> dict[str, np.ndarray]:
        """Resident memory of the kind that a load makes, for every tensor: experts lie in stacks."""
        plan = plan_load(self.checkpoint, Stage())
        params = {spec.name: aligned_empty(spec.shape, to_numpy(plan.dtypes[spec.name])) for spec in plan.specs}
        for array in params.values():
            array.view(np.uint8).reshape(-1)[:] = 0xA5
        return {name: place_of(params[spec.name], spec, source) for name, (spec, source) in plan.targets.items()}


def limit(case: Case) -> Run:
    """Two threads read the files into warm buffers and keep nothing."""
    local = threading.local()

    def read(piece: tuple[int, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = np.ones(PIECE, np.uint8)
        os.preadv(piece[0], [local.buffer], piece[1])

    def run() -> list[np.ndarray]:
        descriptors = [os.open(file, os.O_RDONLY) for file in case.files]
        pieces = [(one, start) for one in descriptors for start in range(0, os.fstat(one).st_size, PIECE)]
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(read, pieces):
                pass
        return []

    return run


def reading_alone(case: Case, *, are_resident: bool) -> Run:
    """Two threads read the files into memory of the kind that a load makes, and do nothing else."""
    descriptors = [os.open(file, os.O_RDONLY) for file in case.files]

    def places() -> list[np.ndarray]:
        return [aligned_empty((os.fstat(one).st_size,), np.dtype(np.uint8)) for one in descriptors]

    def read(one: tuple[int, np.ndarray, int]) -> None:
        os.preadv(one[0], [one[1][one[2] : one[2] + 4 * PIECE]], one[2])

    resident = places() if are_resident else []
    for array in resident:
        array[:] = 0xA5

    def run() -> list[np.ndarray]:
        files = zip(descriptors, resident or places(), strict=True)
        reads = [(one, array, start) for one, array in files for start in range(0, array.size, 4 * PIECE)]
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(read, reads):
                pass
        return []

    return run


def reload_ours(case: Case, scheme: str = "") -> Run:
    from loaders import open_checkpoint

    places, checkpoint = case.destinations(), open_checkpoint(f"{scheme}{case.path}")

    def run() -> list[np.ndarray]:
        for _ in checkpoint.stream(into=places.__getitem__):
            pass
        return list(places.values())

    return run


def reload_torch_model(case: Case) -> Run:
    import torch_models
    from torch_models.storage import host_view

    model = torch_models.load(case.path)

    def run() -> list[np.ndarray]:
        model.update_weights_from_disk(case.path)
        return [host_view(param) for param in model.parameters()]

    return run


def reload_jax_model(case: Case, **options: bool) -> Run:
    import jax

    import jax_models

    model = jax_models.load(case.path)

    def run() -> list[np.ndarray]:
        return [
            np.asarray(leaf) for leaf in jax.tree.leaves(model.update_weights_from_disk(case.path, **options).weights)
        ]

    return run


def reload_safetensors(case: Case, backend: str, threads: int = 1) -> Run:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    places = case.destinations()
    tensors = {name: torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) for name, array in places.items()}

    def run() -> list[np.ndarray]:
        for file in case.files:
            if backend == "mmap":
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        tensors[name].copy_(opened.get_tensor(name))
            else:
                for name, tensor in load_file(file, backend=backend).items():
                    tensors[name].copy_(tensor)
        return list(places.values())

    return run


def reload_runai(case: Case, **strategy: str) -> Run:
    import torch

    os.environ.update(RUNAI | RING | strategy)
    from runai_model_streamer import SafetensorsStreamer

    torch.set_num_threads(1)  # two wait for each other where there are neighbours
    places = case.destinations()
    tensors = {name: torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) for name, array in places.items()}

    def run() -> list[np.ndarray]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(case.files, owned=False)
            for name, tensor in streamer.get_tensors():
                tensors[name].copy_(tensor)
        return list(places.values())

    return run


def load_torch(case: Case) -> Run:
    import torch_models
    from torch_models.storage import host_view

    return lambda: [host_view(param) for param in torch_models.load(case.path).parameters()]


def load_jax(case: Case) -> Run:
    import jax

    import jax_models

    jax.devices()
    return lambda: [
        np.asarray(leaf) for leaf in jax.block_until_ready(jax.tree.leaves(jax_models.load(case.path).weights))
    ]


def load_safetensors(case: Case, how: str) -> Run:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    torch.set_num_threads(1)

    def run() -> list[np.ndarray]:
        found: list[torch.Tensor] = []
        for file in case.files:
            if how == "pread":
                found += load_file(file, backend="pread").values()
                continue
            with safe_open(file, "pt") as opened:
                found += [opened.get_tensor(name).clone() for name in opened.keys()]  # noqa: SIM118
        return [tensor.view(torch.uint16).numpy() for tensor in found]

    return run


def load_safetensors_jax(case: Case, how: str) -> Run:
    import jax
    from safetensors.flax import load_file
    from safetensors.numpy import load_file as load_numpy

    jax.devices()

    def run() -> list[np.ndarray]:
        found: list[jax.Array] = []
        for file in case.files:
            if how == "flax":
                found += load_file(file).values()
            else:
                found += [jax.device_put(array) for array in load_numpy(file, backend="pread").values()]
        return [np.asarray(array) for array in jax.block_until_ready(found)]

    return run


def load_runai(case: Case, *, jax_arrays: bool = False, **strategy: str) -> Run:
    import jax
    import torch

    os.environ.update(RUNAI | strategy)
    from runai_model_streamer import SafetensorsStreamer

    jax.devices()

    def run() -> list[np.ndarray]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(case.files)
            found = [jax.dlpack.from_dlpack(x) if jax_arrays else x for _, x in streamer.get_tensors()]
            if jax_arrays:
                return [np.asarray(array) for array in jax.block_until_ready(found)]
            return [tensor.view(torch.uint16).numpy() for tensor in found]

    return run


def _experts(case: Case) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name in case.checkpoint.tensors:
        layer, found, rest = name.partition(".mlp.experts.")
        if found:
            groups.setdefault((layer, rest.partition(".")[2]), []).append(name)
    return {
        key: sorted(names, key=lambda name: int(name.split(".experts.")[1].split(".")[0]))
        for key, names in groups.items()
    }


def stack_ours(case: Case) -> Run:
    import jax

    jax.devices()

    def run() -> list[np.ndarray]:
        stacks, places = {}, {}
        for key, names in _experts(case).items():
            info = case.checkpoint.tensors[names[0]]
            stacks[key] = aligned_empty((len(names), *info.shape), np.dtype(ml_dtypes.bfloat16))
            places |= dict(zip(names, stacks[key], strict=True))
        for _ in case.checkpoint.stream(names=places, into=places.__getitem__):
            pass
        return [np.asarray(jax.device_put(stack)) for stack in stacks.values()]

    return run


def stack_numpy(case: Case) -> Run:
    import jax
    from safetensors import safe_open

    jax.devices()

    def run() -> list[np.ndarray]:
        opened = {
            file: safe_open(Path(case.path) / file, "np") for file in {x.file for x in case.checkpoint.tensors.values()}
        }
        found = []
        for names in _experts(case).values():
            experts = [opened[case.checkpoint.tensors[name].file].get_tensor(name) for name in names]
            found.append(jax.block_until_ready(jax.device_put(np.stack(experts))))
        return [np.asarray(array) for array in found]

    return run


def sections() -> dict[str, dict[str, Callable[[Case], Run]]]:
    return {
        "reload": {
            "limit": limit,
            "(reading alone)": lambda case: reading_alone(case, are_resident=True),
            "ours: stream(into=)": reload_ours,
            "safetensors, mmap and copy": lambda case: reload_safetensors(case, "mmap"),
            "safetensors, mmap and copy, 2 threads": lambda case: reload_safetensors(case, "mmap", threads=2),
            "safetensors, pread and copy": lambda case: reload_safetensors(case, "pread"),
            "runai, sync_buffered": lambda case: reload_runai(case, **BUFFERED),
            "runai, its default": reload_runai,
            "(whole law) torch update_weights_from_disk": reload_torch_model,
            "(whole law) jax update_weights_from_disk": reload_jax_model,
            "(whole law) jax, donate=True": lambda case: reload_jax_model(case, donate=True),
        },
        "torch": {
            "limit": limit,
            "(reading alone)": lambda case: reading_alone(case, are_resident=False),
            "ours: torch_models.load": load_torch,
            "safetensors, mmap and clone": lambda case: load_safetensors(case, "mmap"),
            "safetensors, pread": lambda case: load_safetensors(case, "pread"),
            "runai, sync_buffered": lambda case: load_runai(case, **BUFFERED),
            "runai, its default": load_runai,
        },
        "jax": {
            "limit": limit,
            "ours: jax_models.load": load_jax,
            "safetensors.flax": lambda case: load_safetensors_jax(case, "flax"),
            "safetensors, pread and put": lambda case: load_safetensors_jax(case, "pread"),
            "runai, sync_buffered, dlpack": lambda case: load_runai(case, jax_arrays=True, **BUFFERED),
            "runai, its default, dlpack": lambda case: load_runai(case, jax_arrays=True),
        },
        "experts": {"ours: stream(into=)": stack_ours, "np.stack": stack_numpy},
        "cold": {
            "ours: stream(into=)": reload_ours,
            "ours: stream(into=), direct://": lambda case: reload_ours(case, "direct://"),
            "safetensors, mmap and copy": lambda case: reload_safetensors(case, "mmap"),
            "runai, sync_buffered": lambda case: reload_runai(case, **BUFFERED),
            "runai, its default": reload_runai,
        },
    }
