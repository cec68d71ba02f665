// The CUDA that this library was built with, and the newest that the installed driver runs: 13010 for 13.1, and 0
// where there is no driver.
#include <cuda_runtime_api.h>

extern "C" __attribute__((visibility("default"))) int fastpo_cuda_runtime() { return CUDART_VERSION; }

extern "C" __attribute__((visibility("default"))) int fastpo_cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
