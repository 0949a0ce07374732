"""The draft: a checkpoint's multi-token prediction, run with the embedding and the head of the model it drafts for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loaders.adapters.roster import AdapterOfRows
from loaders.events import version_of
from loaders.host.drafting import check_binding, check_drafted, shared_with
from loaders.host.inputs import ModelInputs
from loaders.host.speculation import SpeculationReport
from torch_models.cache import Cache
from torch_models.coordination import in_step
from torch_models.host import on_host
from torch_models.layers.step import Step, steps
from torch_models.layers.vision import Seen
from torch_models.one_version import of_one_version, unchanged
from torch_models.precision import in_own_precision
from torch_models.taps import collect

if TYPE_CHECKING:
    from torch_models.model import Model


@dataclass(eq=False)
class Draft:
    """``mtp.*`` of one model, bound to a target. It owns no embedding and no head: the target's modules serve both.

    Attributes:
        source: the model whose ``mtp.*`` these are.
        target: the model it drafts for; None: it cannot run.
        report: what it was worth in its last generation.
    """

    source: Model
    target: Model | None
    report: SpeculationReport | None = None

    @property
    def _model(self) -> Model:
        return self.source

    @property
    def bound(self) -> Model:
        """The target.

        Raises:
            RuntimeError: it is bound to no model, or one of the two must not run.
        """
        if self.target is None:
            raise RuntimeError("the draft is bound to no model and has no embedding or head of its own. Call bind.")
        self.source.check_runnable()
        self.target.check_runnable()
        return self.target

    @property
    def shared(self) -> dict[str, str]:
        """What it reads of its target; see ``loaders.host.drafting``."""
        return shared_with(self.target)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        hidden_states: Any = None,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, float32 [B, T-1, V], and hidden states [B, T-1, D]; see ``Model.mtp_forward``."""
        given = {"hidden_states": hidden_states, "adapter": adapter, **multimodal}
        logits, drafted_BTD, _ = self.with_taps(input_ids, attention_mask, position_ids, **given)
        return logits, drafted_BTD

    @in_step
    @of_one_version
    @in_own_precision
    def with_taps(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        hidden_states: Any = None,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """As calling the draft, and its intermediate values by checkpoint module path."""
        target = self.bound
        check = unchanged(target)
        ids, mask, positions = on_host(input_ids), on_host(attention_mask), on_host(position_ids)

        def shown_to() -> tuple[ModelInputs, np.ndarray]:
            shown = {name: on_host(value) for name, value in multimodal.items()}
            inputs = check_drafted(target, ids, mask, positions, shown)
            return inputs, target.roster.rows(adapter, len(inputs.input_ids))

        def summary(found: tuple[ModelInputs, np.ndarray]) -> str:
            said = f"inputs {found[0].digest}, adapters of rows {found[1].tolist()}"
            return f"{said}, a draft of {version_of(self.source.events)}"

        checked, _ = target.agreed("what the draft is called with", shown_to, summary)
        ids_BT = target.long(checked.input_ids)
        mask_BT = torch.from_numpy(checked.attention_mask).to(target.device)
        step_positions = target.long(checked.position_ids)
        is_pair = mask_BT[:, 1:] & mask_BT[:, :-1]
        step = self._steps(step_positions[..., 1:], is_pair, 0, is_cached=False)
        with target.running(adapter, ids_BT):
            seen = target.seen(checked)
            x_BTD = target.entered(ids_BT, seen)
            # what is shown is shown to the draft too
            next_embeds = target.embed(ids_BT[:, 1:]) if seen is None else x_BTD[:, 1:]
            if not target.stage.is_first:
                x_BTD, _ = target.checked(None, mask, positions, hidden_states)
            hidden_BTD = target.decoder(x_BTD, step_positions, mask_BT, seen=seen)
            with collect() as taps:
                drafted = self.source.mtp(next_embeds, hidden_BTD[:, :-1], step)
            logits = target.head(drafted)
        check()
        return logits, drafted, taps

    def bind(self, target: Model) -> Draft:
        """The same draft for another model of its config.

        Raises:
            ValueError: see ``loaders.host.drafting.check_binding``.
        """
        ours, theirs, apart = self.source, target, []
        if ours.mesh != theirs.mesh:
            apart.append(f"the draft is cut over mesh {ours.mesh}, the target over {theirs.mesh}")
        if ours.device != theirs.device:
            apart.append(f"the draft is on {ours.device}, the target on {theirs.device}")
        check_binding(ours, theirs, apart)
        return Draft(self.source, target)

    def unbind(self) -> Draft:
        """The same draft without a target: it holds nothing of one any more."""
        return Draft(self.source, None)

    def empty_cache(self, rows: int, capacity: int) -> Cache:
        """A cache for the target and the draft, with no token in it."""
        target = self.bound
        entries = self.source.cache_entries(self.source.config, self.source.stage, rows, capacity)
        return target.empty_cache(rows, capacity, entries)

    def extend(
        self,
        next_ids_BT: torch.Tensor,
        hidden_BTD: torch.Tensor,
        positions_BT: torch.Tensor,
        last_B: torch.Tensor,
        cache: Cache,
        seen: Seen | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft reads the tokens that came last, each with the hidden state before it.

        Args:
            next_ids_BT: the token after each of the last T slots.
            hidden_BTD: the target's final hidden states of those slots.
            positions_BT: of ``next_ids_BT``; [3, B, T] of a prompt that shows something.
            last_B: the last real one of each row.
            cache: after those slots; its entry of the draft is written in place.
            seen: what the vision tower made of images among ``next_ids_BT``.
        Returns:
            Its logits [B, V] and hidden state [B, 1, D] at ``last_B``.
        """
        start = cache.slot - next_ids_BT.shape[1]
        return self._draft(next_ids_BT, hidden_BTD, positions_BT, cache.key_mask, start, last_B, cache, seen)

    def step(
        self, ids_B: torch.Tensor, hidden_B1D: torch.Tensor, offset: int, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One more guess, from the draft's own last state and token; ``offset``: guesses in the cache already."""
        slots_S = torch.arange(cache.capacity, device=ids_B.device)
        is_guess_S = (slots_S >= cache.slot) & (slots_S <= cache.slot + offset)
        positions_B1 = cache.position[:, None] + 1 + offset
        key_mask_BS = cache.key_mask | is_guess_S
        last_B = torch.zeros_like(ids_B)
        return self._draft(ids_B[:, None], hidden_B1D, positions_B1, key_mask_BS, cache.slot + offset, last_B, cache)

    def _draft(
        self,
        ids_BT: torch.Tensor,
        hidden_BTD: torch.Tensor,
        positions_BT: torch.Tensor,
        key_mask_BS: torch.Tensor,
        start: torch.Tensor,
        last_B: torch.Tensor,
        cache: Cache,
        seen: Seen | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        target = self.bound
        step = self._steps(positions_BT, key_mask_BS, start, is_cached=True)
        drafted_BTD = self.source.mtp(target.entered(ids_BT, seen), hidden_BTD, step, cache.layers["mtp"])
        hidden_B1D = drafted_BTD[torch.arange(len(last_B), device=last_B.device), last_B][:, None]
        return target.head(hidden_B1D)[:, 0], hidden_B1D

    def _steps(
        self, position_ids: torch.Tensor, key_mask_BS: torch.Tensor, start: torch.Tensor | int, *, is_cached: bool
    ) -> Step:
        length = position_ids.shape[-1]
        config = self.source.config
        return steps(config, [0], position_ids, key_mask_BS, start, length=length, is_cached=is_cached)[0]
