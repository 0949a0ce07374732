"""Options that several verbs share."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any


def add_backend(parser: argparse.ArgumentParser) -> None:
    """What to compute in, and where."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype; default: the checkpoint's own")
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1, tpu, ...; default: cpu (torch), the first (jax)"
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """What to run on."""
    parser.add_argument(
        "--inputs", metavar="FILE", type=Path, help="safetensors with input_ids, attention_mask, position_ids"
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="also generate N tokens, greedily")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    parser.add_argument("--adapter", metavar="DIR", help="attach this PEFT adapter (LoRA), for every row")
    parser.add_argument("--mtp", action="store_true", help="also run the checkpoint's multi-token-prediction draft")
    parser.add_argument(
        "--weight-only",
        action="store_true",
        help="round neither inputs nor keys and values, whatever a quantised checkpoint says",
    )


def add_decode(parser: argparse.ArgumentParser) -> None:
    """How to run."""
    parser.add_argument(
        "--decode",
        metavar="N",
        type=int,
        default=0,
        help="read the last N tokens of every row one at a time, as generation does; default: all at once",
    )


def add_probes(parser: argparse.ArgumentParser) -> None:
    """How hard the oracle is to look for what a comparison could not see."""
    parser.add_argument(
        "--probes",
        metavar="N",
        type=int,
        help="try faults of one percent at N places, one or two passes of the oracle each; default: 64, and 6 of a"
        " checkpoint over 64 MiB",
    )


_READ = ("checkpoint", "reload", "like", "inputs", "adapter", "oracle", "oracle_b", "image", "x", "y")
_BEFORE = re.compile(r"^(?:[^/=]*=)?(?:(?:direct|runai)://|(?:jax|torch):)?")  # a path, where one is read


class OutputFile(type(Path())):
    """A file that is going to be written."""


def check_outputs(args: argparse.Namespace) -> None:
    """See that nothing is written over what is read, or twice over the same.

    Raises:
        ValueError: it would be.
    """
    names = [*_READ, *(("a", "b") if args.verb in ("compare", "lifecycle") else ())]  # elsewhere those are backends
    given = [one for name in names for one in _several(getattr(args, name, None))]
    # with what stands before it and without: a directory may be called "a=b" as well
    read = {os.path.realpath(text): one for one in given for text in (str(one), _BEFORE.sub("", str(one)))}
    held = {  # by directories that are read, whose files may be links to elsewhere
        os.path.realpath(file): where for where in read if os.path.isdir(where) for file in os.scandir(where)
    }
    linked = {(found.st_dev, found.st_ino): where for where in (*read, *held) if (found := _file_at(where)) is not None}
    outputs = [one for value in vars(args).values() for one in _several(value) if isinstance(one, OutputFile)]
    places = [os.path.realpath(one) for one in outputs]
    for output, place in zip(outputs, places, strict=True):
        if os.path.exists(place) and not os.path.isfile(place):
            continue  # a device or a pipe is written to, and keeps nothing
        if places.count(place) > 1:
            raise ValueError(f"{output} is to be written twice. Name different files.")
        if place in read:
            raise ValueError(f"{output} is read, and would be written over. Name another file.")
        if place in held:
            raise ValueError(f"{output} is a file of {read[held[place]]}, which is read. Name one elsewhere.")
        if (found := _file_at(place)) is not None and (there := linked.get((found.st_dev, found.st_ino))) is not None:
            raise ValueError(f"{output} is another name of {there}, which is read. Name another file.")


def _file_at(path: str) -> os.stat_result | None:
    """None: there is none, or something else."""
    return os.stat(path) if os.path.isfile(path) else None


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def output_file(text: str) -> OutputFile:
    """A file to write, of an option: what is wrong with it is said before anything runs.

    Nothing is made or opened: it may be a pipe.
    """
    path = OutputFile(text)
    if ":/" in text:  # else `compare` would import the loaders for it
        from loaders.writing.new_directory import local_path

        try:
            local_path(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    try:
        where = Path(os.path.realpath(path))
        where.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or none
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: {getattr(error, 'strerror', None) or error}") from error
    if where.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory, expected a file")
    if not where.exists() and not where.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no directory {where.parent}; make it first")
    asked, mode = (where, os.W_OK) if where.exists() else (where.parent, os.W_OK | os.X_OK)
    if not os.access(asked, mode, effective_ids=os.access in os.supports_effective_ids):
        raise argparse.ArgumentTypeError(f"{path} may not be written; name another file")
    return path


def add_reports(parser: argparse.ArgumentParser) -> None:
    """Where to write what was found."""
    for name, what in (("html", "a report to look at"), ("junit", "JUnit XML"), ("json", "JSON"), ("md", "Markdown")):
        parser.add_argument(f"--{name}", metavar="FILE", type=output_file, help=f"write {what}")
