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

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

// clang has no function-wide target pragma that reaches templates; it builds the baseline alone
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPO_X86_SETS 1
#else
#define FASTPO_X86_SETS 0
#endif
