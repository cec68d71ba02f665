// Everything from outside that the CPU kernels include. It stands in front of the target pragma of an
// instruction set, so that no inline function of a system header is compiled for it: the linker keeps one
// copy of such a function, and a machine without that instruction set would call it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#if !defined(__GNUC__) && !defined(__clang__)
#error "the kernels are written in vector extensions, which g++ and clang have; on Windows, build with clang-cl"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
// beside MSVC's headers clang's immintrin.h leaves these out, unless all code is for the instruction set
#if defined(__clang__) && defined(_MSC_VER)
// clang-format off: their order is that of what they need of one another
#include <smmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>
#include <avx512fintrin.h>
#include <avx512vlintrin.h>
#include <avx512bwintrin.h>
#include <avx512vlbwintrin.h>
#include <avx512dqintrin.h>
#include <avx512vldqintrin.h>
// clang-format on
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../kernels.h"

// the sets beyond the baseline
#if defined(__x86_64__)
#define FASTPO_X86_SETS 1
#else
#define FASTPO_X86_SETS 0
#endif

// in front of a loop of a constant number of turns, at most 32, whose arrays are to be registers
#if defined(__clang__)
#define FASTPO_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTPO_UNROLL _Pragma("GCC unroll 32")
#endif
