// The instruction set that every machine of the architecture has.
#pragma once

#include "common.h"

#define FASTPO_NAMESPACE fastpo::baseline
#define FASTPO_VECTOR_BYTES 16
#define FASTPO_AVX2 0
#define FASTPO_AVX512 0
