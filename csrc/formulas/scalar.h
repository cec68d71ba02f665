// The primitives on which the formulas stand, for float and double, on the host and on a device.
//
// A formula is written over a scalar type T. T is float or double, or, on the CPU, a vector of them
// (csrc/cpu/vec.h adds the same primitives for vectors). Nothing here includes a header: NVRTC has none.
#pragma once

#include "types.h"

#if defined(__CUDACC__)
#define FASTPO_FN __host__ __device__ __forceinline__
#else
// not inlined, the copy that the linker keeps could hold another instruction set's code
#define FASTPO_FN inline __attribute__((always_inline))
#endif

namespace FASTPO_NAMESPACE {

template <class T>
struct Traits;

template <>
struct Traits<float> {
  using Scalar = float;
  using Int = int;
  using IntScalar = int;
  static constexpr int mantissa_bits = 23;
  static constexpr int exponent_bias = 127;
};

template <>
struct Traits<double> {
  using Scalar = double;
  using Int = Int64;
  using IntScalar = Int64;
  static constexpr int mantissa_bits = 52;
  static constexpr int exponent_bias = 1023;
};

template <class T>
using Scalar = typename Traits<T>::Scalar;

FASTPO_FN float select(bool condition, float a, float b) { return condition ? a : b; }
FASTPO_FN double select(bool condition, double a, double b) { return condition ? a : b; }

// the larger and the smaller of two numbers; b where either is NaN
FASTPO_FN float larger_of(float a, float b) { return a > b ? a : b; }
FASTPO_FN double larger_of(double a, double b) { return a > b ? a : b; }
FASTPO_FN float smaller_of(float a, float b) { return a < b ? a : b; }
FASTPO_FN double smaller_of(double a, double b) { return a < b ? a : b; }

#if defined(__CUDA_ARCH__)
FASTPO_FN int to_bits(float x) { return __float_as_int(x); }
FASTPO_FN float from_bits(int x) { return __int_as_float(x); }
FASTPO_FN Int64 to_bits(double x) { return __double_as_longlong(x); }
FASTPO_FN double from_bits(Int64 x) { return __longlong_as_double(x); }
#else
FASTPO_FN int to_bits(float x) {
  int bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  return bits;
}
FASTPO_FN float from_bits(int bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
FASTPO_FN Int64 to_bits(double x) {
  Int64 bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  return bits;
}
FASTPO_FN double from_bits(Int64 bits) {
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
#endif

FASTPO_FN float to_float(int x) { return static_cast<float>(x); }
FASTPO_FN double to_float(Int64 x) { return static_cast<double>(x); }

}  // namespace FASTPO_NAMESPACE
