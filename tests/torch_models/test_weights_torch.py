"""The life of the weights of a torch model: load, swap, replace, reload, export, and the stages of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import torch_models
from loaders import CheckpointError, open_checkpoint
from loaders.place import weight_loader
from parity.zoo import make_checkpoint
from torch_models.census import pointer_census
from torch_models.storage import host_view
from torch_models.weights import parameters

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
V, D, LAYERS = 211, 40, 3
IDS = np.random.default_rng(0).integers(0, V, (2, 8))

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint of several files; made once, however often it is asked for."""
    made: dict[str, Path] = {}

    def build(name: str = "qwen3", seed: int = 0, **options) -> Path:
        key = repr((name, seed, sorted(options.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp("checkpoint") / "a"
            sizes = {"num_hidden_layers": LAYERS, "max_file_bytes": 60_000}
            made[key] = make_checkpoint(name, directory, seed=seed, **(sizes | options))
        return made[key]

    return build


@pytest.fixture
def dense(make: Make) -> torch_models.Model:
    return torch_models.load(make())


@pytest.fixture
def tied(make: Make) -> torch_models.Model:
    return torch_models.load(make("qwen3-tied"))


def random_table(seed: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(V, D)).astype(dtype)


def bits(value) -> bytes:
    return host_view(value.contiguous()).tobytes() if isinstance(value, torch.Tensor) else np.asarray(value).tobytes()


def copies(model: torch_models.Model) -> list[torch.Tensor | None]:
    return [None if half is None else half.detach().clone() for half in model.get_embed_and_head()]


def tensors_of(directory: Path) -> dict[str, dict[str, tuple]]:
    """File -> tensor -> dtype, shape, bytes; read by the safetensors library."""
    return {
        path.name: {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in load_file(path).items()}
        for path in sorted(directory.glob("*.safetensors"))
    }


def assert_same_checkpoint(exported: Path, source: Path) -> None:
    want = tensors_of(source)
    assert tensors_of(exported) == want
    for path in source.glob("*.safetensors"):
        assert (exported / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported / name).read_text()) == json.loads((source / name).read_text())
    index = "model.safetensors.index.json"
    assert (exported / index).exists() == (source / index).exists() == (len(want) > 1)
    if len(want) > 1:
        assert json.loads((exported / index).read_text()) == json.loads((source / index).read_text())


# load


@pytest.mark.parametrize(("name", "num_files"), [("qwen3", 2), ("qwen3-bias", 2), ("qwen3-moe", 2), ("qwen3-tied", 2)])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_export_gives_back_the_checkpoint(make: Make, tmp_path: Path, name: str, num_files: int, dtype: str) -> None:
    source = make(name, dtype=dtype)
    assert len(tensors_of(source)) >= num_files
    assert_same_checkpoint(torch_models.load(source).export(tmp_path / "out"), source)


@pytest.mark.parametrize(
    ("stored", "asked", "computed"),
    [
        ("F32", None, "float32"),
        ("BF16", None, "bfloat16"),
        ("F16", None, "float32"),
        ("F32", "bfloat16", "bfloat16"),
        ("BF16", "float32", "float32"),
        ("F16", torch.bfloat16, "bfloat16"),
    ],
)
def test_dtype_is_what_is_computed_in_and_parameters_keep_their_own(
    make: Make, tmp_path: Path, stored: str, asked, computed: str
) -> None:
    source = make("qwen3", dtype=stored)
    model = torch_models.load(source, dtype=asked)
    kept = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[stored]
    assert model.dtype == getattr(torch, computed)
    assert {param.dtype for param in model.parameters()} == {getattr(torch, kept)}
    assert not any(param.requires_grad for param in model.parameters())
    assert_same_checkpoint(model.export(tmp_path / "out"), source)


def test_a_float32_checkpoint_computed_in_bfloat16_runs_in_bfloat16(make: Make) -> None:
    model = torch_models.load(make(num_hidden_layers=1), dtype="bfloat16")
    logits_BTV, taps = model.with_taps(IDS)
    assert logits_BTV.dtype == torch.float32
    assert {value.dtype for value in taps.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "not float32"])
def test_a_dtype_that_is_not_computed_in_is_refused(make: Make, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype {dtype} is not computed in, expected one of float32, bfloat16"):
        torch_models.load(make(), dtype=dtype)


def test_the_report_counts_what_was_loaded(make: Make) -> None:
    source = make()
    found = open_checkpoint(source)
    report = torch_models.load(source).report
    assert report.num_tensors == len(found.tensors) == sum(map(len, tensors_of(source).values()))
    assert report.num_bytes == sum(len(t[2]) for file in tensors_of(source).values() for t in file.values())
    assert (report.verified, report.left_out, report.other_stages) == ((), (), 0)
    parts = [torch_models.load(source, stage=(index, 2)).report for index in range(2)]
    assert sum(part.num_tensors for part in parts) == len(found.tensors)
    assert [part.other_stages for part in parts] == [len(found.tensors) - part.num_tensors for part in parts]
    experts = torch_models.load(make("qwen3-moe"))
    assert experts.report.num_tensors == len(open_checkpoint(make("qwen3-moe")).tensors)
    assert experts.report.num_tensors > len(list(experts.parameters()))  # experts are stacked


def test_a_redundant_tied_head_is_verified_and_exported_again(make: Make, tmp_path: Path) -> None:
    source = make("qwen3-tied", ship_tied_head=True)
    model = torch_models.load(source)
    assert model.report.verified == (HEAD,)
    assert HEAD not in parameters(model)
    assert_same_checkpoint(model.export(tmp_path / "a"), source)
    changed = model.set_embed_and_head(random_table(3)).export(tmp_path / "b")
    found = {name: value for file in tensors_of(changed).values() for name, value in file.items()}
    assert found[HEAD] == found[EMBED]
    assert found[EMBED][2] == random_table(3).tobytes()


def broken_copy(source: Path, directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """The checkpoint with each file's tensors passed through ``change``."""
    directory.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, directory / path.name)
        else:
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def one_bit(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        if name in tensors:
            tensors[name].view(np.uint8).reshape(-1)[-1] ^= 1

    return change


def test_a_tied_head_that_differs_in_one_bit_is_refused(make: Make, tied: torch_models.Model, tmp_path: Path) -> None:
    source = broken_copy(make("qwen3-tied", ship_tied_head=True), tmp_path / "a", one_bit(HEAD))
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but 'lm_head.weight' differs"):
        torch_models.load(source)
    before, census = tied.digests(), pointer_census(tied)
    with pytest.raises(CheckpointError, match="differs"):
        tied.update_weights_from_disk(source)
    assert (tied.digests(), pointer_census(tied), tied.version) == (before, census, 1)
    tied(IDS)


def test_ids_by_position_are_a_type_error() -> None:
    param, weight = np.zeros((2, 3, 4), np.float32), np.ones((3, 4), np.float32)
    with pytest.raises(TypeError, match="positional"):
        weight_loader(param, weight, 1)
    weight_loader(param, weight, shard_id=1)
    assert param[:, 0, 0].tolist() == [0, 1]


# swap


def test_a_swap_writes_two_parameters_in_place(dense: torch_models.Model) -> None:
    before, census, owned = dense.digests(), pointer_census(dense), dense.get_embed_and_head()
    embed, head = random_table(1), torch.from_numpy(random_table(2))
    new = dense.set_embed_and_head(embed, head)
    assert new is dense
    assert (new.version, new.events[-1].kind, new.events[-1].ignored) == (2, "swap", ())
    assert pointer_census(new) == census
    assert {name for name, digest in new.digests().items() if digest != before[name]} == {EMBED, HEAD}
    assert all(half is same for half, same in zip(new.get_embed_and_head(), owned, strict=True))
    assert (bits(owned[0]), bits(owned[1])) == (embed.tobytes(), bits(head))


def test_a_swap_changes_the_logits_and_swapping_back_restores_them(dense: torch_models.Model, tmp_path: Path) -> None:
    before, digests, halves = dense(IDS), dense.digests(), copies(dense)
    dense.set_embed_and_head(random_table(1), random_table(2))
    assert (dense(IDS) - before).abs().max() > 1
    assert bits(dense(IDS)) == bits(torch_models.load(dense.export(tmp_path / "a"))(IDS))
    dense.set_embed_and_head(*halves)
    assert dense.version == 3
    assert bits(dense(IDS)) == bits(before)
    assert dense.digests() == digests


def test_none_leaves_a_half_alone(dense: torch_models.Model) -> None:
    _, head = copies(dense)
    dense.set_embed_and_head(random_table(1), None)
    assert [bits(half) for half in dense.get_embed_and_head()] == [random_table(1).tobytes(), bits(head)]
    dense.set_embed_and_head(head=random_table(2))
    assert [bits(half) for half in dense.get_embed_and_head()] == [random_table(s).tobytes() for s in (1, 2)]


def test_setting_what_is_there_publishes_nothing(dense: torch_models.Model, tied: torch_models.Model) -> None:
    for model in (dense, tied):
        assert model.set_embed_and_head(*model.get_embed_and_head()) is model
        model.set_embed_and_head()
        assert (model.version, len(model.events)) == (1, 1)


def test_a_swap_made_twice_is_the_swap_made_once(dense: torch_models.Model) -> None:
    before = dense.digests()
    once = dense.set_embed_and_head(random_table(1), random_table(2)).digests()
    assert dense.set_embed_and_head(random_table(1), random_table(2)).digests() == once != before


@pytest.mark.parametrize("hand_over", [lambda half: half, lambda half: half.data, lambda half: half.detach()[:]])
def test_halves_may_be_handed_over_crosswise(dense: torch_models.Model, hand_over) -> None:
    census, (embed, head) = pointer_census(dense), copies(dense)
    dense.set_embed_and_head(*(hand_over(half) for half in reversed(dense.get_embed_and_head())))
    assert [bits(half) for half in dense.get_embed_and_head()] == [bits(head), bits(embed)]
    assert pointer_census(dense) == census
    dense.set_embed_and_head(head=dense.get_embed_and_head()[0])
    assert [bits(half) for half in dense.get_embed_and_head()] == [bits(head), bits(head)]


def test_a_buffer_may_be_overwritten_after_a_swap(dense: torch_models.Model) -> None:
    embed, head = random_table(1), torch.from_numpy(random_table(2))
    dense.set_embed_and_head(embed, head)
    embed[...] = 0
    head.zero_()
    assert [bits(half) for half in dense.get_embed_and_head()] == [random_table(s).tobytes() for s in (1, 2)]


def test_a_table_that_is_not_contiguous_is_written_as_it_reads(dense: torch_models.Model) -> None:
    wide = np.ascontiguousarray(random_table(1).T)
    dense.set_embed_and_head(wide.T, torch.from_numpy(wide).T)
    assert [bits(half) for half in dense.get_embed_and_head()] == [random_table(1).tobytes()] * 2


def test_every_misfit_of_a_swap_is_listed_and_nothing_changes(dense: torch_models.Model) -> None:
    before, census = dense.digests(), pointer_census(dense)
    with pytest.raises(ValueError, match="Nothing was changed") as caught:
        dense.set_embed_and_head(random_table(1).T, torch.from_numpy(random_table(1, "float16")))
    assert "embed is float32 (40, 211), expected float32 (211, 40)" in str(caught.value)
    assert "head is float16 (211, 40), expected float32 (211, 40)" in str(caught.value)
    with pytest.raises(ValueError, match="embed is a list") as caught:
        dense.set_embed_and_head([[1.0]], random_table(1)[:-1])
    assert "head is float32 (210, 40)" in str(caught.value)
    with pytest.raises(ValueError, match="head is float64"):  # a good half is not written either
        dense.set_embed_and_head(random_table(1), random_table(1, "float64"))
    assert (dense.digests(), pointer_census(dense), dense.version) == (before, census, 1)


def test_a_swap_in_a_bfloat16_model_takes_bfloat16(make: Make) -> None:
    model = torch_models.load(make(dtype="BF16"))
    with pytest.raises(ValueError, match="embed is float32"):
        model.set_embed_and_head(random_table(1))
    table = random_table(1).astype(ml_dtypes.bfloat16)
    assert bits(model.set_embed_and_head(table).get_embed_and_head()[0]) == table.tobytes()
    other = torch.from_numpy(random_table(2)).bfloat16()
    assert bits(model.set_embed_and_head(head=other).get_embed_and_head()[1]) == bits(other)


def test_a_tied_model_takes_an_equal_head_and_refuses_another(tied: torch_models.Model) -> None:
    embed, head = tied.get_embed_and_head()
    assert embed is head
    before, census = tied.digests(), pointer_census(tied)
    tied.set_embed_and_head(head=embed.detach().clone())
    tied.set_embed_and_head(head=host_view(embed).copy())
    for halves in ((None, random_table(1)), (random_table(1), random_table(2)), (random_table(1), embed)):
        with pytest.raises(ValueError, match="head must be the embedding or equal to it. Nothing was changed"):
            tied.set_embed_and_head(*halves)
    zero = host_view(embed).copy()
    zero[0, 0] = 0.0
    negative_zero = zero.copy()
    negative_zero[0, 0] = -0.0
    with pytest.raises(ValueError, match="equal to it"):  # bits, not values
        tied.set_embed_and_head(zero, negative_zero)
    assert (tied.digests(), tied.version) == (before, 1)
    tied.set_embed_and_head(random_table(1), random_table(1))
    assert tied.get_embed_and_head()[0] is tied.get_embed_and_head()[1] is embed
    assert (bits(embed), tied.version, pointer_census(tied)) == (random_table(1).tobytes(), 2, census)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


# stages


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied"])
def test_chained_stages_are_the_whole_model(make: Make, name: str, count: int) -> None:
    whole = torch_models.load(make(name))
    stages = [torch_models.load(make(name), stage=(index, count)) for index in range(count)]
    mask_BT = np.ones_like(IDS)
    mask_BT[1, :3] = 0
    x = stages[0](IDS, mask_BT)
    assert x.shape == (*IDS.shape, D)
    for stage in stages[1:]:
        x = stage(attention_mask=mask_BT, hidden_states=x)
    want = whole(IDS, mask_BT)
    real_BT = torch.from_numpy(mask_BT == 1)
    error = float((x - want)[real_BT].norm() / want[real_BT].norm())
    assert error == 0  # the same sums
    held = [name for stage in stages for name in parameters(stage)]
    assert set(held) == set(parameters(whole))
    for stage in stages:
        assert all(bits(v) == bits(parameters(whole)[n]) for n, v in parameters(stage).items())


def halves_of(model: torch_models.Model) -> tuple[bool, bool]:
    embed, head = model.get_embed_and_head()
    return embed is not None, head is not None


@pytest.mark.parametrize(
    ("name", "count", "want"),
    [
        ("qwen3", 2, [(True, False), (False, True)]),
        ("qwen3", 3, [(True, False), (False, False), (False, True)]),
        ("qwen3-tied", 2, [(True, True), (True, True)]),
        ("qwen3-tied", 3, [(True, True), (False, False), (True, True)]),
    ],
)
def test_a_stage_has_its_own_halves_and_ignores_the_others_by_name(
    make: Make, name: str, count: int, want: list[tuple[bool, bool]]
) -> None:
    for index, has in enumerate(want):
        model = torch_models.load(make(name), stage=(index, count))
        assert halves_of(model) == has
        names, census = set(dict(model.named_parameters(remove_duplicate=False))), pointer_census(model)
        given = (random_table(1), random_table(1 if "tied" in name else 2))
        new = model.set_embed_and_head(*given)
        ignored = tuple(half for half, own in zip(("embed", "head"), has, strict=True) if not own)
        assert new.version == (2 if any(has) else 1)
        assert new.events[1:][-1].ignored == ignored
        assert set(dict(new.named_parameters(remove_duplicate=False))) == names
        assert pointer_census(new) == census
        for half, own, value in zip(new.get_embed_and_head(), has, given, strict=True):
            assert (half is not None) == own
            assert not own or bits(half) == value.tobytes()


def test_a_stage_reloads_and_exports_its_part(make: Make, tmp_path: Path) -> None:
    sources = [make(), make(seed=1)]
    whole = {name: value for file in tensors_of(sources[1]).values() for name, value in file.items()}
    found: dict[str, tuple] = {}
    for index in range(2):
        stage = torch_models.load(sources[0], stage=(index, 2)).update_weights_from_disk(sources[1])
        for file in tensors_of(stage.export(tmp_path / str(index))).values():
            assert not set(file) & set(found)
            found |= file
    assert found == whole


def test_a_stage_takes_what_is_its_own(make: Make) -> None:
    first, last = (torch_models.load(make(), stage=(index, 2)) for index in range(2))
    with pytest.raises(ValueError, match="this stage is the first of the pipeline: give input_ids"):
        first(hidden_states=np.zeros((1, 2, D)))
    with pytest.raises(ValueError, match="stage 1 of 2 takes hidden_states, not input_ids"):
        last(IDS)
    with pytest.raises(ValueError, match=r"expected \[B, T, 40\]"):
        last(hidden_states=np.zeros((1, 2, D + 1), np.float32))
    with pytest.raises(ValueError, match="prefill needs the whole model; this is stage 0 of 2"):
        first.generate(IDS)
    for stage in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="must be"):
            torch_models.load(make(), stage=stage)
    with pytest.raises(ValueError, match="4 pipeline stages for 3 decoder layers"):
        torch_models.load(make(), stage=(0, 4))


# reload


def test_a_reload_changes_everything_and_moves_nothing(make: Make, tmp_path: Path) -> None:
    a, b = make(), make(seed=1)
    model = torch_models.load(a)
    before, digests, census = model(IDS), model.digests(), pointer_census(model)
    params = dict(model.named_parameters())
    assert model.update_weights_from_disk(b) is model
    assert (model.version, model.events[-1].kind) == (2, "reload")
    assert model.report.num_tensors == len(open_checkpoint(b).tensors)
    assert_same_checkpoint(model.export(tmp_path / "b"), b)
    assert bits(model(IDS)) == bits(torch_models.load(b)(IDS)) != bits(before)
    assert not {name for name, digest in model.digests().items() if digest == digests[name]}
    model.update_weights_from_disk(a)
    assert_same_checkpoint(model.export(tmp_path / "a"), a)
    assert (bits(model(IDS)), model.digests()) == (bits(before), digests)
    assert pointer_census(model) == census
    assert all(param is params[name] for name, param in model.named_parameters())


def test_a_reload_made_twice_is_the_reload_made_once(make: Make) -> None:
    model = torch_models.load(make("qwen3-moe")).update_weights_from_disk(make("qwen3-moe", seed=1))
    once = model.digests()
    model.update_weights_from_disk(make("qwen3-moe", seed=1))
    assert (model.version, model.digests()) == (3, once)
    assert once == torch_models.load(make("qwen3-moe", seed=1)).digests()


def test_a_reload_that_would_change_the_computation_is_refused_by_name(make: Make, dense: torch_models.Model) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    other = make(seed=1, rms_norm_eps=1e-5, rope_parameters=rope, attention_bias=True)
    before, census = dense.digests(), pointer_census(dense)
    with pytest.raises(CheckpointError) as caught:
        dense.update_weights_from_disk(other)
    for key in ("rms_norm_eps is 1e-05, expected 0.0003", "rope_parameters", "attention_bias is True, expected False"):
        assert f"config.json: {key}" in str(caught.value)
    assert "model.layers.2.self_attn.q_proj.bias' of" in str(caught.value)
    for refused in (make("qwen3-tied"), make("qwen3-moe"), make(vocab_size=212), make(dtype="BF16")):
        with pytest.raises(CheckpointError, match="as it is live"):
            dense.update_weights_from_disk(refused)
    assert (dense.digests(), pointer_census(dense), dense.version) == (before, census, 1)


def test_a_reload_may_say_otherwise_of_windows_that_no_layer_has(make: Make) -> None:
    words = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4}
    model = torch_models.load(make("qwen3")).update_weights_from_disk(make("qwen3", seed=1, **words))
    assert model.digests() == torch_models.load(make("qwen3", seed=1)).digests()


def test_a_reload_may_change_how_generation_ends(make: Make, dense: torch_models.Model) -> None:
    dense.update_weights_from_disk(make(eos_token_id=[7, 9]))
    assert dense.checkpoint.eos_token_ids == (7, 9)


def test_a_broken_checkpoint_leaves_the_old_weights_serving(
    make: Make, dense: torch_models.Model, tmp_path: Path
) -> None:
    before = bits(dense(IDS))
    gone = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")

    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in gone:
            tensors.pop(name, None)

    source = broken_copy(make(seed=1), tmp_path / "gone", drop)
    with pytest.raises(CheckpointError) as caught:
        dense.update_weights_from_disk(source)
    assert all(name in str(caught.value) for name in gone)
    assert (bits(dense(IDS)), dense.version) == (before, 1)


def test_a_write_that_fails_half_way_makes_the_model_refuse_until_a_good_load(
    make: Make, dense: torch_models.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    norm = dense.get_parameter("model.norm.weight")
    real = torch.Tensor.copy_

    def faulty(self: torch.Tensor, value: torch.Tensor, **options: bool) -> torch.Tensor:
        if self is norm:
            raise RuntimeError("device fault")
        return real(self, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", faulty)
        with pytest.raises(RuntimeError, match="device fault"):
            dense.update_weights_from_disk(make(seed=1))
    assert dense.version == 1
    for call in (dense, dense.with_taps, dense.prefill, dense.generate):
        with pytest.raises(RuntimeError, match="refuses to run: an update of 36 parameters did not finish"):
            call(IDS)
    with pytest.raises(RuntimeError, match="refuses to run"):  # it would publish the mixture
        dense.set_embed_and_head(random_table(1), random_table(2))
    with pytest.raises(RuntimeError, match="refuses to run"):
        dense.export(tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()
    dense.update_weights_from_disk(make(seed=1))
    assert bits(dense(IDS)) == bits(torch_models.load(make(seed=1))(IDS))
