"""``python -m parity.museum > docs/museum.md``."""

from parity.museum import render

print(render(), end="")
