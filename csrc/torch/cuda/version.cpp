#include "../../version.h"

extern "C" __attribute__((visibility("default"))) const char* fastpo_cuda_version() { return FASTPO_SAYS_VERSION; }
