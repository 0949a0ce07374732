"""What the names in ``adapter_model.safetensors`` mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(
    r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\.(?:(?P<half>lora_[AB])\.weight|(?P<table>lora_embedding_[AB]))"
)
_WRAPPED = re.compile(r"\.(?:base_layer|original_module)\.")  # the base's own, in a wrapper of PEFT's
COPY = ".modules_to_save."  # of the other one, which PEFT writes a second time with tables (``save_embedding_layers``)
# where text models stand in transformers' classes; a multimodal one's adapters fit its text model and the other way
_TEXT_PATHS = ("model.language_model", "model")


@dataclass(frozen=True, slots=True)
class Nested:
    """A module, or a tensor, by our path; ``level``: how many wrappers of PEFT's are around what it wraps here."""

    path: str
    level: int = 0


@dataclass(frozen=True, slots=True)
class Key:
    """A tensor of an adapter.

    Attributes:
        place: of the module whose update it is a half of; or, where ``half`` is empty, the tensor it stands for.
        half: ``lora_A``, ``lora_B``, ``lora_embedding_A``, ``lora_embedding_B``; empty: a whole tensor.
        spelled: how the adapter's model spells the path of the text model; empty where it is not in it.
    """

    place: Nested
    half: str
    spelled: str


def module_in(name: str, path: str) -> str | None:
    """The module a tensor is of, if it stands under ``path``, also where that is spelled without ``model.``."""
    name = name.removeprefix(_PREFIX)
    if not any(name.startswith(f"{one}.") for one in (path, path.removeprefix("model."))):
        return None
    module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
    return module.removesuffix(".base_layer")


def parse_key(name: str, text_paths: Sequence[str]) -> Key | None:
    """The meaning of a name; None: it has none. ``text_paths``: of the model, ours first."""
    if not name.startswith(_PREFIX):
        return None
    name = name.removeprefix(_PREFIX)
    match = _LOW_RANK.fullmatch(name)
    if match is not None:
        half, path, level = match["half"] or match["table"], match["module"], match["nested"].count(".base_layer")
    elif "lora_" in name:
        return None
    else:
        half, path, level = "", _WRAPPED.sub(".", name), len(_WRAPPED.findall(name))
    for spelled in dict.fromkeys((*text_paths, *_TEXT_PATHS)):
        if path.startswith(f"{spelled}.") and not path.startswith(f"{spelled}.language_model."):
            return Key(Nested(text_paths[0] + path[len(spelled) :], level), half, spelled)
    return Key(Nested(path, level), half, "")
