"""Modules with parameters: S4 and S4D kernels, and their layer."""

from fastpo.nn import hippo
from fastpo.nn.s4 import Recurrence, S4DKernel, S4Kernel, S4Layer, advance, from_original

__all__ = ["Recurrence", "S4DKernel", "S4Kernel", "S4Layer", "advance", "from_original", "hippo"]
