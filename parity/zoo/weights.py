"""The weights of the zoo: drawn tensor by tensor from a name and a seed, so that none is what a library initialises.

The size of every kind of weight is tuned; what that gives is checked in tests/parity/test_zoo.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from loaders.expand import expand
from loaders.families import family_module
from loaders.reading.place import place_of
from loaders.spec import ModelConfig, ParamSpec, Rule, Specs
from loaders.stage import Stage
from loaders.writing.writer import TensorType
from parity.zoo.models import Form, ZooModel

# Canary tokens: rows of the embedding that show what ordinary rows hide.
TINY_TOKEN, TINY_SCALE = 11, 1e-2  # its mean square is near rms_norm_eps: a wrong eps shows at once
HUGE_TOKEN, HUGE_SCALE = 13, 30.0  # overflow, and the maximum that a scale is computed from
TWIN_TOKENS = (16, 17)  # equal rows; in a tied model equal logits, where argmax must take the first
SMALLEST_VOCAB = 19

# Standard deviation of a weight times sqrt(fan-in), by the tensor's axes; all others 1.5. Tuned so that every attention
# and MLP adds about 1 to a residual stream that starts at 1.
GAINS = {
    "D NH": 2.0,  # averaging over keys has made its input smaller
    "D F": 1.2,
    "D M": 1.2,
    "E D": 2.0,  # the choice of experts must survive bf16, and the last one chosen must still be heard
}
LOGIT_GAIN = 3.0  # standard deviation of the logits, nearly
# Range of exp(A_log) and mean of dt_bias: a linear-attention state that neither stays nor goes at once. It keeps about
# 0.8 a token; at 0.3 (a mean of -1) outputs are made of a token or two, and where those cancel their norm is noise.
DECAYS, DT_BIAS = (0.5, 8.0), -3.0
# Half of a delta net's key heads are so small that the eps of their l2 norm shows; no token's size gets there.
QUIET_KEYS = 0.03
ALWAYS_F32 = ("A_log", "linear_attn.norm.weight")  # published so among bfloat16


@dataclass(frozen=True)
class Weight:
    """One tensor to write: its shape, its dtype where the zoo does not leave the choice, and its float64 values."""

    shape: tuple[int, ...]
    dtype: str | None
    draw: Callable[[], np.ndarray]


def zoo_weights(
    name: str,
    model: ZooModel,
    config: ModelConfig,
    *,
    seed: int,
    experts: tuple[Form, Form],
    text_path: str,
    ship_tied_head: bool,
) -> dict[str, Weight]:
    """Every tensor of a zoo model in the order of the family's table.

    Args:
        name: key of ``ZOO``; with ``seed`` and a tensor's own name it decides its values.
        model: the entry.
        config: its configuration, overrides included.
        seed: see ``name``.
        experts: form of the experts, then of the draft's. A fused tensor holds the values of those it is fused from.
        text_path: path of the text model in tensor names.
        ship_tied_head: with the redundant head of a tied model.
    """
    rules = family_module(config.architecture).RULES
    forms = {rule.tensor: experts[rule.on == "mtp"] for rule in rules}
    plain = _expand(rules, config, dict.fromkeys(forms, "per expert"))
    written = _expand(rules, config, forms, text_path)
    parts = {spec.name: spec for spec in plain}
    shapes = {placement.tensor: spec.tensor_shape for spec in plain for placement in spec.placements}

    def draw(tensor: str) -> np.ndarray:
        rng = np.random.default_rng(list(hashlib.sha256(f"{name}\n{seed}\n{tensor}".encode()).digest()))
        return _draw(plain.rules[tensor], config, model.gains, rng, shapes[tensor])

    found: dict[str, tuple[Rule, Weight]] = {}
    for spec in written:
        for number, placement in enumerate(spec.placements):
            rule, part = written.rules[placement.tensor], parts[spec.name]
            dtype = "F32" if rule.tensor.endswith(ALWAYS_F32) else None
            if spec.tensor_shape == part.tensor_shape:  # of one expert there is one placement in either form
                values = partial(draw, part.placements[number].tensor)
            else:
                values = partial(_fused, spec, part, draw)
            found[placement.tensor] = rule, Weight(spec.tensor_shape, dtype, values)
    for tied in written.tied if ship_tied_head else ():
        found[tied.tensor] = written.rules[tied.tensor], Weight(tied.shape, None, partial(draw, tied.same_as))
    order = {rule.tensor: number for number, rule in enumerate(rules)}
    return {tensor: found[tensor][1] for tensor in sorted(found, key=lambda tensor: order[found[tensor][0].tensor])}


def _expand(rules: Sequence[Rule], config: ModelConfig, forms: Mapping[str, str], text_path: str = "") -> Specs:
    """The whole model and its draft, every parameter in the form that ``forms`` has for its tensors."""
    chosen = [rule for rule in rules if rule.form in ("", forms[rule.tensor])]
    named = {f"{text_path}.embed_tokens.weight": TensorType("F32", ())} if text_path else {}
    return expand(chosen, config, Stage(mtp=config.num_mtp_layers > 0), named)


def _fused(spec: ParamSpec, part: ParamSpec, draw: Callable[[str], np.ndarray]) -> np.ndarray:
    values = np.empty(spec.shape)
    for placement in part.placements:
        values[placement.index] = draw(placement.tensor)
    return place_of(values, spec, spec.placements[0])


def _draw(
    rule: Rule, config: ModelConfig, gains: Mapping[str, float], rng: np.random.Generator, shape: tuple[int, ...]
) -> np.ndarray:
    """Weights of one tensor in float64, by what its axes and its place say it is."""
    if rule.tensor.endswith("A_log"):
        return np.log(rng.uniform(*DECAYS, shape))
    values = rng.standard_normal(shape)
    if rule.on == "embedding":
        return _with_canaries(values, config)
    if rule.tensor.endswith(".bias"):
        return 0.3 * values
    if rule.tensor.endswith("dt_bias"):
        return values + DT_BIAS
    if rule.is_table:
        return values
    if len(shape) == 1:
        centre = gains.get(rule.tensor.split(".")[-2], 1.0)
        return (centre - 1 if rule.zero_centred else centre) + 0.3 * values
    gain = LOGIT_GAIN if rule.on == "head" else gains.get(rule.dims, GAINS.get(rule.dims, 1.5))
    values = values * (gain / np.sqrt(np.prod(shape[1:])))
    if rule.tensor.endswith("linear_attn.conv1d.weight"):
        sizes = config.dims()
        keys = (sizes["QKV"].size - sizes["LV"].size) // 2  # channels of all queries, then of all keys, then values
        values[keys : keys + keys // 2] *= QUIET_KEYS
    return values


def _with_canaries(values_VD: np.ndarray, config: ModelConfig) -> np.ndarray:
    if config.tie_word_embeddings:
        values_VD = values_VD * (LOGIT_GAIN / np.sqrt(values_VD.shape[1]))  # it is the head too
    values_VD[TINY_TOKEN] *= TINY_SCALE
    if not config.tie_word_embeddings:
        values_VD[HUGE_TOKEN] *= HUGE_SCALE  # as a head row it would win every argmax, and then predict itself for ever
    values_VD[TWIN_TOKENS[1]] = values_VD[TWIN_TOKENS[0]]
    return values_VD
