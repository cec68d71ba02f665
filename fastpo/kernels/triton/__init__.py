"""Kernels in Triton, for CUDA and HIP devices. Imported on first use: fastpo itself does not need Triton."""
