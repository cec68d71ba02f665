#pragma once

#include "common.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define FASTPO_NAMESPACE fastpo::avx512
#define FASTPO_VECTOR_BYTES 64
#define FASTPO_AVX2 1
#define FASTPO_AVX512 1
