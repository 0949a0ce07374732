"""Options for libtpu. That it takes them, and what they are worth: ``test_tpu_compile.py``."""

import logging

import jax
import jax.numpy as jnp
import pytest

from jax_models import compiling, programs
from loaders import Stage
from loaders.spec import ModelConfig


@pytest.fixture(autouse=True)
def _forgetful():
    compiling.accepted.cache_clear()
    yield
    compiling.accepted.cache_clear()


@pytest.mark.parametrize("mesh", [None, jax.make_mesh((1,), ("data",))], ids=["default device", "mesh"])
def test_a_compiler_of_no_tpu_is_given_no_options(mesh, monkeypatch):
    monkeypatch.setattr(compiling, "accepted", lambda mesh: pytest.fail("it was asked"))
    assert compiling.decode_options(mesh) is None


def test_a_compiler_without_the_option_compiles_without_it_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # what there is is a CPU's, which knows no such option
    with caplog.at_level(logging.WARNING):
        assert compiling.decode_options(None) is None
    assert "decoding is compiled without" in caplog.text


def test_a_compiler_that_takes_the_options_is_given_them(monkeypatch):
    monkeypatch.setattr(compiling, "DECODE", {"xla_cpu_enable_fast_math": False})  # one that a CPU's compiler knows
    assert compiling.accepted(jax.make_mesh((1,), ("data",))) == compiling.DECODE


def test_on_a_host_with_tpus_what_runs_on_its_cpu_is_compiled_for_that(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(compiling, "accepted", lambda mesh: {"of": "a tpu"})
    given = (ModelConfig, Stage(), jnp.dtype("float32"), None)
    made = []
    monkeypatch.setattr(programs, "Programs", lambda *given: made.append(compiling.decode_options(None)) or object())
    programs.shared_programs.cache_clear()
    there = programs.programs_for(*given)
    with jax.default_device(jax.devices("cpu")[0]):
        here = programs.programs_for(*given)
        assert compiling.platform_of(None) == "cpu"
    with jax.default_device("cpu"):
        assert programs.programs_for(*given) is here
    assert programs.programs_for(*given) is there is not here
    assert made == [{"of": "a tpu"}, None]
    programs.shared_programs.cache_clear()
