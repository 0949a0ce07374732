import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from synthetic_traces import B, T, make_backend, make_oracle

from loaders.dtypes import to_numpy
from parity.compare import compare
from parity.record import read_inputs
from parity.report.results import to_markdown
from parity.trace import Trace, input_hash, make_meta, read_meta


@pytest.fixture
def trace() -> Trace:
    return make_backend(make_oracle(sparse=(2,)), "jax", 1)


def test_a_trace_that_is_saved_and_loaded_is_the_same_bit_for_bit(trace, tmp_path):
    trace.tensors["extra.thing"] = np.arange(5, dtype=np.int16)
    loaded = Trace.load(trace.save(tmp_path / "x.trace"))
    assert loaded.meta == trace.meta
    assert loaded.tensors.keys() == trace.tensors.keys()
    for name, array in trace.tensors.items():
        assert loaded.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.tensors[name], array)


def test_a_view_that_is_not_laid_out_in_order_is_saved_as_it_reads(trace, tmp_path):
    wanted = trace.tensors["logits"].copy()
    trace.tensors["logits"] = np.asfortranarray(trace.tensors["logits"])
    np.testing.assert_array_equal(Trace.load(trace.save(tmp_path / "x.trace")).tensors["logits"], wanted)


def test_the_header_holds_one_json_document_under_tandem(trace, tmp_path):
    with safe_open(trace.save(tmp_path / "x.trace"), framework="numpy") as file:
        metadata = file.metadata()
    assert set(metadata) == {"tandem"}
    document = json.loads(metadata["tandem"])
    assert document["schema"] == 1
    assert document["weights"]["root"] == "cafe" * 16
    assert {"backend", "versions", "device", "precision", "dtype", "events", "input_hash", "checkpoint"} <= set(
        document
    )


def test_saving_something_that_is_no_trace_lists_everything_and_leaves_no_file(trace, tmp_path):
    trace.meta["schema"] = 2
    trace.tensors["logits"] = trace.tensors["logits"].astype(np.float16)
    trace.tensors["input_ids"] = trace.tensors["input_ids"].astype(np.float32)
    with pytest.raises(ValueError, match=r"3 problem") as caught:
        trace.save(tmp_path / "x.trace")
    for part in ("schema is 2", "'logits' is float16", "'input_ids' is float32"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_trace_that_was_there(trace, tmp_path):
    path = trace.save(tmp_path / "x.trace")
    before = path.read_bytes()
    trace.meta["note"] = float("nan")  # JSON has no NaN
    with pytest.raises(ValueError, match="JSON"):
        trace.save(path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["x.trace"]


def test_loading_a_file_without_the_document_says_that_it_is_no_trace(tmp_path):
    save_file({"logits": np.zeros((1, 1, 2), np.float32)}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"no 'tandem' document"):
        Trace.load(tmp_path / "x")


@pytest.mark.parametrize("document", ["{", "[1]", "[" * 100_000], ids=["cut", "list", "deep"])
def test_loading_a_document_that_is_no_json_object_says_so(document, tmp_path):
    save_file({"logits": np.zeros((1, 1, 2), np.float32)}, tmp_path / "x", metadata={"tandem": document})
    with pytest.raises(ValueError, match=r"is not (JSON|an object)"):
        Trace.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("inputs", [5]), ("row", [1]), ("decode", "x"), ("adapter", 3), ("checkpoint", {})),
        *(("max_new_tokens", "6"), ("max_new_tokens", 1.5), ("ignore_eos", {})),
    ],
)
def test_what_says_how_to_run_it_again_has_one_kind(trace, tmp_path, key, value):
    trace.meta[key] = value
    with pytest.raises(ValueError, match=rf"{key} is .*, expected a (str|int|bool) or nothing"):
        trace.save(tmp_path / "x")


@pytest.mark.parametrize("adapter", [7, ["a"], {}])
def test_an_adapter_is_said_by_its_digest(trace, tmp_path, adapter):
    trace.meta["precision"] = {"adapter": adapter}
    with pytest.raises(ValueError, match=r"precision\.adapter is .*, expected a digest or nothing"):
        trace.save(tmp_path / "x")


PROBE = {"module": "m", "kind": "scale", "size": 0.01, "tensor": "logits", "moved": {"logits": 0.02}}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"size": value} for value in (0.0, -0.1, float("nan"), float("inf"), "0.1")),
        *({"tensor": value} for value in ("embeddings", "hidden_states.\u0661", "hidden_states." + "9" * 5000)),
        *({"moved": {"logits": value}} for value in (None, "x", -1, float("nan"), float("inf"), 10**400)),
    ],
)
def test_a_fault_that_an_oracle_cannot_have_tried_is_refused(trace, tmp_path, wrong):
    trace.meta["probes"] = [PROBE]
    trace.save(tmp_path / "x")
    trace.meta["probes"] = [PROBE | wrong]
    with pytest.raises(ValueError, match=r"probes\[0\] is .*, expected module, kind, size, tensor, moved"):
        trace.save(tmp_path / "x")


@pytest.mark.parametrize("name", ["\x1b[31mtorch", "two\nlines", "\u202eright to left"])
def test_a_name_that_steers_a_terminal_is_refused_wherever_it_is(trace, tmp_path, name):
    for meta in ({"backend": name}, {"versions": {name: "1"}}, {"weights": {"root": "ab", "digests": {name: "cd"}}}):
        with pytest.raises(ValueError, match="holds what cannot be printed") as caught:
            Trace(trace.tensors, trace.meta | meta).save(tmp_path / "x")
        assert ascii(name) in str(caught.value)


def test_a_path_may_have_any_name_and_is_shown_with_escapes(trace, tmp_path):
    oracle, wrong = make_oracle(), make_backend(make_oracle(), "torch", 2, scale=100)
    trace = make_backend(oracle, "jax", 1)
    for one in (trace, wrong, oracle):
        one.meta["checkpoint"] = "odd\x1b[31m"
    found = compare(*(Trace.load(one.save(tmp_path / f"{i}")) for i, one in enumerate((trace, wrong, oracle))))
    assert found.commands
    for text in (found.to_text(), to_markdown([("x", found)])):
        assert r"odd\x1b[31m" in text
        assert "\x1b" not in text


def test_loading_what_is_not_safetensors_says_so_and_a_missing_file_is_an_os_error(tmp_path):
    (tmp_path / "x").write_bytes(b"not a trace at all, but long enough")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Trace.load(tmp_path / "x")
    with pytest.raises(ValueError, match="is a directory"):
        Trace.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "nowhere")


@pytest.mark.parametrize("read", [Trace.load, read_meta, read_inputs])
def test_what_is_no_file_is_told_by_its_name(read, tmp_path):
    """safetensors says "No such device (os error 19)"."""
    os.mkfifo(tmp_path / "pipe")
    for path, found in ((tmp_path, "a directory"), (tmp_path / "pipe", "a pipe"), (os.devnull, "no regular file")):
        with pytest.raises(ValueError, match=f"{path} is {found}, expected "):
            read(path)


def test_shapes_that_contradict_each_other_are_all_listed(trace, tmp_path):
    trace.tensors["hidden_states.1"] = trace.tensors["hidden_states.1"][:, :-1]
    trace.tensors["final_hidden_state"] = trace.tensors["final_hidden_state"][..., :-1]
    trace.tensors["attention_mask"] = np.ones((B, T + 1), np.int64)
    trace.tensors["generated_ids"] = np.zeros((B + 1, 4), np.int64)
    with pytest.raises(ValueError, match=r"4 problem") as caught:
        trace.save(tmp_path / "x")
    for part in ("hidden_states.1", "different sizes", "attention_mask", "generated_ids"):
        assert part in str(caught.value)


def test_a_mask_with_other_values_than_zero_and_one_is_refused(trace, tmp_path):
    trace.tensors["attention_mask"][0, 0] = 2
    with pytest.raises(ValueError, match="other than 0"):
        trace.save(tmp_path / "x")


def test_a_trace_without_a_mask_means_every_position(trace):
    del trace.tensors["attention_mask"]
    assert trace.mask.shape == (B, T)
    assert trace.mask.all()


def test_bfloat16_tensors_of_other_writers_are_widened_exactly(tmp_path):
    # Bits of 1.0, -2.5, NaN and 2**-130 (subnormal) in bfloat16.
    bits = np.array([0x3F80, 0xC020, 0x7FC0, 0x0008], np.uint16)
    document = json.dumps(make_meta(backend="torch", dtype="bfloat16", input_hash="x"))
    header = {
        "__metadata__": {"tandem": document},
        "logits": {"dtype": "BF16", "shape": [1, 2, 2], "data_offsets": [0, 8]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bits.tobytes())
    logits = Trace.load(tmp_path / "x").tensors["logits"]
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits.ravel(), np.float32([1.0, -2.5, np.nan, 2.0**-130]))


def test_a_dtype_that_numpy_cannot_hold_is_named(tmp_path):
    document = json.dumps(make_meta(backend="torch", dtype="bfloat16", input_hash="x"))
    header = {
        "__metadata__": {"tandem": document},
        "logits": {"dtype": "F8_E4M3", "shape": [1, 1, 2], "data_offsets": [0, 2]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    with pytest.raises(ValueError, match="F8_E4M3"):
        Trace.load(tmp_path / "x")


def test_the_input_hash_does_not_depend_on_the_integer_type_or_on_a_mask_of_ones():
    ids = np.arange(6).reshape(2, 3)
    expected = input_hash(ids)
    assert input_hash(ids.astype(np.int32), np.ones((2, 3), bool)) == expected
    assert input_hash(np.asfortranarray(ids), position_ids=None, pixel_values=None) == expected


def test_the_input_hash_does_not_depend_on_the_type_of_floats():
    ids, pixels = np.arange(6).reshape(2, 3), np.float32([[0.5, -3.0]])
    expected = input_hash(ids, pixel_values=pixels)
    for dtype in (np.float16, np.float64, to_numpy("BF16")):
        assert input_hash(ids, pixel_values=pixels.astype(dtype)) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"input_ids": np.arange(6).reshape(3, 2)},
        {"input_ids": np.arange(1, 7).reshape(2, 3)},
        {"attention_mask": np.array([[1, 1, 1], [1, 1, 0]])},
        {"position_ids": np.arange(6).reshape(2, 3)},
        {"pixel_values": np.zeros((2, 3), np.float32)},
        {"image_grid_thw": np.ones((1, 3), np.int64)},
    ],
)
def test_the_input_hash_depends_on_every_name_shape_and_value(changed):
    assert input_hash(**{"input_ids": np.arange(6).reshape(2, 3), **changed}) != input_hash(np.arange(6).reshape(2, 3))


def test_an_input_that_is_no_number_is_refused_by_name():
    with pytest.raises(ValueError, match="pixel_values"):
        input_hash(np.zeros((1, 1), int), pixel_values=np.array(["a"]))
