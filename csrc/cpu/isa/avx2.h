#pragma once

#include "common.h"

#pragma GCC target("avx2,fma,f16c")

#define FASTPO_NAMESPACE fastpo::avx2
#define FASTPO_VECTOR_BYTES 32
#define FASTPO_AVX2 1
#define FASTPO_AVX512 0
