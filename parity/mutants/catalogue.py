"""Every mutant, in the order in which they are told."""

from __future__ import annotations

from parity.mutants.attention import ATTENTION
from parity.mutants.delta import DELTA_MUTANTS
from parity.mutants.derived import DERIVED
from parity.mutants.draft import DRAFT_MUTANTS
from parity.mutants.experts import EXPERT_MUTANTS
from parity.mutants.gemma import GEMMA_MUTANTS
from parity.mutants.graphs import GRAPH_MUTANTS
from parity.mutants.hybrid import HYBRID_MUTANTS
from parity.mutants.life_list import LIFE
from parity.mutants.loading import LOADING
from parity.mutants.lora import LORA
from parity.mutants.moe import MOE_AND_HEAD
from parity.mutants.nvfp4 import NVFP4
from parity.mutants.vision import VISION_MUTANTS

_LISTS = (
    *(ATTENTION, MOE_AND_HEAD, LOADING, EXPERT_MUTANTS, LIFE),
    *(DELTA_MUTANTS, HYBRID_MUTANTS, GEMMA_MUTANTS, DRAFT_MUTANTS, GRAPH_MUTANTS, NVFP4, DERIVED, LORA, VISION_MUTANTS),
)
MUTANTS = {mutant.name: mutant for mutants in _LISTS for mutant in mutants}
assert len(MUTANTS) == sum(map(len, _LISTS)), "two mutants share a name"
