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

// n pairs from place `first` on, in T, as doubles
template <class T>
FASTPO_FN void split_pairs(const void* data, int64_t first, int64_t n, double* re, double* im) {
  const T* __restrict from = static_cast<const T*>(data) + 2 * first;
  double* __restrict to_re = re;
  double* __restrict to_im = im;
  for (int64_t i = 0; i < n; ++i) {
    to_re[i] = static_cast<double>(from[2 * i]);
    to_im[i] = static_cast<double>(from[2 * i + 1]);
  }
}

template <class T>
FASTPO_FN void join_pairs(const double* re, const double* im, int64_t n, void* data, int64_t first) {
  T* __restrict to = static_cast<T*>(data) + 2 * first;
  const double* __restrict from_re = re;
  const double* __restrict from_im = im;
  for (int64_t i = 0; i < n; ++i) {
    to[2 * i] = static_cast<T>(from_re[i]);
    to[2 * i + 1] = static_cast<T>(from_im[i]);
  }
}

template <class T>
FASTPO_FN void put_pair(double re, double im, void* data, int64_t at) {
  T* to = static_cast<T*>(data) + 2 * at;
  to[0] = static_cast<T>(re);
  to[1] = static_cast<T>(im);
}

FASTPO_FN int64_t whole_vectors(int64_t n) { return (n + lanes<double> - 1) / lanes<double> * lanes<double>; }

}  // namespace FASTPO_NAMESPACE
