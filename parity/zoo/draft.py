"""A zoo model whose draft is often right: random drafts never are, and then speculation has nothing to accept."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from loaders import dtypes, open_checkpoint
from loaders.writing.writer import write_checkpoint
from parity.zoo.checkpoints import make_checkpoint

# what a branch adds to the residual stream goes through one of these
_BRANCH_ENDS = re.compile(r"(o_proj|out_proj|down_proj)(\.weight)?$")


def make_drafting_checkpoint(
    name: str,
    directory: str | os.PathLike[str],
    *,
    quiet: float = 0.25,
    draft_quiet: float | None = None,
    **options: Any,
) -> Path:
    """Write a zoo model that listens more to its last token than to the rest, and a draft that knows what it says.

    The draft's ``fc`` hands on the embedding alone, and its norm is the model's: with branches of nothing, both would
    say ``head(norm(embedding))``. The louder the branches, the more both depend on what came before, and the less
    often they agree.

    Args:
        name: key of ``ZOO``, of a model with a draft.
        directory: new or empty.
        quiet: what the ends of the model's branches are multiplied by.
        draft_quiet: of the draft's; None: ``quiet``.
        options: of ``make_checkpoint``.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        plain = open_checkpoint(make_checkpoint(name, Path(scratch) / "plain", **options))
        norm = f"{plain.config.text_paths[0]}.norm.weight"
        size = plain.config.hidden_size

        def read(tensor: str) -> np.ndarray:
            value = plain.read("mtp.norm.weight" if tensor == norm else tensor)
            if tensor == "mtp.fc.weight":
                value = np.concatenate([np.eye(size), np.zeros((size, size))], axis=1).astype(value.dtype)
            elif tensor == "mtp.pre_fc_norm_embedding.weight":
                value = np.zeros_like(value)
            elif _BRANCH_ENDS.search(tensor) and "visual" not in tensor:
                factor = quiet if not tensor.startswith("mtp.") or draft_quiet is None else draft_quiet
                value = (value.astype(np.float32) * factor).astype(value.dtype)
            assert dtypes.from_numpy(value.dtype) == plain.tensors[tensor].dtype
            return value

        return write_checkpoint(
            directory, plain.tensors, read, config=plain.config_document, generation=plain.generation_document
        )
