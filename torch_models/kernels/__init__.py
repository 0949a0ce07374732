"""Products with NVFP4 weights: in plain torch, in Triton, and native where the device multiplies FP4 itself."""
