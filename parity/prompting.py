"""Text and image files to what a model takes, by the tokenizer and the image processor that lie in the checkpoint.

Both are the checkpoint's own, read by transformers: the optional extra ``processor``. What is made of them is NumPy.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loaders.sources import open_source
from loaders.spec import ModelConfig
from parity.errors import DeviceNotFound

_READ = (".json", ".txt", ".jinja", ".model")  # of tokenizers and processors


@dataclass(frozen=True)
class Prompt:
    """A row of tokens and what it shows, under the Hugging Face processor's names; ``decode`` makes text of tokens."""

    inputs: dict[str, np.ndarray]
    tokenizer: Any

    @property
    def is_templated(self) -> bool:
        """Whether the checkpoint has a chat template; without one the text stands as it is."""
        return self.tokenizer.chat_template is not None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, without those that only mark."""
        return self.tokenizer.decode(list(map(int, token_ids)), skip_special_tokens=True)


def read_prompt(
    checkpoint: str | os.PathLike[str], config: ModelConfig, text: str, images: Sequence[str | os.PathLike[str]] = ()
) -> Prompt:
    """Tokens of a text after images, as the checkpoint's chat template puts them where it has one.

    Args:
        checkpoint: a directory, or an address, with its tokenizer and, for images, preprocessor_config.json.
        config: of the checkpoint.
        text: what is asked.
        images: files that Pillow reads.
    Raises:
        DeviceNotFound: the extra ``processor`` is not installed.
        ValueError: images for a model that sees none, a tokenizer that does not know their placeholder, or another
            number of placeholders in the prompt than images.
        OSError: a file is not there, or is no image.
    """
    with _at_hand(checkpoint) as directory:
        try:
            return _read(directory, config, text, images)
        except ValueError as error:
            raise ValueError(str(error).replace(os.fspath(directory), os.fspath(checkpoint))) from error


@contextmanager
def _at_hand(checkpoint: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory with the files that transformers reads: the checkpoint's own, or copies of those at an address."""
    if "://" not in os.fspath(checkpoint):
        yield Path(checkpoint)
        return
    with tempfile.TemporaryDirectory(prefix="tandem-") as copies:
        source = open_source(checkpoint)
        for name in source.names():
            if name.endswith(_READ):
                Path(copies, name).write_bytes(source.read_file(name))
        yield Path(copies)


def _read(directory: Path, config: ModelConfig, text: str, images: Sequence[str | os.PathLike[str]]) -> Prompt:
    tokenizer, open_images = _libraries(directory)
    tower = config.vision
    if images and tower is None:
        raise ValueError(f"{len(images)} images for {config.architecture}, which sees nothing. Leave --image out.")
    pad = tokenizer.convert_ids_to_tokens(tower.image_token_id) if images and tower is not None else None
    if images and pad in (None, tokenizer.unk_token):
        raise ValueError(f"the tokenizer does not know image_token_id={tower and tower.image_token_id} of config.json")
    token_ids = tokenizer(_spelled(tokenizer, config, text, pad, len(images)), add_special_tokens=False)["input_ids"]
    if not token_ids:
        raise ValueError(
            f"the prompt has no tokens. Is it empty, or does {os.fspath(directory)} lack its tokenizer's files"
            " (tokenizer.json)? Copy them there, or give --prompt-ids"
        )
    if not images or tower is None:
        return Prompt({"input_ids": np.array([token_ids], np.int64)}, tokenizer)
    if (held := token_ids.count(tower.image_token_id)) != len(images):
        why = "the chat template leaves images out" if held < len(images) else f"leave {pad!r} out of the text"
        raise ValueError(
            f"the prompt holds {held} image placeholders {pad!r}, expected {len(images)}, one of each image: {why}"
        )
    shown = open_images(images)
    counts = iter(shown["image_grid_thw"].prod(axis=1) // tower.merged)
    grown = [
        one for token in token_ids for one in [token] * (int(next(counts)) if token == tower.image_token_id else 1)
    ]
    ids_BT = np.array([grown], np.int64)
    types_BT = (ids_BT == tower.image_token_id).astype(np.int64)
    return Prompt({"input_ids": ids_BT, "mm_token_type_ids": types_BT, **shown}, tokenizer)


def _spelled(tokenizer: Any, config: ModelConfig, text: str, pad: str | None, count: int) -> str:
    """The prompt as text, one placeholder for each image."""
    if tokenizer.chat_template is not None:
        said = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": text}]
        content: Any = said if count else text
        message = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return (pad or "") * count + text


def _libraries(directory: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The checkpoint's tokenizer, and what opens image files."""
    try:
        from PIL import Image, ImageOps
        from transformers import AutoImageProcessor, AutoTokenizer
    except ModuleNotFoundError as error:
        raise DeviceNotFound(
            f"text and images need the package {error.name}: pip install '.[processor]' in Tandem's own directory"
        ) from error

    def open_images(files: Sequence[str | os.PathLike[str]]) -> dict[str, np.ndarray]:
        processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
        pictures = []
        for file in files:
            with Image.open(file) as picture:
                pictures.append(ImageOps.exif_transpose(picture).convert("RGB"))  # as a camera was held
        found = processor(images=pictures, return_tensors="np")
        return {name: np.asarray(found[name]) for name in ("pixel_values", "image_grid_thw")}

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _older_template(Path(directory) / "chat_template.json")
    return tokenizer, open_images


def _older_template(file: Path) -> Any:
    """The chat template of a file of its own, where processors used to keep it; None: there is none."""
    if not file.is_file():
        return None
    try:
        template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no JSON object with a chat_template: {error!r}") from error
    if not isinstance(template, str):
        raise ValueError(f"{file}: chat_template is {type(template).__name__}, expected a string")
    return template
