"""``tandem weights`` and what is under it: weights are told apart, and every accident is called by its name."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from synthetic_traces import trio

from loaders import open_checkpoint
from loaders.digest import digests, root_digest
from loaders.dtypes import from_numpy
from loaders.writing.writer import TensorType, write_checkpoint
from parity.cli import main
from parity.weight_diff import diff_tensors, find_accident
from parity.weights import compare_weights, open_weights
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint

Q, K, GATE, UP = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("weights") / "a", num_hidden_layers=2, vocab_size=97)


def edited(source: Path, target: Path, changes: dict[str, np.ndarray | None]) -> str:
    """A copy in which tensors are others; None leaves one out."""
    opened = open_checkpoint(source)
    tensors = {name: opened.read(name) for name in opened.tensors} | changes
    plan = {name: TensorType(from_numpy(x.dtype), x.shape) for name, x in tensors.items() if x is not None}
    return str(write_checkpoint(target, plan, tensors.__getitem__, config=opened.config_document, generation=None))


def compared(a, b):
    return compare_weights(open_weights(a), open_weights(b))


# Both ways: what is the same says so, and one bit is enough


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3-tied", {"ship_tied_head": True}),
        ("qwen3-moe", {"num_hidden_layers": 2, "dtype": "BF16"}),
        ("qwen3_5", {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}),
        ("qwen3", {"num_hidden_layers": 2, "quantization": ZooQuantization(), **block_sizes("qwen3")}),
    ],
    ids=["tied", "moe", "with a draft", "nvfp4"],
)
def test_disk_jax_and_torch_have_one_root(name, options, tmp_path, capsys):
    path = str(make_checkpoint(name, tmp_path / "c", max_file_bytes=60_000, **options))
    assert main(["weights", path, "--json", str(tmp_path / "json")]) == 0
    document = json.loads((tmp_path / "json").read_text())
    assert [one["labels"] for one in document["comparisons"]] == [[path, f"jax:{path}"], [path, f"torch:{path}"]]
    on_disk = digests(open_checkpoint(path).stream())
    for one in document["comparisons"]:
        assert one["roots"] == [root_digest(on_disk)] * 2  # of every tensor in the files: nothing was left out
        assert one["equal"] == len(on_disk)
    assert capsys.readouterr().out.count("SAME") == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_what_no_number_says_is_written_as_json_all_the_same(value, checkpoint, tmp_path):
    odd = open_checkpoint(checkpoint).read(Q)
    odd[:] = value
    other = edited(checkpoint, tmp_path / "b", {Q: odd})
    assert main(["weights", str(checkpoint), str(other), "--json", f"{tmp_path}/j"]) == 1

    def refused(word):
        raise AssertionError(f"{word} is no JSON")

    assert json.loads((tmp_path / "j").read_text(), parse_constant=refused)["exit_code"] == 1


def test_two_live_models_are_compared_and_a_changed_one_is_told(checkpoint, tmp_path, capsys):
    assert main(["weights", f"jax:{checkpoint}", f"torch:{checkpoint}"]) == 0
    wrong = edited(checkpoint, tmp_path / "b", {Q: -open_checkpoint(checkpoint).read(Q)})
    assert main(["weights", f"jax:{wrong}", f"torch:{checkpoint}"]) == 1
    out = capsys.readouterr().out
    assert f"{Q}: F32 [60, 40]; 2400 of 2400 elements" in out
    assert "accident: negated" in out


def test_one_bit_of_one_element_is_found_and_placed(checkpoint, tmp_path):
    value = open_checkpoint(checkpoint).read(GATE)
    value.view(np.uint32)[3, 5] ^= 1
    found = compared(checkpoint, edited(checkpoint, tmp_path / "b", {GATE: value}))
    (one,) = found.differences
    assert (one.name, one.where, one.diff.elements, one.diff.first, one.accident) == (GATE, "both", 1, (3, 5), None)
    assert 0 < one.diff.max_abs < 1e-6
    assert found.roots[0] != found.roots[1]
    assert found.exit_code == 1


def test_what_is_on_one_side_alone_is_told_and_a_renamed_tensor_is_recognised(checkpoint, tmp_path):
    opened = open_checkpoint(checkpoint)
    other = "model.layers.0.self_attn.query.weight"
    found = compared(checkpoint, edited(checkpoint, tmp_path / "b", {Q: None, other: opened.read(Q)}))
    assert {(one.name, one.where, one.same_as) for one in found.differences} == {(Q, "a", other), (other, "b", None)}
    assert "1 only in" in found.to_text()


def test_two_tensors_that_changed_places_are_recognised_and_untrained_norms_are_no_evidence(checkpoint, tmp_path):
    opened = open_checkpoint(checkpoint)
    ones = np.ones(40, np.float32)
    norms = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
    a = edited(checkpoint, tmp_path / "a", {norms[0]: ones})
    b = edited(checkpoint, tmp_path / "b", {GATE: opened.read(UP), UP: opened.read(GATE), norms[1]: ones})
    same_as = {one.name: one.same_as for one in compared(a, b).differences}
    assert same_as == {GATE: UP, UP: GATE, norms[0]: None, norms[1]: None}


def test_a_redundant_tied_head_and_what_a_model_leaves_out_are_no_difference(tmp_path):
    shipped, bare = (
        str(make_checkpoint("qwen3-tied", tmp_path / str(flag), ship_tied_head=flag)) for flag in (True, False)
    )
    found = compared(shipped, bare)
    assert (found.exit_code, found.left_out) == (0, ("lm_head.weight",))
    head = open_checkpoint(shipped).read("lm_head.weight") * 2  # no longer redundant
    assert compared(edited(Path(shipped), tmp_path / "odd", {"lm_head.weight": head}), bare).exit_code == 1
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    drafting = make_checkpoint("qwen3_5", tmp_path / "drafting", **layers)
    drafts = [name for name in open_checkpoint(drafting).tensors if name.startswith("mtp.")]
    trace, _, _ = trio()
    text = digests(open_checkpoint(drafting).stream(names=set(open_checkpoint(drafting).tensors) - set(drafts)))
    trace.meta["weights"] = {"digests": text, "root": root_digest(text)}
    found = compared(drafting, trace.save(tmp_path / "trace"))
    assert (found.exit_code, sorted(found.left_out)) == (0, sorted(drafts))
    without = edited(drafting, tmp_path / "without", dict.fromkeys(drafts))
    assert compared(drafting, without).exit_code == 1  # of two directories each file counts


# Traces: digests alone


@pytest.fixture
def recorded(checkpoint, tmp_path):
    def make(found: dict[str, str]) -> str:
        trace, _, _ = trio()
        trace.meta["weights"] = {"digests": found, "root": root_digest(found)}
        return str(trace.save(tmp_path / "recorded"))

    return make


def test_a_trace_is_held_against_files_by_its_digests(checkpoint, recorded, capsys):
    found = digests(open_checkpoint(checkpoint).stream())
    assert main(["weights", str(checkpoint), recorded(found)]) == 0
    swapped = found | {Q: found[K], K: "00" * 32}
    assert main(["weights", recorded(swapped), str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert f"{Q}: equals {K} of the second" in out
    assert f"  {K}\n" in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights | {"root": "00" * 32}, "contradicts itself"),
        (lambda weights: {"root": weights["root"]}, "records no digests"),
        (lambda weights: None, "records no digests"),
    ],
)
def test_a_trace_that_says_nothing_or_contradicts_itself_is_bad_input(change, says, checkpoint, tmp_path, capsys):
    trace, _, _ = trio()
    trace.meta["weights"] = {"digests": {"x": "aa"}, "root": root_digest({"x": "aa"})}
    trace.meta["weights"] = change(trace.meta["weights"])
    if trace.meta["weights"] is None:
        del trace.meta["weights"]
    path = str(trace.save(tmp_path / "trace"))
    assert main(["weights", path, str(checkpoint)]) == 2
    assert says in capsys.readouterr().err


def test_other_exit_codes_are_those_of_the_design(checkpoint, recorded, tmp_path, capsys):
    assert main(["weights", str(checkpoint), recorded({"encoder.weight": "aa"})]) == 3
    assert "NOT COMPARABLE" in capsys.readouterr().out
    assert main(["weights", recorded({"x": "aa"})]) == 2
    assert "alone" in capsys.readouterr().err
    assert main(["weights", str(tmp_path / "nothing")]) == 2
    assert main(["weights", str(next(checkpoint.glob("*.safetensors"))), str(checkpoint)]) == 2
    assert "not a trace" in capsys.readouterr().err
    assert main(["weights", f"torch:{checkpoint}", str(checkpoint), "--device", "nowhere"]) == 5


def test_a_directory_alone_is_held_against_what_is_installed(checkpoint, monkeypatch, capsys):
    from parity import weights
    from parity.errors import DeviceNotFound

    def without_jax(name, device=None):
        if name == "jax":
            raise DeviceNotFound("backend jax needs the package jax")
        return weights_open(name, device)

    weights_open = weights.open_backend
    monkeypatch.setattr(weights, "open_backend", without_jax)
    assert main(["weights", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "skipped: backend jax" in out
    assert out.count("SAME") == 1


def test_many_differences_are_grouped_by_layer_and_all_of_them_are_listed_on_demand(tmp_path, capsys):
    a, b = (str(make_checkpoint("qwen3-deep", tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert main(["weights", a, b]) == 1
    short = capsys.readouterr().out
    assert main(["weights", a, b, "--all"]) == 1
    assert len(short.splitlines()) < 40 < len(capsys.readouterr().out.splitlines())
    assert "model.layers.*.mlp.up_proj.weight: " in short


# Accidents, each by its name


def _float(shape=(6, 8), dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


BF16 = np.dtype(ml_dtypes.bfloat16)
BYTES = np.random.default_rng(0).integers(0, 256, (6, 8), np.uint8)


@pytest.mark.parametrize(
    ("a", "b", "accident"),
    [
        (_float((8, 8)), _float((8, 8)).T, "transposed"),
        (_float((6, 8)), _float((6, 8)).T, "transposed"),
        (_float((6, 8)), _float((6, 8)).reshape(8, 6), "the same values in another shape"),
        (_float(), -_float(), "negated"),
        (_float(dtype=BF16), -_float(dtype=BF16), "negated"),
        (_float(), np.roll(_float(), 3, 0), "halves of the first axis swapped"),
        (_float(), np.roll(_float(), 4, 1), "halves of the last axis swapped"),
        (_float(), _float()[[0, 2, 4, 1, 3, 5]], "the same rows in another order"),
        (BYTES, (BYTES >> 4) | (BYTES << 4), "the two codes of each byte swapped"),
        (1 + _float(), _float(), "1 + the second"),
        (_float(), 1 + _float(), "the second is 1 + the first"),
        (np.float32(1.01) * _float(), _float(), "1.01 times the second"),
        (_float((64, 64), BF16) * BF16.type(1.0625), _float((64, 64), BF16), "1.062 times the second"),
        (np.zeros((6, 8), np.float32), _float(), "all zeros"),
        (_float(dtype=BF16), _float(), "the second rounded to BF16"),
        (_float(), _float(dtype=BF16), "the second is the first rounded to BF16"),
        (_float(), _float() + np.eye(6, 8, dtype=np.float32), None),
        (_float((6, 8)), _float((6, 9)), None),
        (np.float32([1.0]), np.float32([2.0]), None),  # of one number anything is a multiple
        (_float(), BYTES, None),
    ],
)  # fmt: skip
def test_an_accident_is_called_by_its_name(a, b, accident):
    assert find_accident(np.ascontiguousarray(a), np.ascontiguousarray(b)) == accident


def test_numbers_are_those_of_the_definition_and_codes_have_no_distance():
    b = _float()
    a = b.copy()
    a[2, 3] += 4
    found = diff_tensors(a, b)
    assert (found.elements, found.size, found.first) == (1, 48, (2, 3))
    assert found.max_abs == pytest.approx(4, rel=1e-6)
    assert found.rel_l2 == pytest.approx(4 / np.linalg.norm(b), rel=1e-6)
    assert found.values == (a[2, 3], b[2, 3])
    codes = diff_tensors(BYTES, BYTES ^ 1)
    assert (codes.elements, codes.max_abs, codes.rel_l2) == (48, None, None)


def test_bits_count_not_values():
    nan, zero = np.float32([np.nan, 1.0]), np.float32([0.0, 1.0])
    assert diff_tensors(nan, nan.copy()) is None
    assert diff_tensors(zero, np.float32([-0.0, 1.0])).elements == 1
    found = diff_tensors(nan, zero)
    assert (found.elements, found.max_abs, found.accident) == (1, None, None)
