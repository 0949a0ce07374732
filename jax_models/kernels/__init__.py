"""Pallas kernels for TPU, each with the same function in plain ``jax.numpy`` beside it."""
