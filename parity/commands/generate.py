"""``tandem generate``: continue a prompt of token ids; or of text and images, by what the checkpoint has for them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from parity.commands.options import add_backend

BASE = "none"  # of --row-adapter
_OF_CHANCE = ("top_k", "top_p", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or address")
    parser.add_argument("--backend", choices=("jax", "torch"), default="jax")
    add_backend(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt-ids", metavar="IDS", action="append", help="comma-separated token ids; repeat for a batch"
    )
    prompt.add_argument("--prompt", metavar="TEXT", help="text, which the checkpoint's tokenizer reads; prints text")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="with --prompt: an image to see; may be repeated"
    )
    parser.add_argument(
        "--adapter",
        metavar="[NAME=]DIR",
        action="append",
        default=[],
        help="attach a PEFT adapter; repeat for several: the last one runs unless --row-adapter says otherwise",
    )
    parser.add_argument(
        "--row-adapter",
        metavar="NAME",
        action="append",
        help="adapter of one row, repeat for each --prompt-ids; 'none': the base alone",
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-k", metavar="K", type=int, help="with --temperature: of the best K tokens")
    parser.add_argument("--top-p", metavar="P", type=float, help="with --temperature: of the best that hold P together")
    parser.add_argument("--seed", type=int, help="with --temperature (default: 0)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    parser.add_argument(
        "--draft", action="store_true", help="speculate with the checkpoint's draft; stderr says what it was worth"
    )
    parser.add_argument("--draft-tokens", metavar="K", type=int, help="with --draft: guesses in a round (default: 3)")


def run(args: argparse.Namespace) -> int:
    from parity.backends import open_backend

    if args.draft_tokens is not None and not args.draft:
        raise ValueError("--draft-tokens goes with --draft")
    if args.temperature == 0 and (unused := [name for name in _OF_CHANCE if vars(args)[name] is not None]):
        options = " and ".join("--" + name.replace("_", "-") for name in unused)
        raise ValueError(f"{options}: goes with a --temperature above 0; without one every token is the best one")
    if args.image and args.prompt is None:
        raise ValueError("--image goes with --prompt")
    prompt = None if args.prompt is None else _read(args)
    inputs = _rows(args.prompt_ids) if prompt is None else prompt.inputs
    backend = open_backend(args.backend, args.device)
    model = backend.load(args.checkpoint, dtype=args.dtype, mtp=args.draft)
    for given in args.adapter:
        name, separator, directory = given.partition("=")
        if not separator or "/" in name:  # a directory, whose path may have one
            name, directory = "", given
        if name == BASE:
            raise ValueError(f"--adapter {given}: {BASE!r} is the base alone in --row-adapter. Name it otherwise.")
        with backend.scope():
            model = model.attach_lora(directory, name or "default")
    names = args.row_adapter and [None if name == BASE else name for name in args.row_adapter]
    draft = model.draft if args.draft else None
    speculation = {"draft": draft} if args.draft_tokens is None else {"draft": draft, "draft_tokens": args.draft_tokens}
    with backend.scope():
        tokens = model.generate(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed or 0,
            ignore_eos=args.ignore_eos,
            adapter=names,
            **inputs,
            **speculation,
        )
    for row in backend.to_numpy(tokens):
        print(",".join(map(str, row)) if prompt is None else prompt.decode(row))
    if draft is not None:  # beside the tokens, which another program may read
        report = draft.report
        print(
            f"acceptance length {report.acceptance_length:.2f}: {report.accepted} of {report.drafted} drafted tokens"
            f" accepted in {report.rounds} verifications",
            file=sys.stderr,
        )
    return 0


def _read(args: argparse.Namespace) -> Any:
    from loaders import open_checkpoint
    from parity.prompting import read_prompt

    prompt = read_prompt(args.checkpoint, open_checkpoint(args.checkpoint).config, args.prompt, args.image)
    if not prompt.is_templated:
        print(f"{args.checkpoint} has no chat template: the prompt is taken as it stands", file=sys.stderr)
    return prompt


def _rows(prompt_ids: list[str]) -> dict[str, Any]:
    """Rows of token ids, padded on the left."""
    import numpy as np

    rows = [row.split(",") for row in prompt_ids]
    if wrong := [token for row in rows for token in row if not token.strip().isdecimal()]:
        raise ValueError(f"--prompt-ids has {wrong[0]!r}, expected token ids with commas between them: 1,2,3")
    rows = [list(map(int, row)) for row in rows]
    longest = max(map(len, rows))
    ids = np.array([[0] * (longest - len(row)) + row for row in rows])
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
