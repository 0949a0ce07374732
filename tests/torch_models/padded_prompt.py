"""Rows of different length, padded on the left: what tests of graphs, and of sleep, run on."""

from __future__ import annotations

import numpy as np

T, STEPS = 9, 6
IDS = np.random.default_rng(0).integers(0, 200, (3, T))
MASK = np.arange(T) >= np.array([[0], [2], [5]])
