"""config.json -> frozen dataclasses: every key is read, declared inert, or refused by name.

Both spellings in use are accepted (``rope_theta``/``rope_scaling``/``torch_dtype`` and ``rope_parameters``/``dtype``).
``dtype`` is read by nobody: a dtype is a property of each tensor, and exporters write wrong ones there.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from loaders.errors import brief
from loaders.families import FAMILIES, family_module
from loaders.quantization.documents import KEY, read_recipes
from loaders.quantization.rules import agreed
from loaders.spec import ModelConfig

# Keys that never change what the model computes.
INERT = frozenset(
    """architectures model_type transformers_version torch_dtype dtype use_cache initializer_range bos_token_id
    attention_dropout output_attentions output_hidden_states output_router_logits return_dict _name_or_path name_or_path
    _commit_hash id2label label2id problem_type chunk_size_feed_forward tokenizer_class router_aux_loss_coef
    max_window_layers use_bfloat16 torchscript tf_legacy_loss _attn_implementation_autoset""".split()
)
# Keys whose only implemented value is the one that switches the feature off.
OFF: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "auto_map": (None,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeParameters:
    """Rotary embedding, under the keys of ``rope_parameters``. Source: transformers ``modeling_rope_utils``."""

    rope_type: str
    rope_theta: float
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0  # of a head's dimensions, the first so many turn
    mrope_section: tuple[int, ...] | None = None  # pairs that turn by time, height and width; None: by one position
    mrope_interleaved: bool = False

    @property
    def is_dynamic(self) -> bool:
        """Frequencies depend on the length of the sequence, not on the position alone."""
        return self.rope_type == "dynamic"


ROPE_KEYS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "dynamic": {"rope_theta", "factor"},
    "yarn": {
        *("rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
}
PARTIAL_KEYS = frozenset({"partial_rotary_factor", "mrope_section", "mrope_interleaved"})
# Stands in for rotary parameters that could not be read, so that what is wrong with them is said once.
UNREAD_ROPE = RopeParameters(rope_type="default", rope_theta=1e4, mrope_section=(1, 1, 1), mrope_interleaved=True)


def config_from_json(
    document: dict[str, Any], *, beside: Any = None, found: Collection[str] = ()
) -> tuple[ModelConfig | None, list[str]]:
    """The configuration a config.json describes, or None and every problem found in it.

    Args:
        document: config.json.
        beside: hf_quant_config.json, or None.
        found: tensors of the checkpoint: they decide how modules are spelled in its quantisation documents.
    """
    architectures = document.get("architectures")
    known = ", ".join(sorted(FAMILIES))
    if not isinstance(architectures, list) or len(architectures) != 1:
        return None, [f"config.json: architectures is {brief(architectures)}, expected a list of one of: {known}"]
    architecture = architectures[0]
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        return None, [f"config.json: architecture {brief(architecture)} is unknown. Known: {known}"]
    family = family_module(architecture)
    recipes, problems = read_recipes(document.get(KEY), beside)
    config, more = family.config_from_json(architecture, _without_quantization(document))
    if problems or more or config is None:
        return None, problems + more
    if not recipes:
        return config, []
    quantization, problems = agreed(recipes, family.RULES, config, found)
    return (None, problems) if problems else (dataclasses.replace(config, quantization=quantization), [])  # pyright: ignore[reportArgumentType, reportCallIssue]


def _without_quantization(document: dict[str, Any]) -> dict[str, Any]:
    """config.json as it would be unquantised. Wrapped models may say the same once more in ``text_config``."""
    plain = {key: value for key, value in document.items() if key != KEY}
    inner = plain.get("text_config")
    if isinstance(inner, dict) and KEY in document and inner.get(KEY) == document[KEY]:
        plain["text_config"] = {key: value for key, value in inner.items() if key != KEY}
    return plain


def read_fields(cls: type, document: dict[str, Any]) -> tuple[Any, list[str]]:
    """Build the dataclass ``cls`` from a config.json in its spelling; None when a field is unusable; all problems.

    A key ``cls`` has no field for must be in ``INERT`` or hold an off value of ``OFF``. null counts as absent where the
    field has a default or may be None.
    """
    values, unread, problems = _read(cls, document)
    return (None if unread else cls(**values)), problems


def read_config(cls: type, document: dict[str, Any]) -> tuple[Any, list[str]]:
    """``read_fields`` of a model's configuration, and what that finds wrong with itself, all of it at once.

    What is wrong with a field hides what depends on it and nothing else: the rest is asked again with what is harmless
    in its place, and sentences that name it do not count.
    """
    values, bad, problems = _read(cls, document)
    types = typing.get_type_hints(cls)
    while True:
        config = cls(**values | {name: _harmless(types[name]) for name in bad})
        found = [one for one in config.problems() if one not in problems and not _names(one) & bad]
        if not found:
            return (None if problems else config), problems
        problems += found
        bad |= {field.name for field in dataclasses.fields(cls)} & set().union(*map(_blamed, found))


def _names(problem: str) -> set[str]:
    """Words of a sentence that may be fields; the tower's own names are not the text model's."""
    return set(re.findall(r"\w+", re.sub(r"vision_config: \w+", "", problem)))


def _blamed(problem: str) -> set[str]:
    return {"vision"} if "vision_config: " in problem else _names(problem)


def _harmless(kind: Any) -> Any:
    if type(None) in typing.get_args(kind):
        return None
    plain: dict[Any, Any] = {int: 1, float: 1.0, bool: False, str: "", RopeParameters: UNREAD_ROPE}
    return () if typing.get_origin(kind) is tuple else plain[kind]


def _read(cls: type, document: dict[str, Any]) -> tuple[dict[str, Any], set[str], list[str]]:
    """Values by field, fields that cannot be read, and every problem; see ``read_fields``."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    unread: set[str] = set()
    types = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, field in fields.items():
        found = document.get(name)
        optional = field.default is not dataclasses.MISSING
        if found is None and (name not in document or optional):
            if not optional:
                unread.add(name)
                problems.append(f"config.json: {name} is missing. Is the file complete?")
            continue
        try:
            values[name] = _convert(types[name], found)
        except (TypeError, OverflowError):  # an integer that no float can hold
            unread.add(name)
            problems.append(f"config.json: {name} is {brief(found)}, expected {_spell(types[name])}")
    return values, unread, problems + refused_keys(document, set(fields))


def refused_keys(document: dict[str, Any], read: set[str]) -> list[str]:
    """A problem for every key that is neither read, inert, nor switched off."""
    problems = []
    for key, value in document.items():
        if key in read or key in INERT:
            continue
        if key not in OFF:
            found = f"option {brief(key)} = {brief(value)}"
            problems.append(f"config.json: {found} is not implemented. Remove it if no result depends on it.")
        elif value not in OFF[key]:
            found = f"option {key!r} = {brief(value)}"
            problems.append(f"config.json: {found} is not implemented, expected {OFF[key][0]!r}")
    return problems


def with_rope_defaults(document: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A config.json with a family's rotary defaults under ``rope_parameters``, whichever way it spells the rest.

    What ``read_rope`` will refuse is left as it is.
    """
    given, problems = _one_rope(document)
    if problems:
        return document
    return document | {"rope_parameters": defaults | given, "rope_scaling": None}


def _one_rope(document: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What ``rope_parameters`` or ``rope_scaling`` says, without nulls; a problem where they say two things."""
    said: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = document.get(name)
        if given is not None and not isinstance(given, dict):
            return {}, [f"config.json: {name} is {brief(given)}, expected an object"]
        if plain := {key: value for key, value in (given or {}).items() if value is not None}:
            said[name] = plain
    nested, scaling = said.get("rope_parameters", {}), said.get("rope_scaling", {})
    if nested and scaling and _named(nested, scaling) != _named(scaling, nested):
        both = " and ".join(f"{name} {brief(document[name])}" for name in said)
        return {}, [f"config.json: {both} disagree. Remove one."]
    return scaling | nested, []


def _named(rope: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters to be held against ``other``: ``type`` by its newer name, and a theta that one leaves out."""
    plain = {"rope_theta": other.get("rope_theta")} | {key: value for key, value in rope.items() if key != "type"}
    return plain | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}


def read_rope(
    document: dict[str, Any], more_keys: frozenset[str] = frozenset()
) -> tuple[RopeParameters | None, list[str]]:
    """Rotary parameters from either spelling: ``rope_parameters``, or ``rope_theta`` with ``rope_scaling``.

    ``more_keys``: of ``PARTIAL_KEYS``, those that the family implements.
    """
    theta, longest = document.get("rope_theta"), document.get("max_position_embeddings")
    rope, problems = _one_rope(document)
    if problems:
        return None, problems
    problems = [
        f"config.json: rope_theta is {brief(theta)} beside {brief(rope[key])} in rope_parameters. Remove one."
        for key in ("rope_theta",)
        if theta is not None and rope.get(key, theta) != theta
    ]
    if rope.get("type", rope.get("rope_type")) != rope.get("rope_type", rope.get("type")):
        both = f"rope type {brief(rope['type'])} and rope_type {brief(rope['rope_type'])}"
        problems.append(f"config.json: {both} disagree")
    rope_type = rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        known = ", ".join(ROPE_KEYS)
        return None, [*problems, f"config.json: rope_type {brief(rope_type)} is not implemented. Known: {known}"]
    for key in sorted(set(rope) - ROPE_KEYS[rope_type] - more_keys - {"rope_type"}):
        option = f"{brief(key)} = {brief(rope.pop(key))}"
        problems.append(f"config.json: rope option {option} is not implemented for rope_type {rope_type!r}")
    if rope_type == "yarn" and isinstance(longest, int):
        original = rope.setdefault("original_max_position_embeddings", longest)
        if isinstance(original, int) and original > 0:
            rope.setdefault("factor", longest / original)
    elif rope_type != "default" and "factor" not in rope:
        problems.append(f"config.json: rope_type {rope_type!r} needs a factor")
    found, more = read_fields(RopeParameters, rope)
    if found is not None:
        least = {"rope_theta": 1, "factor": 0, "original_max_position_embeddings": 0}
        more += [
            f"config.json: rope option {key} is {value}, expected more than {bound}"
            for key, bound in least.items()
            if (value := getattr(found, key)) is not None and not value > bound
        ]
        more += [
            f"config.json: rope option {key} is {value}, expected 0 (its default) or more"
            for key in ("beta_fast", "beta_slow")
            if (value := getattr(found, key)) is not None and value < 0
        ]
    return (None if problems or more else found), problems + more


def _convert(kind: Any, found: Any) -> Any:
    """``found`` as ``kind``; TypeError when it is something else. bool is not an int, an int is a float."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(found, list | tuple):
            raise TypeError
        return tuple(_convert(options[0], item) for item in found)
    if options:  # X | None
        if found is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), found)
    if kind is float and type(found) in (int, float):
        return float(found)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise TypeError
    return found


def _spell(kind: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    options = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"a list, each {_spell(options[0])}"
    if options:
        return " or ".join("null" if option is type(None) else _spell(option) for option in options)
    return names.get(kind, "an object")
