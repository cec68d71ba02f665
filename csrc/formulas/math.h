// Branch-free elementary functions that vectorise, for any T of scalar.h. Each takes every argument, and what it
// gives at the ends of its domain, at inf and at NaN is what torch gives; the names that end otherwise (_reduced,
// _normal, _unit, _near) say where they hold. tests/losses/test_formula.py states the error of each in ulp.
#pragma once

#include "scalar.h"

namespace FASTPO_NAMESPACE {

template <class T>
FASTPO_FN T constant(double x) {
  return T{} + static_cast<Scalar<T>>(x);
}

template <class T>
FASTPO_FN T infinity() {
  using I = typename Traits<T>::Int;
  using IS = typename Traits<T>::IntScalar;
  constexpr bool single = sizeof(Scalar<T>) == 4;
  return from_bits(static_cast<I>(I{} + static_cast<IS>(single ? 0x7f800000LL : 0x7ff0000000000000LL)));
}

template <class T>
FASTPO_FN T not_a_number() {
  using I = typename Traits<T>::Int;
  using IS = typename Traits<T>::IntScalar;
  constexpr bool single = sizeof(Scalar<T>) == 4;
  return from_bits(static_cast<I>(I{} + static_cast<IS>(single ? 0x7fc00000LL : 0x7ff8000000000000LL)));
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

template <class T>
FASTPO_FN T abs(T x) {
  return select(x < T{}, -x, x);
}

// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2: Taylor's series, the first term left out is below half an ulp of e^r
template <class T>
FASTPO_FN T exp_tail(T r) {
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
  return p * r + constant<T>(0.5);
}

// e^r for |r| <= ln(2) / 2
template <class T>
FASTPO_FN T exp_reduced(T r) {
  const T p = exp_tail(r) * r + constant<T>(1.0);
  return p * r + constant<T>(1.0);
}

// ln(2) in two parts, the first of few bits, so that its product with an exponent is exact
template <class T>
struct Ln2 {
  static constexpr double high = sizeof(Scalar<T>) == 4 ? 0.693359375 : 6.93147180369123816490e-01;
  static constexpr double low = sizeof(Scalar<T>) == 4 ? -2.12194440054690583e-4 : 1.90821492927058770002e-10;
};

// x = n ln(2) + r, where n is x / ln(2) to the nearest integer. 2^n comes in two powers, 2^half and the rest, as it
// may itself be out of range where the result is not.
template <class T>
struct ExpArgument {
  T r, n, half, power, other_power;
};

template <class T>
FASTPO_FN ExpArgument<T> reduce_exp(T x) {
  constexpr bool single = sizeof(Scalar<T>) == 4;
  // beyond these the result is 0 or inf; NaN stays
  const T lowest = constant<T>(single ? -104.0 : -746.0);
  const T highest = constant<T>(single ? 89.0 : 710.0);
  const T clamped = smaller_of(highest, larger_of(lowest, x));
  ExpArgument<T> out;
  out.n = round_nearest(clamped * constant<T>(1.4426950408889634));
  out.r = (clamped - out.n * constant<T>(Ln2<T>::high)) - out.n * constant<T>(Ln2<T>::low);
  out.half = round_nearest(out.n * constant<T>(0.5));
  out.power = power_of_two(out.half);
  out.other_power = power_of_two(out.n - out.half);
  return out;
}

template <class T>
FASTPO_FN T exp(T x) {
  const ExpArgument<T> a = reduce_exp(x);
  return exp_reduced(a.r) * a.power * a.other_power;
}

// e^x - 1
template <class T>
FASTPO_FN T expm1(T x) {
  const ExpArgument<T> a = reduce_exp(x);
  const T p = a.r + (a.r * a.r) * exp_tail(a.r);
  // 2^n p + 2^n - 1, of which one power of two is taken out, so that nothing overflows before the result
  return (p * a.power + (a.power - power_of_two(a.half - a.n))) * a.other_power;
}

// The same of |x| <= 80, where 2^n is in range in one piece; NaN stays.
template <class T>
FASTPO_FN ExpArgument<T> reduce_exp_near(T x) {
  ExpArgument<T> out;
  out.n = round_nearest(x * constant<T>(1.4426950408889634));
  out.r = (x - out.n * constant<T>(Ln2<T>::high)) - out.n * constant<T>(Ln2<T>::low);
  out.power = power_of_two(out.n);
  return out;
}

template <class T>
FASTPO_FN T exp_near(T x) {
  const ExpArgument<T> a = reduce_exp_near(x);
  return exp_reduced(a.r) * a.power;
}

template <class T>
FASTPO_FN T expm1_near(T x) {
  const ExpArgument<T> a = reduce_exp_near(x);
  return (a.r + (a.r * a.r) * exp_tail(a.r)) * a.power + (a.power - constant<T>(1.0));
}

// x = 2^exponent mantissa with the mantissa in [sqrt(1/2), sqrt(2))
template <class T>
struct Split {
  T exponent, mantissa;
};

// of a positive, finite, normal x
template <class T>
FASTPO_FN Split<T> split_normal(T x) {
  using I = typename Traits<T>::Int;
  using IS = typename Traits<T>::IntScalar;
  // the offset moves the cut of the exponent to sqrt(1/2)
  const IS sqrt_half = static_cast<IS>(sizeof(Scalar<T>) == 4 ? 0x3f3504f3LL : 0x3fe6a09e667f3bcdLL);
  const I shifted = to_bits(x) - sqrt_half;
  const I e = shifted >> static_cast<IS>(Traits<T>::mantissa_bits);
  const T m = from_bits(static_cast<I>(to_bits(x) - (e << static_cast<IS>(Traits<T>::mantissa_bits))));
  return {to_float(e), m};
}

// of a positive, finite x, which may be subnormal; of anything else, numbers without meaning
template <class T>
FASTPO_FN Split<T> split(T x) {
  constexpr bool single = sizeof(Scalar<T>) == 4;
  const T smallest_normal = constant<T>(single ? 1.1754943508222875e-38 : 2.2250738585072014e-308);
  // the bits of a negative number would overflow in the subtraction
  const T positive = select(x > T{}, x, constant<T>(1.0));
  Split<T> out = split_normal(select(x < smallest_normal, positive * constant<T>(18014398509481984.0), positive));
  out.exponent = out.exponent - select(x < smallest_normal, constant<T>(54.0), T{});
  return out;
}

// log(1 + f) - f for 1 + f in [sqrt(1/2), sqrt(2)), without cancellation
template <class T>
FASTPO_FN T log1p_tail(T f) {
  // log(1 + f) = 2 atanh(s), s = f / (2 + f), |s| < 0.1716: the first term left out is below half an ulp
  const T s = f / (f + constant<T>(2.0));
  const T z = s * s;
  T p;
  if constexpr (sizeof(Scalar<T>) == 4) {
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
  // 2 s = f - s f, which keeps the rounding of s out of the leading term
  return s * (z * p - f);
}

// log(m) for m in [sqrt(1/2), sqrt(2)), plus the low part of log(2^exponent)
template <class T>
FASTPO_FN T log_reduced(T m, T exponent) {
  const T f = m - constant<T>(1.0);
  return f + (log1p_tail(f) + exponent * constant<T>(Ln2<T>::low));
}

template <class T>
FASTPO_FN T log_split(const Split<T>& x) {
  return x.exponent * constant<T>(Ln2<T>::high) + log_reduced(x.mantissa, x.exponent);
}

// log(x) for positive, finite, normal x
template <class T>
FASTPO_FN T log_normal(T x) {
  return log_split(split_normal(x));
}

template <class T>
FASTPO_FN T log(T x) {
  const T y = select(x < infinity<T>(), log_split(split(x)), x);
  return select(x < T{}, not_a_number<T>(), select(x == T{}, -infinity<T>(), y));
}

// log(1 + x) for x in [0, 1], where 1 + x loses digits of x that the last term gives back
template <class T>
FASTPO_FN T log1p_unit(T x) {
  const T u = x + constant<T>(1.0);
  return log_normal(u) + (x - (u - constant<T>(1.0))) / u;
}

// log(1 + x)
template <class T>
FASTPO_FN T log1p(T x) {
  const T u = x + constant<T>(1.0);
  const T lost = (x - (u - constant<T>(1.0))) / u;
  // nothing is lost at the ends of the domain, where the quotient is NaN
  return log(u) + select(u > T{}, select(u < infinity<T>(), lost, T{}), T{});
}

// log(1 - e^x)
template <class T>
FASTPO_FN T log1mexp(T x) {
  // 1 - e^x is close to 0 for small |x|, and e^x for large ones
  return select(x > constant<T>(-0.6931471805599453), log(-expm1(x)), log1p(-exp(x)));
}

template <class T>
FASTPO_FN T sqrt(T x) {
  constexpr int lanes_of_x = sizeof(T) / sizeof(Scalar<T>);
  if constexpr (lanes_of_x > 1) {
    for (int i = 0; i < lanes_of_x; ++i) x[i] = sqrt<Scalar<T>>(x[i]);
    return x;
  } else if constexpr (sizeof(T) == 4) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
  } else {
#if defined(__CUDA_ARCH__)
    return __dsqrt_rn(x);
#else
    return __builtin_sqrt(x);
#endif
  }
}

template <class T>
FASTPO_FN T square(T x) {
  return x * x;
}

template <class T>
FASTPO_FN T relu(T x) {
  return select(x < T{}, T{}, x);
}

template <class T>
FASTPO_FN T sigmoid(T x) {
  const T e = exp(-abs(x));
  return select(x < T{}, e, constant<T>(1.0)) / (e + constant<T>(1.0));
}

template <class T>
FASTPO_FN T softplus(T x) {
  return relu(x) + log1p_unit(exp(-abs(x)));
}

template <class T>
FASTPO_FN T log_sigmoid(T x) {
  return -softplus(-x);
}

template <class T>
FASTPO_FN T tanh(T x) {
  const T e = expm1(constant<T>(-2.0) * abs(x));
  const T y = -e / (e + constant<T>(2.0));
  return select(x < T{}, -y, y);
}

// NaN if either is
template <class T>
FASTPO_FN T minimum(T a, T b) {
  return select(a != a, a, smaller_of(a, b));
}

template <class T>
FASTPO_FN T maximum(T a, T b) {
  return select(a != a, a, larger_of(a, b));
}

template <class T>
FASTPO_FN T clip(T x, double low, double high) {
  return smaller_of(constant<T>(high), larger_of(constant<T>(low), x));
}

template <class T>
FASTPO_FN T detach(T x) {
  return x;
}

// x^n, to about 0.8 n ulp
template <int n, class T>
FASTPO_FN T power(T x) {
  static_assert(n >= 0);
  if constexpr (n == 0)
    return constant<T>(1.0);
  else if constexpr (n == 1)
    return x;
  else if constexpr (n % 2 == 1)
    return x * power<n - 1>(x);
  else
    return square(power<n / 2>(x));
}

// x^p for p that is no integer, |p| <= 64, to about 1 + 0.8 |p| ulp. As in C, NaN for negative x, but not for -inf.
template <class T>
FASTPO_FN T power(T x, double p) {
  constexpr bool single = sizeof(Scalar<T>) == 4;
  // x^p = 2^(p e) m^p. The error of p e would grow with e, so its integral part is taken off while it is exact:
  // the leading bits of p times the few bits of e.
  const double leading = from_bits(to_bits(p) & ~((Int64{1} << (single ? 37 : 11)) - 1));
  const Split<T> parts = split(x);
  const T exact = constant<T>(leading) * parts.exponent;
  const T n = round_nearest(exact);
  const T rest = constant<T>((p - leading) * 0.6931471805599453) * parts.exponent;
  const T r =
      constant<T>(0.6931471805599453) * (exact - n) + (rest + constant<T>(p) * log_reduced(parts.mantissa, T{}));
  // far enough to overflow or to vanish whatever e^r is
  const T furthest = constant<T>(single ? 214.0 : 1139.0);
  const T clamped = smaller_of(furthest, larger_of(-furthest, n));
  const T half = round_nearest(clamped * constant<T>(0.5));
  const T inside = exp(r) * power_of_two(half) * power_of_two(clamped - half);
  const T size = abs(x), inverse = constant<T>(1.0) / size;
  const T y = select(x < T{}, not_a_number<T>(), select(x == T{}, p > 0 ? T{} : infinity<T>(), inside));
  return select(size < infinity<T>(), y, p > 0 ? size : inverse);
}

FASTPO_FN double where(bool condition, double a, double b) { return condition ? a : b; }

}  // namespace FASTPO_NAMESPACE
