"""Saves on a disk that is full after so many bytes of a file, and prints what it says: argv is CKPT DIRECTORY LIMIT.

A process of its own: what Orbax prints meanwhile would be cut off in pytest's files too.
"""

import resource
import sys
from pathlib import Path

import jax_models

checkpoint, directory, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
model = jax_models.load(checkpoint)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
try:
    model.save(directory / "save")
except OSError as error:
    print(f"OSError: {error}")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert list(directory.iterdir()) == [], "something was left behind"
model.save(directory / "save")
assert jax_models.restore(directory / "save").digests() == model.digests()
