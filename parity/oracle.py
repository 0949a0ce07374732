"""The float64 oracle: what a checkpoint says, free of any framework and of rounding that matters.

Both backends are judged by their distance to it, so it shares no code with either: NumPy, written from the semantics.
transformers' ``model.double()`` is no substitute: its norms, rotary tables and router stay float32.

A family's semantics are one module of ``parity.oracles``, checked against transformers in tests/parity/test_oracle*.py.
Letters: docs/glossary.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from loaders import Checkpoint
from loaders.adapters.updates import Adapter
from loaders.families import FAMILIES
from parity.oracles.fault import Fault
from parity.oracles.inputs import checked_inputs, checked_routing
from parity.oracles.run import Run, Saw, Weights
from parity.oracles.taps import Taps
from parity.oracles.vision import look


class OracleFamily(Protocol):
    """What ``parity/oracles/<family>.py`` offers; ``draft`` only where a configuration has ``num_mtp_layers``."""

    def forward(self, run: Run) -> None:
        """Fill ``run.out`` from the embeddings to the logits."""
        ...

    def draft(self, run: Run) -> None:
        """Fill in what the multi-token-prediction draft computes after ``forward``."""
        ...


def oracle_forward(
    checkpoint: Checkpoint,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    *,
    routing: Mapping[str, np.ndarray] | None = None,
    mtp: bool = False,
    shake: float = 0.0,
    draw: int = 0,
    shake_angles: float = 0.0,
    saw: Saw | None = None,
    adapter: Adapter | None = None,
    taps: Taps | None = None,
    fault: Fault | None = None,
    **multimodal: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Run the checkpoint in float64 on its stored weights, reading one weight at a time.

    Positions whose mask is 0 carry no meaning, but everything returned is finite.

    Args:
        checkpoint: of any architecture of ``loaders.families``.
        input_ids: integers [B, T].
        attention_mask: [B, T], 1 = real, padding on either side. None: all real.
        position_ids: integers [B, T], or [3, B, T] where the family turns by time, height and width (or [4, B, T], text
            first). None: real tokens counted from 0 in each row.
        routing: experts to use instead of choosing, named as in the result; layers left out choose. So a low-precision
            run that flips near-ties is compared under its own choices. Values at padding are ignored.
        mtp: run the multi-token-prediction draft too. Its row t is made of the final hidden state at t and the token at
            t+1, and is real where both are.
        shake: a relative random error on the residual stream after every layer (and on the embeddings); how far the
            result moves says how much the checkpoint amplifies rounding.
        draw: which random error; each is another direction.
        shake_angles: a relative random error on the angles by which heads turn, as float32 has one.
        multimodal: images and videos under their Hugging Face processor's names.
        saw: called with the name and the input [..., K] of every linear layer, for calibration. No row may be padded.
        adapter: of every row.
        taps: what single steps are to go on from, and, after the run, what each made of it.
        fault: a weight of the text model to get wrong on purpose.

    Returns:
        float64 ``logits`` [B, T, V]; ``hidden_states.0`` [B, T, D] (embeddings); ``hidden_states.i`` (residual stream
        after decoder layer i, i from 1); ``final_hidden_state`` (after the final norm); and of every sparse layer
        ``router_logits.i`` [B, T, E] and int32 ``routing.i`` [B, T, X]: experts by falling weight, ties by index, or as
        replayed. With ``mtp``: ``mtp.logits`` [B, T-1, V], ``mtp.hidden_state`` [B, T-1, D] (after its norm), and of a
        sparse draft ``mtp.router_logits.1`` and ``mtp.routing.1``.

    Raises:
        ValueError: inputs or routing of the wrong shape, dtype or range; a draft is asked for where there is none.
        CheckpointError: a tensor is missing, has another shape than config.json asks for, or a dtype that is not exact.
    """
    config = checkpoint.config
    if mtp and config.num_mtp_layers != 1:
        raise ValueError(f"a draft was asked for, but {config.architecture} has {config.num_mtp_layers} layers of it")
    shown = {name: np.asarray(value) for name, value in multimodal.items() if value is not None}
    types = shown.get("mm_token_type_ids")
    if len(shown) == 1 and types is not None and types.shape == np.shape(input_ids) and not types.any():
        shown = {}  # a processor's text
    ids_BT, mask_BT, positions = checked_inputs(config, input_ids, attention_mask, position_ids, shown)
    if mtp and ids_BT.shape[1] < 2:
        raise ValueError("a draft was asked for, but its first row needs two tokens")
    if saw is not None and not mask_BT.all():
        raise ValueError("inputs of layers were asked for, of rows with padding. Give each row without it.")
    replayed = checked_routing(config, routing or {}, mask_BT, mtp=mtp)
    sight = None
    if shown and config.vision is not None:
        sight = look(config.vision, Weights(checkpoint, "model.visual.", saw), ids_BT, mask_BT, shown)
        positions = sight.positions if sight is not None and position_ids is None else positions
        ids_BT = np.minimum(ids_BT, config.vocab_size - 1)
    shaking = {"shake": shake, "draw": draw, "shake_angles": shake_angles}
    given = {"saw": saw, "sight": sight, "adapter": adapter, "taps": taps, "fault": fault}
    run = Run(checkpoint, config, ids_BT, mask_BT, positions, replayed, **shaking, **given)
    module = f"parity.oracles.{FAMILIES[config.architecture]}"
    family: OracleFamily = importlib.import_module(module)  # pyright: ignore[reportAssignmentType]
    family.forward(run)
    if taps is not None:
        taps("lm_head", run.out["logits"])
    if mtp:
        family.draft(run)
    return run.out
