"""The table of chips against JAX's own descriptions of them, which Pallas kernels are tuned by."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jax.experimental.pallas import tpu

from parity.planning.chips import CHIPS, GIB
from parity.planning.environment import compiler_environment

ROOT = Path(__file__).parents[2]
TOO_LARGE = """
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from parity.planning.chips import chip_of
from parity.planning.compiling import mesh_on
chip = chip_of(sys.argv[1])
whole = NamedSharding(mesh_on(chip, chip.topologies[0], {}), PartitionSpec())
array = jax.ShapeDtypeStruct((2 * chip.hbm_bytes // 1024, 512), jax.numpy.bfloat16, sharding=whole)
try:
    jax.jit(lambda x: (x + 1, x.sum())).lower(array).compile()
except jax.errors.JaxRuntimeError as error:
    print(error)
"""

# JAX's figures are of a TensorCore; a device of v5p is two of them
CORES = {"v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 1}
VERSIONS = {"v5e": "TPU_V5E", "v5p": "TPU_V5P", "v6e": "TPU_V6E", "tpu7x": "TPU_7X"}
ROUNDED = 0.01  # both round
# Google publishes 2,765 GB/s; JAX has 2,460
DIFFERENT = {("v5p", "bandwidth"): 2765 / 2460}


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("hbm_bytes", "hbm_capacity_bytes"), ("bandwidth", "mem_bw_bytes_per_second"), ("flops", "bf16_ops_per_second")],
)
def test_a_device_is_what_jax_says_it_is(name, ours, theirs):
    info = tpu.get_tpu_info_for_chip(tpu.ChipVersion[VERSIONS[name]], CORES[name])
    expected = getattr(info, theirs) * CORES[name] * DIFFERENT.get((name, ours), 1)
    assert getattr(CHIPS[name], ours) == pytest.approx(expected, rel=ROUNDED)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-compiler]'")
@pytest.mark.parametrize("name", CHIPS)
def test_a_program_may_take_what_libtpu_leaves_it(name: str) -> None:
    environment = compiler_environment(os.environ | {"PYTHONPATH": str(ROOT)})
    script = [sys.executable, "-c", TOO_LARGE, name]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600, check=False)
    (limit,) = re.findall(r"exceeds available HBM \((\d+\.\d+)G\)", done.stdout)
    assert CHIPS[name].usable_bytes / GIB == pytest.approx(float(limit), abs=0.011)  # it rounds


@pytest.mark.parametrize("name", CHIPS)
def test_a_chip_has_as_many_devices_as_cores_that_jax_does_not_join(name):
    cores = tpu.ChipVersion[VERSIONS[name]].num_physical_tensor_cores_per_chip
    assert CHIPS[name].devices == cores // CORES[name]
