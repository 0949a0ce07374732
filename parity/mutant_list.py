"""Every mutant, in the order in which they are told."""

from __future__ import annotations

from parity.mutant_attention import ATTENTION
from parity.mutant_life_list import LIFE
from parity.mutant_loading import LOADING
from parity.mutant_moe import MOE_AND_HEAD

MUTANTS = {mutant.name: mutant for mutant in (*ATTENTION, *MOE_AND_HEAD, *LOADING, *LIFE)}
assert len(MUTANTS) == len(ATTENTION) + len(MOE_AND_HEAD) + len(LOADING) + len(LIFE), "two mutants share a name"
