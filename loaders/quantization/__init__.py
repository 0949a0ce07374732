"""NVFP4 and FP8: which modules are quantised and how, what they are called in files, and quantising while reading."""
