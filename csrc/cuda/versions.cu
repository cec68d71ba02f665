// The CUDA that this library was built with, 13010 for 13.1, in words that are found in the file without loading it.
#include <cuda_runtime_api.h>

#include "../version.h"

extern "C" __attribute__((visibility("default"))) const char* fastpo_cuda_runtime() {
  return "fastpo built with CUDART " FASTPO_TEXT(CUDART_VERSION);
}
