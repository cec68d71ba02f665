// Branch-free elementary functions that vectorise, for any T of scalar.h. NaN and inf pass through as in
// torch.
#pragma once

#include "scalar.h"

namespace FASTPO_NAMESPACE {

template <class T>
FASTPO_FN T constant(double x) {
  return T{} + static_cast<Scalar<T>>(x);
}

// 2^n for an integral n in T, built from bits; n in [-bias, bias + 1) where -bias gives exactly 0
template <class T>
FASTPO_FN T power_of_two(T n) {
  using I = typename Traits<T>::Int;
  using IS = typename Traits<T>::IntScalar;
  // adding 1.5 * 2^mantissa leaves the integer in the low bits
  const Scalar<T> magic = static_cast<Scalar<T>>(3LL << (Traits<T>::mantissa_bits - 1));
  const I bits = to_bits(n + (magic + Traits<T>::exponent_bias));
  return from_bits(static_cast<I>(bits << static_cast<IS>(Traits<T>::mantissa_bits)));
}

template <class T>
FASTPO_FN T round_nearest(T x) {
  const Scalar<T> magic = static_cast<Scalar<T>>(3LL << (Traits<T>::mantissa_bits - 1));
  return (x + magic) - magic;
}

// e^r for |r| <= ln(2) / 2: Taylor's series, the first term left out is below half an ulp
template <class T>
FASTPO_FN T exp_reduced(T r) {
  T p;
  if constexpr (sizeof(Scalar<T>) == 4) {
    p = constant<T>(1.0 / 5040);
  } else {
    p = constant<T>(1.0 / 6227020800.0);
    p = p * r + constant<T>(1.0 / 479001600.0);
    p = p * r + constant<T>(1.0 / 39916800.0);
    p = p * r + constant<T>(1.0 / 3628800.0);
    p = p * r + constant<T>(1.0 / 362880.0);
    p = p * r + constant<T>(1.0 / 40320.0);
    p = p * r + constant<T>(1.0 / 5040.0);
  }
  p = p * r + constant<T>(1.0 / 720);
  p = p * r + constant<T>(1.0 / 120);
  p = p * r + constant<T>(1.0 / 24);
  p = p * r + constant<T>(1.0 / 6);
  p = p * r + constant<T>(0.5);
  p = p * r + constant<T>(1.0);
  return p * r + constant<T>(1.0);
}

template <class T>
FASTPO_FN T exp(T x) {
  constexpr bool single = sizeof(Scalar<T>) == 4;
  // beyond these the result is 0 or inf; NaN fails both comparisons and stays
  const T lowest = constant<T>(single ? -104.0 : -746.0);
  const T highest = constant<T>(single ? 89.0 : 710.0);
  T clamped = select(x < lowest, lowest, x);
  clamped = select(clamped > highest, highest, clamped);
  const T n = round_nearest(clamped * constant<T>(1.4426950408889634));
  const T high = constant<T>(single ? 0.693359375 : 6.93147180369123816490e-01);
  const T low = constant<T>(single ? -2.12194440054690583e-4 : 1.90821492927058770002e-10);
  const T r = (clamped - n * high) - n * low;
  // in two steps: 2^n itself may be out of range where the result is not
  const T half = round_nearest(n * constant<T>(0.5));
  return exp_reduced(r) * power_of_two(half) * power_of_two(n - half);
}

// log(x) for positive, finite, normal x
template <class T>
FASTPO_FN T log_normal(T x) {
  using I = typename Traits<T>::Int;
  using IS = typename Traits<T>::IntScalar;
  constexpr bool single = sizeof(Scalar<T>) == 4;
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)): the offset moves the cut of the exponent to sqrt(1/2)
  const IS sqrt_half = static_cast<IS>(single ? 0x3f3504f3LL : 0x3fe6a09e667f3bcdLL);
  const I shifted = to_bits(x) - sqrt_half;
  const I e = shifted >> static_cast<IS>(Traits<T>::mantissa_bits);
  const T m = from_bits(static_cast<I>(to_bits(x) - (e << static_cast<IS>(Traits<T>::mantissa_bits))));
  // log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.1716: the first term left out is below half an ulp
  const T f = m - constant<T>(1.0);
  const T s = f / (m + constant<T>(1.0));
  const T z = s * s;
  T p;
  if constexpr (single) {
    p = constant<T>(2.0 / 9);
  } else {
    p = constant<T>(2.0 / 21);
    p = p * z + constant<T>(2.0 / 19);
    p = p * z + constant<T>(2.0 / 17);
    p = p * z + constant<T>(2.0 / 15);
    p = p * z + constant<T>(2.0 / 13);
    p = p * z + constant<T>(2.0 / 11);
    p = p * z + constant<T>(2.0 / 9);
  }
  p = p * z + constant<T>(2.0 / 7);
  p = p * z + constant<T>(2.0 / 5);
  p = p * z + constant<T>(2.0 / 3);
  const T exponent = to_float(e);
  const T high = constant<T>(single ? 0.693359375 : 6.93147180369123816490e-01);
  const T low = constant<T>(single ? -2.12194440054690583e-4 : 1.90821492927058770002e-10);
  // 2 s = f - s f, which keeps the rounding of s out of the leading term
  const T tail = s * (z * p - f) + exponent * low;
  return exponent * high + (f + tail);
}

// log(1 + x) for x in [0, 1], where 1 + x loses digits of x that the last term gives back
template <class T>
FASTPO_FN T log1p_unit(T x) {
  const T u = x + constant<T>(1.0);
  return log_normal(u) + (x - (u - constant<T>(1.0))) / u;
}

template <class T>
FASTPO_FN T abs(T x) {
  return select(x < T{}, -x, x);
}

}  // namespace FASTPO_NAMESPACE
