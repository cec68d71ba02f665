// FASTPO_LAUNCH(kernel, blocks, threads, stream, arguments...): null, or the error in words.
#pragma once

#include "device.cuh"

#if defined(FASTPO_EMULATOR)
#define FASTPO_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), simt::launch([&] { kernel(__VA_ARGS__); }, blocks, threads))

namespace fastpo::gpu {

inline bool has_fast_double() { return true; }

}  // namespace fastpo::gpu

#else
#include <cuda_runtime_api.h>

namespace fastpo::gpu {

// Whether the current device computes in double at half the rate of single precision, where others have a 32nd of it or
// less. fastpo/kernels/cuda/nvrtc.py restates it.
inline bool has_fast_double() {
  int device = 0, ratio = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, device) == cudaSuccess &&
         ratio <= 2;
}

inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastpo::gpu

#define FASTPO_LAUNCH(kernel, blocks, threads, stream, ...)                                                         \
  (kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, static_cast<cudaStream_t>(stream)>>>( \
       __VA_ARGS__),                                                                                                \
   fastpo::gpu::last_error())
#endif
