"""The arrows: loaders <- jax_models, torch_models <- parity, and no framework where none belongs.

import-linter says the same in `make check`; this needs no install, and proves it by running without the framework.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JAX, TORCH, TESTS_ONLY = {"jax", "jaxlib", "flax", "orbax", "optax"}, {"torch", "triton"}, {"transformers", "tests"}
FORBIDDEN = {
    "loaders": {*JAX, *TORCH, *TESTS_ONLY, "jax_models", "torch_models", "parity"},
    "jax_models": {*TORCH, *TESTS_ONLY, "torch_models", "parity"},
    "torch_models": {*JAX, *TESTS_ONLY, "jax_models", "parity"},
    "parity": TESTS_ONLY,
}
# the checkpoint's own tokenizer and image processor are transformers' (extra ``processor``); no model comes from there,
# but where it is itself the one to be compared
OPTIONAL = {"parity/prompting.py": {"transformers"}, "parity/foreign/transformers.py": {"transformers"}}
# what compares traces runs where neither backend is installed, and what prints help must answer at once
FRAMEWORK_FREE_PARITY = [
    *("parity", "parity.asserting", "parity.backend", "parity.cli", "parity.compare", "parity.pytest_plugin"),
    *("parity.report.page", "parity.ruler", "parity.trace"),
]

# run with: names that cannot be imported; modules to import
RUN_WITHOUT = """
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
blocked, modules = (set(text.split(",")) for text in sys.argv[1:])
sys.meta_path.insert(0, Blocker())
for module in sorted(modules):
    importlib.import_module(module)
"""


def modules_of(package: str) -> list[str]:
    names = [path.relative_to(ROOT).with_suffix("").parts for path in ROOT.glob(f"{package}/**/*.py")]
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]


def imported(source: str) -> set[str]:
    """Top-level names of everything a module imports, at import or inside a function, also by import_module("...")."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_nothing_above_or_beside_it_not_even_inside_a_function(package):
    broken = {
        name: sorted(names)
        for path in sorted(ROOT.glob(f"{package}/**/*.py"))
        if (name := path.relative_to(ROOT).as_posix())
        and (names := imported(path.read_text(encoding="utf-8")) & FORBIDDEN[package] - OPTIONAL.get(name, set()))
    }
    assert broken == {}


@pytest.mark.parametrize(
    "source",
    ["import torch", "from torch.nn import functional", "def f():\n    import torch.nn as nn"]
    + ["import importlib\nx = importlib.import_module('torch.nn')", "if TYPE_CHECKING:\n    import torch"],
)
def test_an_import_is_found_however_it_is_written(source):
    assert "torch" in imported(source)


def import_without(blocked: set[str], modules: list[str]) -> str:
    command = [sys.executable, "-c", RUN_WITHOUT, ",".join(sorted(blocked)), ",".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stderr


@pytest.mark.parametrize("package", ["loaders", "jax_models", "torch_models"])
def test_a_package_imports_where_the_other_framework_is_not_installed(package):
    assert import_without(FORBIDDEN[package], modules_of(package)) == ""


def test_comparing_and_asking_for_help_import_neither_framework():
    from parity.cli import VERBS

    verbs = [module for _, module, _ in VERBS]
    assert import_without({*JAX, *TORCH, *TESTS_ONLY}, [*FRAMEWORK_FREE_PARITY, *verbs]) == ""


def test_the_blocker_blocks():
    assert "numpy is blocked" in import_without({"numpy"}, ["loaders"])
