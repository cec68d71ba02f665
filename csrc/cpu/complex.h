// Complex numbers of broadcast operands as two arrays of doubles. Included after vec.h.
#pragma once

#include "vec.h"

namespace FASTPO_NAMESPACE {

// where a row of an operand begins, in numbers
FASTPO_FN int64_t row_of(const Leading& leading, const Operand& operand, int64_t row) {
  int64_t at = 0;
  for (int d = leading.dims - 1; d >= 0; --d) {
    at += row % leading.sizes[d] * operand.strides[d];
    row /= leading.sizes[d];
  }
  return at;
}

// as many numbers in T, as a VecD has, as doubles, and back
FASTPO_FN VecD wide_at(const double* p) { return at(p); }
FASTPO_FN VecD wide_at(const float* p) {
  HalfF v;
  __builtin_memcpy(&v, p, sizeof v);
  return widened(v);
}
FASTPO_FN void put_narrow(double* p, VecD v) { put(p, v); }
FASTPO_FN void put_narrow(float* p, VecD v) {
  const HalfF narrow = narrowed(v);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}

// where the numbers of a vector are in two, split into those of even and odd places, or joined
constexpr int even_lane(int l) { return 2 * l; }
constexpr int odd_lane(int l) { return 2 * l + 1; }
constexpr int joined_low(int l) { return l / 2 + l % 2 * lanes<double>; }
constexpr int joined_high(int l) { return joined_low(l) + lanes<double> / 2; }

// n pairs from place `first` on, in T, as doubles
template <class T>
FASTPO_FN void split_pairs(const void* data, int64_t first, int64_t n, double* re, double* im) {
  constexpr int width = lanes<double>;
  const T* from = static_cast<const T*>(data) + 2 * first;
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    const VecD low = wide_at(from + 2 * i), high = wide_at(from + 2 * i + width);
    put(re + i, shuffled<even_lane>(low, high));
    put(im + i, shuffled<odd_lane>(low, high));
  }
  for (; i < n; ++i) re[i] = static_cast<double>(from[2 * i]), im[i] = static_cast<double>(from[2 * i + 1]);
}

template <class T>
FASTPO_FN void join_pairs(const double* re, const double* im, int64_t n, void* data, int64_t first) {
  constexpr int width = lanes<double>;
  T* to = static_cast<T*>(data) + 2 * first;
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    const VecD a = at(re + i), b = at(im + i);
    put_narrow(to + 2 * i, shuffled<joined_low>(a, b));
    put_narrow(to + 2 * i + width, shuffled<joined_high>(a, b));
  }
  for (; i < n; ++i) to[2 * i] = static_cast<T>(re[i]), to[2 * i + 1] = static_cast<T>(im[i]);
}

template <class T>
FASTPO_FN void put_pair(double re, double im, void* data, int64_t at) {
  T* to = static_cast<T*>(data) + 2 * at;
  to[0] = static_cast<T>(re);
  to[1] = static_cast<T>(im);
}

}  // namespace FASTPO_NAMESPACE
