#pragma once

#include "common.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FASTPO_NAMESPACE fastpo::avx2
#define FASTPO_VECTOR_BYTES 32
#define FASTPO_AVX2 1
#define FASTPO_AVX512 0
