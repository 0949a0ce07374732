"""What quantisation documents say that cannot be had is refused by name, all of it at once, and nothing crashes."""

import pytest
from recipes import ATTENTION, CT, FOUR, FP8, W4A4, beside, compressed, inside, mixed, problems_of, resolved


@pytest.mark.parametrize(
    "scheme",
    [
        "NVFP4",
        "INT8",
        {"num_bits": 8, "type": "int", "dynamic": False},
        {"num_bits": 8, "type": "float", "dynamic": True},
    ]
    + [{}, [], 8],
)
def test_other_kv_schemes_are_refused_by_name(scheme):
    assert "KV cache scheme" in problems_of(inside(kv_cache_scheme=scheme))[0]


@pytest.mark.parametrize(
    "algorithm",
    ["NVFP4_AWQ", "NVFP4_SVD", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"]
    + ["W4A16_AWQ", "nvfp4", "", None, 4, ["NVFP4"], {"NVFP4": 1}],
)
def test_an_algorithm_that_is_not_implemented_is_an_error_and_never_a_plain_model(algorithm):
    for found in (problems_of(inside(algorithm)), problems_of(None, beside(algorithm))):
        assert any("quant_algo" in problem and "is not implemented" in problem for problem in found)
    layers = {"model.layers.0.mlp.up_proj": {"quant_algo": algorithm}}
    assert any("is not implemented" in problem for problem in problems_of(mixed(layers)))


@pytest.mark.parametrize("size", [32, 128, "16", 0, [16]])
def test_blocks_of_another_size_are_refused_wherever_they_are_said(size):
    groups = {"group_0": {"weights": FOUR | {"group_size": size}, "targets": ["Linear"], "input_activations": FOUR}}
    for document, other in (
        (inside(group_size=size), None),
        (inside(config_groups=groups), None),
        (None, beside(group_size=size)),
        (compressed({"weights": CT | {"group_size": size}}), None),
    ):
        assert any("group_size is" in problem for problem in problems_of(document, other))


def test_documents_that_disagree_are_refused():
    def told(document, other):
        (problem,) = resolved(document, other)[1]
        assert problem.endswith("Which one is meant?")
        return problem

    both = "by config.json: quantization_config (and 13 more)"
    assert f"hf_quant_config.json: model.layers.0.mlp.down_proj is {FP8}, expected {W4A4} {both}" in told(
        inside(), beside("FP8")
    )
    assert "an FP8 cache with scales" in told(inside(kv_cache_scheme="FP8"), beside())
    other = beside(exclude_modules=["lm_head", ATTENTION[0]])
    assert f"hf_quant_config.json: {ATTENTION[0]} is not quantised, expected {W4A4}" in told(inside(), other)
    a, b = ({ATTENTION[0]: {"quant_algo": one}, ATTENTION[1]: {"quant_algo": "FP8"}} for one in ("FP8", "NVFP4"))
    other = beside("MIXED_PRECISION", quantized_layers=b, exclude_modules=[])
    assert f"{ATTENTION[0]} is {W4A4}, expected {FP8}" in told(mixed(a), other)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (compressed({"weights": CT | {"strategy": "channel"}}), "strategy is 'channel'"),
        (compressed({"weights": CT | {"num_bits": 8}}), "num_bits is 8"),
        (compressed({"weights": CT | {"type": "int"}}), "type is 'int'"),
        (compressed({"weights": CT | {"symmetric": False}}), "symmetric is False"),
        (compressed({"weights": CT | {"dynamic": True}}), "dynamic is True"),
        (compressed({"input_activations": CT | {"dynamic": True}}), "dynamic is True"),
        (compressed({"input_activations": CT}), "dynamic is False"),
        (compressed({"input_activations": CT | {"dynamic": "local", "num_bits": 8}}), "num_bits is 8"),
        (compressed({"output_activations": CT}), "output_activations"),
        (compressed({"targets": []}), "targets is []"),
        (compressed({"targets": None}), "targets is None"),
        (compressed({"targets": "Linear"}), "targets is 'Linear'"),
        (compressed(format="float-quantized"), "format 'float-quantized'"),
        (compressed({"format": "pack-quantized"}), "format 'pack-quantized'"),
        (compressed(format=None), "format None"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (compressed(transform_config={"config_groups": {}}), "transform_config"),
        (compressed(quantization_status="frozen"), "quantization_status"),
    ],
)
def test_what_compressed_tensors_can_say_and_is_not_implemented_is_refused_by_name(document, words):
    found = problems_of(document)
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "modelopt_fp8", None, 3, ["modelopt"]])
def test_a_method_that_is_unknown_is_an_error(method):
    assert "quant_method" in problems_of(inside(quant_method=method))[0]


ODD = (None, [], {}, "x", 3, True, [1], {"a": 1}, [[]], {"a": []}, {"a": {"weights": 3}}, ["re:("], ["re:(?i)x", "["])


KEYS = ("config_groups", "ignore", "exclude_modules", "quant_algo", "kv_cache_scheme", "quantized_layers", "group_size")
KEYS += ("quantization", "format", "sparsity_config", "quantization_status", "quant_method", "kv_cache_quant_algo")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_whatever_stands_under_a_key_is_read_or_refused_and_never_crashes(key, value):
    layers = {"a": {"quant_algo": "NVFP4"}}
    for document in (inside(), compressed(), mixed(layers), {"quant_method": "modelopt", **beside()}):
        problems_of(document | {key: value})
        problems_of(document | {key: value}, beside())
        resolved(document | {key: value}, beside())
    problems_of(None, {"quantization": beside()["quantization"] | {key: value}})
    problems_of(None, beside() | {key: value})
    problems_of(None, value)
    problems_of(value, None)


@pytest.mark.parametrize(
    "layers", [{"a": {"quant_algo": "FP8"}, "re:(": {"quant_algo": "FP8"}}, {}, {"a": 1}, [], None]
)
def test_a_table_of_layers_that_is_none_is_refused(layers):
    assert "quantized_layers" in problems_of(mixed(layers))[0]


@pytest.mark.parametrize("group", [3, None, [], {}, {"weights": None}, {"weights": []}])
def test_a_group_that_is_none_is_refused(group):
    document = compressed()
    document["config_groups"]["group_0"] = group
    assert problems_of(document)


def test_every_problem_is_told_at_once():
    document = compressed({"weights": CT | {"num_bits": 8, "type": "int"}}, kv_cache_scheme={"a": 1}, ignore=["re:("])
    assert len(problems_of(document)) == 4
