"""Every mutant, in the order in which they are told."""

from __future__ import annotations

from parity.mutant_attention import ATTENTION
from parity.mutant_delta import DELTA_MUTANTS
from parity.mutant_derived import DERIVED
from parity.mutant_draft import DRAFT_MUTANTS
from parity.mutant_experts import EXPERT_MUTANTS
from parity.mutant_gemma import GEMMA_MUTANTS
from parity.mutant_graphs import GRAPH_MUTANTS
from parity.mutant_hybrid import HYBRID_MUTANTS
from parity.mutant_life_list import LIFE
from parity.mutant_loading import LOADING
from parity.mutant_lora import LORA
from parity.mutant_moe import MOE_AND_HEAD
from parity.mutant_nvfp4 import NVFP4
from parity.mutant_vision import VISION_MUTANTS

_LISTS = (
    *(ATTENTION, MOE_AND_HEAD, LOADING, EXPERT_MUTANTS, LIFE),
    *(DELTA_MUTANTS, HYBRID_MUTANTS, GEMMA_MUTANTS, DRAFT_MUTANTS, GRAPH_MUTANTS, NVFP4, DERIVED, LORA, VISION_MUTANTS),
)
MUTANTS = {mutant.name: mutant for mutants in _LISTS for mutant in mutants}
assert len(MUTANTS) == sum(map(len, _LISTS)), "two mutants share a name"
