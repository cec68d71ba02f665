"""Launches of csrc/cuda from Python, compiled at run time by NVRTC, where the library `_cuda` does not serve."""
