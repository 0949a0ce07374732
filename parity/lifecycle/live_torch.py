"""A live torch model seen from outside: what may not move, how to poison it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loaders.host.inputs import bucket
from parity.backends import Framework
from parity.lifecycle.live_bench import STEPS
from torch_models.capturing import capturing
from torch_models.census import pointer_census
from torch_models.graphs import row_bucket


@dataclass(frozen=True)
class TorchLive:
    """What the laws need to know of torch; see ``parity.lifecycle.live_bench.LiveBackend``."""

    backend: Framework
    poison_publishes: bool = False
    keeps_old: bool = False
    captures: bool = True
    stages_repeat: bool = True  # the same kernels on the same numbers

    def fixed(self, model: Any) -> dict[str, Any]:
        """Everything a captured graph remembers: the address of every parameter and buffer."""
        return dict(pointer_census(model)) | {"model": id(model)}

    def compiled(self, model: Any) -> dict[str, int]:
        """Nothing is compiled."""
        return {}

    def not_shared(self, old: Any, new: Any, changed: set[str]) -> list[str]:
        """Nothing: the addresses in ``fixed`` say it all."""
        return []

    @torch.no_grad()
    def poison(self, model: Any) -> Any:
        """Every bit of every parameter set, behind the model's back: what the next load does not write will scream.

        That is NaN in every float, and -6 in codes.
        """
        for param in model.parameters():
            param.view(-1).view(torch.uint8).fill_(255)
        return model

    def stepped(self, model: Any, prompt: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Logits of a prompt and of the steps after it, each from its best token, on the rows a graph would have.

        Steps go the way of what is captured: on a CPU those that need not be go another one through experts.
        """
        checked = model.checked_prompt(**prompt)
        rows, length = checked.input_ids.shape
        all_rows = row_bucket(rows)
        cache = model.empty_cache(all_rows, bucket(length + STEPS))
        found = [model.prefill_into(checked, cache.first_rows(rows)).cpu().numpy().copy()]
        for _ in range(STEPS):
            token_B = np.pad(found[-1].argmax(-1), (0, all_rows - rows))
            with capturing():
                found.append(model.decode(token_B, cache)[0][:rows].cpu().numpy().copy())
        return found

    def replayed(self, model: Any, prompt: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Likewise by replaying a graph, which is captured when first asked for."""
        logits_BV, batch = model.graphs.prefill(**prompt, max_new_tokens=STEPS)
        found = [logits_BV.cpu().numpy().copy()]
        for _ in range(STEPS):
            found.append(batch.decode(found[-1].argmax(-1)).cpu().numpy().copy())
        return found


def live(backend: Framework) -> TorchLive:
    return TorchLive(backend)
