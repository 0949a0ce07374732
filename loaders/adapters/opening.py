"""LoRA adapters in PEFT's format: opened, checked against a model, and read whole, before anything changes.

    delta = scaling * B @ A                      added to a weight [out, in]; of an embedding to its transpose
    scaling = alpha / r, or alpha / sqrt(r)      with the ranks and alphas of the module's patterns

Values are widened to float32, exactly. Source: peft 0.21; checked against PEFT itself in tests/models/test_lora.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from loaders.adapters.config import read_adapter_config
from loaders.adapters.files import open_adapter_files
from loaders.adapters.reading import ReadBase, Reading
from loaders.adapters.updates import Adapter
from loaders.errors import CheckpointError
from loaders.spec import ModelConfig


def open_on_all(
    uri: str | os.PathLike[str],
    config: ModelConfig,
    read_base: ReadBase,
    *,
    together: Callable[[Callable[[], Adapter]], Adapter],
    check_alike: Callable[[str, Callable[[], str]], object],
) -> Adapter:
    """As ``open_adapter``, on each of several processes, which have to find the same adapter.

    Args:
        uri: of the adapter, for this process.
        config: of the model it is for.
        read_base: as of ``open_adapter``, of one that all processes have to ask alike.
        together: runs something on all of them; what one raises, all do.
        check_alike: raises ValueError on all where they differ in something: what it is, and what it is here.
    """
    asked: set[str] = set()

    def opened(read_base: ReadBase) -> Adapter:
        return together(lambda: open_adapter(uri, config, read_base=read_base))

    adapter = opened(asked.add)  # it returns None: nothing is compared yet, as that takes all processes
    check_alike("the adapter that was found", lambda: f"{adapter.digest[:16]} {sorted(asked)}")
    tables = {name: table for name in sorted(asked) if (table := read_base(name)) is not None}
    if not tables:
        return adapter
    compared = opened(tables.get)

    def unchanged() -> Adapter:
        if compared.digest != adapter.digest:
            raise CheckpointError(uri, ["it changed while it was read. Attach it again once it is complete."])
        return compared

    return together(unchanged)


def open_adapter(uri: str | os.PathLike[str], config: ModelConfig, *, read_base: ReadBase | None = None) -> Adapter:
    """Open an adapter directory and check all of it against a model.

    Args:
        uri: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        config: of the model it is for.
        read_base: a parameter of that model by name, on the host; None where it is not held here. PEFT writes the
            base's embedding beside an adapted one, and loads it over the base's: it must be the same. What cannot be
            compared is left out unseen: without ``read_base``, on a stage that lacks the table, or of a quantised head.
    Raises:
        CheckpointError: listing options that are not implemented, tensors that are missing, unexpected or of the wrong
            shape or dtype, halves without the other, ranks that are not what the config says, values that are no
            numbers, and base tensors that differ; or saying which file changed while it was read.
    """
    opened, problems = open_adapter_files(uri)
    adapter_config, found = read_adapter_config(opened.document) if opened.document is not None else (None, [])
    if adapter_config is None or problems:
        raise CheckpointError(uri, problems + found)
    adapter, more = Reading(opened, adapter_config, config, read_base, is_partial=bool(found)).adapter()
    if found or more:
        raise CheckpointError(uri, found + more)
    opened.files.check()
    return adapter
