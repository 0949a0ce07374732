"""On the way to a device: memory is not written again before it was read, and other bytes there are seen."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

import torch_models
from loaders import open_checkpoint
from loaders.digest import digests
from loaders.reading.plan import LoadPlan
from loaders.reading.scratch import Scratch, Staging
from parity.zoo import make_checkpoint
from torch_models import sleep as asleep
from torch_models import staging
from torch_models.staging import DeviceStaging, page_locked

CPU = torch.device("cpu")
SIZES = [0, 1, 7, 4096, (1 << 20) - 8, 1 << 20, (1 << 20) + 1, (5 << 20) + 12344]


class LateDevice(DeviceStaging):
    """A device that copies and adds up when it is waited for, and not before; a CPU, which there is everywhere."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(CPU)
        self.waiting: list[Callable[[], object]] = []

    def settle(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def placed(self, value: torch.Tensor) -> torch.Tensor:
        placed = torch.empty_like(value)
        self.send(value, placed)
        return placed

    def send(self, value: torch.Tensor, to: torch.Tensor) -> None:
        self.waiting.append(lambda: to.copy_(value))

    def remembered(self, value: torch.Tensor) -> staging.Holds:
        sums: list[torch.Tensor] = []
        self.waiting.append(lambda: sums.append(staging._sums(value, CPU)))
        return lambda held: torch.equal(staging._sums(held, CPU), sums[0])


@pytest.fixture
def late_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load", "weights"):
        monkeypatch.setattr(import_module(f"torch_models.{name}"), "DeviceStaging", LateDevice)
    within = LoadPlan.within
    monkeypatch.setattr(
        LoadPlan, "within", lambda self, budget, *, staged, **held: within(self, budget, staged=True, **held)
    )


LATE = {"qwen3-tied": {"ship_tied_head": True}, "qwen3-moe": {}, "qwen3_5-moe": {}, "gemma3": {}}


@pytest.mark.parametrize("name", LATE)
@pytest.mark.usefixtures("late_device")
def test_a_device_that_copies_late_has_the_files_bits(name: str, tmp_path) -> None:
    paths = [make_checkpoint(name, tmp_path / str(seed), seed=seed, **LATE[name]) for seed in range(2)]
    want = [digests(open_checkpoint(path).stream()) for path in paths]
    model = torch_models.load(paths[0])
    have = model.digests()
    assert have == {tensor: want[0][tensor] for tensor in have}
    largest = max(param.nbytes for param in model.parameters())
    model.update_weights_from_disk(paths[1], host_budget_bytes=largest)
    assert model.digests() == {tensor: want[1][tensor] for tensor in have}


@pytest.mark.usefixtures("late_device")
def test_without_waiting_it_would_not(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, take = make_checkpoint("qwen3-moe", tmp_path / "a"), Scratch.take

    def hasty(self: Scratch, *of: Any) -> np.ndarray:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self._staging, "settle", lambda: None)
            return take(self, *of)

    monkeypatch.setattr(Scratch, "take", hasty)
    assert torch_models.load(path).digests() != digests(open_checkpoint(path).stream())


def test_memory_is_let_go_of_before_anything_is_derived(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [make_checkpoint("qwen3", tmp_path / str(seed), seed=seed) for seed in range(2)]
    model, empty = torch_models.load(paths[0]), Staging.empty
    memories: list[weakref.ref[np.ndarray]] = []
    left: list[bool] = []

    def noted(self: Staging, num_bytes: int) -> np.ndarray:
        memory = empty(self, num_bytes)
        memories.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(Staging, "empty", noted)
    weights = import_module("torch_models.weights")
    derive = weights.derive
    monkeypatch.setattr(weights, "derive", lambda of: left.append(memories[0]() is not None) or derive(of))
    model.update_weights_from_disk(paths[1])
    assert left == [False]


class FakeRuntime:
    """Of CUDA, as far as memory is locked."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.locked, self.said = refuses, set[int](), list[str]()

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        if self.refuses:
            return 1
        self.said.append("locked")
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.said.append("unlocked")
        self.locked.remove(address)
        return 0


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_what_was_locked_is_unlocked_once(fails: bool, refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, zeros = FakeRuntime(refuses), torch.zeros
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch, "zeros", lambda *of, device: zeros(*of))
    with pytest.raises(KeyError) if fails else nullcontext(), page_locked(np.ones(9, np.uint8), torch.device("cuda")):
        assert bool(runtime.locked) is not refuses
        if fails:
            raise KeyError("in the middle")
    assert runtime.said == ([] if refuses else ["locked", "unlocked"])


def test_memory_that_cannot_be_had_is_not_there_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextmanager
    def noted(memory: np.ndarray, device: torch.device) -> Iterator[None]:
        said.append(f"lock {memory.nbytes}")
        try:
            yield
        finally:
            said.append(f"unlock {memory.nbytes}")

    monkeypatch.setattr(staging, "page_locked", noted)
    with DeviceStaging(CPU) as made:
        small = made.empty(100)
        assert np.shares_memory(made.empty(50), small)
        with monkeypatch.context() as patch:
            patch.setattr(Staging, "empty", lambda *_: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                made.empty(200)
        made.empty(50)
        assert said == ["lock 100", "unlock 100", "lock 50"]
    assert said[3:] == ["unlock 50"]


def test_only_locked_memory_is_left_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    here, asked = DeviceStaging(CPU), []
    here.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, value, **options: asked.append(options))
    target = torch.empty(4, device="meta")
    for is_pinned in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, is_pinned=is_pinned: is_pinned)
        here.send(torch.ones(4), target)
    here.device = target.device
    here.send(torch.ones(4), target)
    assert asked == [{"non_blocking": False}] * 3  # the target was elsewhere, or the device is no CUDA device


@pytest.mark.parametrize("is_pinned", [False, True])
def test_only_locked_memory_is_added_up_later(is_pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here, asked = DeviceStaging(CPU), []
    here.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: is_pinned)
    monkeypatch.setattr(staging, "_sums", lambda value, device, *, is_lasting: asked.append(is_lasting))
    here.remembered(torch.ones(4))
    assert asked == [is_pinned]


@pytest.mark.parametrize("size", [0, 100, staging.PROVIDED_BYTES, staging.PROVIDED_BYTES + 1, (130 << 20) + 5])
def test_memory_that_is_provided_keeps_its_bytes(size: int) -> None:
    memory = np.resize(np.arange(251, dtype=np.uint8), size)
    before = memory.copy()
    staging.provide(memory)
    assert np.array_equal(memory, before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.bfloat16, torch.float64])
def test_sums_are_of_bytes_whatever_they_stand_for(dtype: torch.dtype) -> None:
    held = bytes_of(4096).view(torch.uint8) % 2 if dtype == torch.bool else bytes_of(4096)
    tensor = held.view(dtype)
    assert torch.equal(staging._sums(tensor, CPU), staging._sums(held, CPU))
    assert staging._sums(tensor[0], CPU).shape == (1,)
    changed = held.clone()
    changed[8] ^= 1
    assert not torch.equal(staging._sums(changed.view(dtype), CPU), staging._sums(tensor, CPU))


def test_sums_are_of_memory_that_begins_between_words() -> None:
    held = bytes_of((1 << 20) + 8)
    cut = torch.from_numpy(held.numpy()[4:])[4:]  # its storage begins at 4, and it 4 behind that
    assert torch.equal(staging._sums(cut, CPU), staging._sums(held[8:].clone(), CPU))


def bytes_of(size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(size).integers(0, 256, size, np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_one_number_a_mib_wherever_the_bytes_lie(size: int) -> None:
    held = bytes_of(size)
    sums = staging._sums(held, CPU)
    assert (sums.shape, sums.dtype) == ((-(-size >> 20),), torch.int64)
    moved = torch.empty(size + 1, dtype=torch.uint8)[1:].copy_(held)
    assert torch.equal(staging._sums(moved, CPU), sums)
    strided = torch.empty(size, 2, dtype=torch.uint8)[:, 0].copy_(held)
    assert torch.equal(staging._sums(strided, CPU), sums)


def changes(held: torch.Tensor) -> Iterator[torch.Tensor]:
    """What copies that went wrong make: a bit, words in each other's place, parts that are another's or nobody's."""
    words = held.view(torch.int64)
    for place in (0, 511, 512, len(words) // 2, len(words) - 1):
        for bit in (0, 15, 62, 63):
            changed = words.clone()
            changed[place] ^= 1 << bit if bit < 63 else -(1 << 63)
            yield changed
    for a, b in ((0, 1), (5, 517), (0, len(words) - 1), (100, 131072)):
        changed = words.clone()
        changed[a], changed[b] = words[b], words[a]
        yield changed
        only_signs = words.clone()
        only_signs[a], only_signs[b] = words[a], words[a] ^ -(1 << 63)
        yield only_signs
    for start, stop in ((0, 512), (131072, 262144), (len(words) - 3, len(words))):
        changed = words.clone()
        changed[start:stop] = 0
        yield changed
    yield torch.cat([words[131072:262144], words[:131072], words[262144:]])
    yield words.flip(0)


def test_sums_see_what_a_copy_that_went_wrong_makes() -> None:
    held = bytes_of((3 << 20) + 4096)
    sums = staging._sums(held, CPU)
    for number, changed in enumerate(changes(held)):
        assert not torch.equal(staging._sums(changed, CPU), sums), number


def test_on_the_cpu_what_is_remembered_is_what_was_there() -> None:
    with DeviceStaging(CPU) as on_cpu:
        value = torch.arange(1000, dtype=torch.bfloat16)
        holds = on_cpu.remembered(value)
        assert on_cpu.placed(value) is value
        assert holds(value.clone())
        value[3] = 7
        assert not holds(value)


def test_both_readings_of_a_reload_are_into_one_memory(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (make_checkpoint("qwen3", tmp_path / str(seed), seed=seed) for seed in range(2))
    model = torch_models.load(first)
    made = []
    empty = Staging.empty
    monkeypatch.setattr(Staging, "empty", lambda self, num_bytes: made.append(num_bytes) or empty(self, num_bytes))
    model.update_weights_from_disk(second)
    assert len(made) == 1


def test_what_a_device_holds_lies_in_one_memory_while_it_sleeps(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a device, taken on the CPU."""
    storages = [bytes_of(size).untyped_storage() for size in (7, 4096, 0, 12345)]
    locked: list[int] = []

    @contextmanager
    def noted(memory: np.ndarray, device: torch.device) -> Iterator[None]:
        locked.append(memory.nbytes)
        yield

    monkeypatch.setattr(asleep, "page_locked", noted)
    copies, memory = asleep._copied(storages, torch.device("cuda"))
    assert locked == [memory.nbytes] == [64 + 4096 + 12352]
    for storage, copy in zip(storages, copies, strict=True):
        assert bytes(storage) == copy.numpy().tobytes()
        assert np.shares_memory(copy.numpy(), memory) or not copy.numel()
        assert asleep._holds(storage, copy)
    storages[1][4095] ^= 1
    assert not asleep._holds(storages[1], copies[1])


# what only a device can show

LARGE = {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 5001}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied", "qwen3-moe", "qwen3_5-moe", "gemma3"])
def test_what_is_loaded_to_a_device_has_the_files_bits(name: str, tmp_path) -> None:
    sizes = LARGE if name in ("qwen3", "qwen3-tied") else {}
    paths = [make_checkpoint(name, tmp_path / str(seed), seed=seed, dtype="BF16", **sizes) for seed in range(2)]
    model = torch_models.load(paths[0], device="cuda")
    assert model.digests() == torch_models.load(paths[0]).digests()
    model.update_weights_from_disk(paths[1])
    assert model.digests() == torch_models.load(paths[1]).digests()
    model.sleep().wake()
    assert model.digests() == torch_models.load(paths[1]).digests()


@pytest.mark.gpu
def test_one_lot_is_all_the_memory_that_is_page_locked(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    empty = Staging.empty
    monkeypatch.setattr(Staging, "empty", lambda self, num_bytes: made.append(num_bytes) or empty(self, num_bytes))
    path = make_checkpoint("qwen3", tmp_path / "a", dtype="BF16", **LARGE)
    model = torch_models.load(path, device="cuda", host_budget_bytes=5001 * 1024 * 2)
    assert made == [5001 * 1024 * 2]
    assert model.digests() == torch_models.load(path).digests()


@pytest.mark.gpu
def test_memory_is_page_locked_for_as_long_as_it_takes_and_twice_does_no_harm() -> None:
    device, memory = torch.device("cuda"), np.arange(5 << 20, dtype=np.uint8)
    tensor = torch.from_numpy(memory)
    with page_locked(memory, device):
        assert tensor.is_pinned()
        with page_locked(memory, device):  # which the driver refuses
            assert torch.equal(tensor.to(device, non_blocking=True).cpu(), tensor)
        assert tensor.is_pinned()
    assert not tensor.is_pinned()
    assert torch.equal(tensor, torch.arange(5 << 20, dtype=torch.int32).to(torch.uint8))


@pytest.mark.gpu
def test_what_is_read_into_is_locked_and_what_is_not_is_waited_for() -> None:
    with DeviceStaging(torch.device("cuda")) as to_device:
        memory = torch.from_numpy(to_device.empty(1 << 20))
        assert to_device._is_locked(memory[4096:])
        assert not to_device._is_locked(torch.ones(3))
        to_device.let_go()
        assert not to_device._is_locked(memory)


@pytest.mark.gpu
def test_a_device_tells_what_it_holds() -> None:
    value = bytes_of((70 << 20) + 12344)
    with DeviceStaging(torch.device("cuda")) as to_device:
        placed, holds = to_device.placed(value), to_device.remembered(value)
        assert holds(placed)
        for place in (0, 64 << 20, value.numel() - 1):
            placed[place] ^= 1
            assert not holds(placed)
            placed[place] ^= 1
        assert holds(placed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_that_went_wrong_is_seen(device: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [make_checkpoint("qwen3", tmp_path / str(seed), seed=seed) for seed in range(2)]
    model = torch_models.load(paths[0], device=device)
    norm, real = model.get_parameter("model.norm.weight"), torch.Tensor.copy_

    def faulty(self: torch.Tensor, value: torch.Tensor, **options: bool) -> torch.Tensor:
        real(self, value, **options)
        return self.add_(1) if self is norm else self

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", faulty)
        with pytest.raises(RuntimeError, match=r"wrong bytes or moved storage in model\.norm\.weight"):
            model.update_weights_from_disk(paths[1])
    assert model.update_weights_from_disk(paths[1]).digests() == torch_models.load(paths[1]).digests()
