"""The bookkeeping of adapters, which all processes of a mesh keep alike."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import sys
import numpy as np
from loaders.adapters.updates import Adapter
from loaders.adapters.roster import Roster

whole = {f"layer{number}.weight": np.ones(2, np.float32) for number in range(12)}
roster = Roster().having(Adapter("it", {}, whole), "a", 1)
print(*roster.layout.places)
"""


def test_modules_that_adapters_replace_have_one_order_in_all_processes() -> None:
    """Their copies are placed one by one, and on a mesh of several processes that is done together."""
    said = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(said) == 1
