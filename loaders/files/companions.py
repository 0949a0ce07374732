"""Files that lie beside a checkpoint and are no part of the model: tokenizer, chat template, preprocessors."""

from __future__ import annotations

from fnmatch import fnmatchcase

from loaders.errors import CheckpointError, reason
from loaders.sources import Source

# as transformers' tokenizers and processors name them
NAMES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", "*preprocessor_config.json", "processor_config.json"),
)


def companions(source: Source) -> dict[str, bytes]:
    """Name -> bytes of those that are there.

    Raises:
        CheckpointError: listing all that cannot be read.
    """
    found: dict[str, bytes] = {}
    problems: list[str] = []
    for name in source.names():
        if any(fnmatchcase(name, pattern) for pattern in NAMES):
            try:
                found[name] = source.read_file(name)
            except IsADirectoryError:  # somebody's own, that happens to be called so
                continue
            except OSError as error:
                problems.append(f"{name} cannot be read: {reason(error)}")
    if problems:
        raise CheckpointError(source, problems)
    return found
