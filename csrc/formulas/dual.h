// Dual numbers: a value and its slopes with respect to k inputs; and given numbers, which have none. The chain rule is
// here and nowhere else.
#pragma once

#include "math.h"

namespace FASTPO_NAMESPACE {

template <class T, int k>
struct Dual {
  T value;
  T slope[k];
};

// input number `index`
template <int k, class T>
FASTPO_FN Dual<T, k> variable(T value, int index) {
  Dual<T, k> out;
  out.value = value;
  for (int i = 0; i < k; ++i) out.slope[i] = constant<T>(i == index ? 1.0 : 0.0);
  return out;
}

// f(x), given the value of f and its derivative at x
template <class T, int k>
FASTPO_FN Dual<T, k> chain(const Dual<T, k>& x, T value, T derivative) {
  Dual<T, k> out;
  out.value = value;
  for (int i = 0; i < k; ++i) out.slope[i] = derivative * x.slope[i];
  return out;
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator+(const Dual<T, k>& a, const Dual<T, k>& b) {
  Dual<T, k> out;
  out.value = a.value + b.value;
  for (int i = 0; i < k; ++i) out.slope[i] = a.slope[i] + b.slope[i];
  return out;
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator-(const Dual<T, k>& a, const Dual<T, k>& b) {
  Dual<T, k> out;
  out.value = a.value - b.value;
  for (int i = 0; i < k; ++i) out.slope[i] = a.slope[i] - b.slope[i];
  return out;
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator-(const Dual<T, k>& a) {
  return chain(a, -a.value, constant<T>(-1.0));
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator*(const Dual<T, k>& a, const Dual<T, k>& b) {
  Dual<T, k> out;
  out.value = a.value * b.value;
  for (int i = 0; i < k; ++i) out.slope[i] = a.slope[i] * b.value + a.value * b.slope[i];
  return out;
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator/(const Dual<T, k>& a, const Dual<T, k>& b) {
  Dual<T, k> out;
  out.value = a.value / b.value;
  for (int i = 0; i < k; ++i) out.slope[i] = (a.slope[i] - out.value * b.slope[i]) / b.value;
  return out;
}

// hyper-parameters and literals are double; they are rounded to T where they meet it
template <class T, int k>
FASTPO_FN Dual<T, k> operator*(double c, const Dual<T, k>& a) {
  return chain(a, constant<T>(c) * a.value, constant<T>(c));
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator*(const Dual<T, k>& a, double c) {
  return c * a;
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator/(const Dual<T, k>& a, double c) {
  return (1.0 / c) * a;
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator/(double c, const Dual<T, k>& a) {
  const T value = constant<T>(c) / a.value;
  return chain(a, value, -value / a.value);
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator+(const Dual<T, k>& a, double c) {
  return chain(a, a.value + constant<T>(c), constant<T>(1.0));
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator+(double c, const Dual<T, k>& a) {
  return a + c;
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator-(const Dual<T, k>& a, double c) {
  return chain(a, a.value - constant<T>(c), constant<T>(1.0));
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator-(double c, const Dual<T, k>& a) {
  return chain(a, constant<T>(c) - a.value, constant<T>(-1.0));
}

// A number of the row with no slopes. Beside a dual number it scales or shifts without touching the slopes' NaNs, as
// a dual number with slopes of 0 would.
template <class T>
struct Given {
  T value;
};

// a hyper-parameter or literal where a function of it is wanted in the accuracy of T
template <class T>
FASTPO_FN Given<T> given(double c) {
  return {constant<T>(c)};
}

#define FASTPO_GIVEN_OPERATOR(op)                                        \
  template <class T>                                                     \
  FASTPO_FN Given<T> operator op(const Given<T>& a, const Given<T>& b) { \
    return {a.value op b.value};                                         \
  }                                                                      \
  template <class T>                                                     \
  FASTPO_FN Given<T> operator op(const Given<T>& a, double c) {          \
    return {a.value op constant<T>(c)};                                  \
  }                                                                      \
  template <class T>                                                     \
  FASTPO_FN Given<T> operator op(double c, const Given<T>& a) {          \
    return {constant<T>(c) op a.value};                                  \
  }
FASTPO_GIVEN_OPERATOR(+)
FASTPO_GIVEN_OPERATOR(-)
FASTPO_GIVEN_OPERATOR(*)
FASTPO_GIVEN_OPERATOR(/)
#undef FASTPO_GIVEN_OPERATOR

template <class T>
FASTPO_FN Given<T> operator-(const Given<T>& a) {
  return {-a.value};
}

template <class T>
FASTPO_FN Given<T> log(const Given<T>& a) {
  return {log(a.value)};
}

template <class T>
FASTPO_FN auto operator>(const Given<T>& a, double c) {
  return a.value > constant<T>(c);
}

template <class T>
FASTPO_FN auto operator<(const Given<T>& a, double c) {
  return a.value < constant<T>(c);
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator*(const Given<T>& c, const Dual<T, k>& a) {
  return chain(a, c.value * a.value, c.value);
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator*(const Dual<T, k>& a, const Given<T>& c) {
  return c * a;
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator/(const Dual<T, k>& a, const Given<T>& c) {
  return chain(a, a.value / c.value, constant<T>(1.0) / c.value);
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator+(const Dual<T, k>& a, const Given<T>& c) {
  return chain(a, a.value + c.value, constant<T>(1.0));
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator-(const Dual<T, k>& a, const Given<T>& c) {
  return chain(a, a.value - c.value, constant<T>(1.0));
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator-(const Given<T>& c, const Dual<T, k>& a) {
  return chain(a, c.value - a.value, constant<T>(-1.0));
}

// comparisons of the values: bool, or a mask where T is a vector; false where either is NaN
#define FASTPO_COMPARISON(op)                                            \
  template <class T, int k>                                              \
  FASTPO_FN auto operator op(const Dual<T, k>& a, const Dual<T, k>& b) { \
    return a.value op b.value;                                           \
  }                                                                      \
  template <class T, int k>                                              \
  FASTPO_FN auto operator op(const Dual<T, k>& a, double c) {            \
    return a.value op constant<T>(c);                                    \
  }                                                                      \
  template <class T, int k>                                              \
  FASTPO_FN auto operator op(double c, const Dual<T, k>& a) {            \
    return constant<T>(c) op a.value;                                    \
  }
FASTPO_COMPARISON(<)
FASTPO_COMPARISON(<=)
FASTPO_COMPARISON(>)
FASTPO_COMPARISON(>=)
#undef FASTPO_COMPARISON

// a constant: all slopes are 0
template <class D>
FASTPO_FN D lift(double c) {
  D out{};
  out.value = constant<decltype(out.value)>(c);
  return out;
}

// c a, and 0 for c = 0 also where a is not finite: a term that is not there
template <class T, int k>
FASTPO_FN Dual<T, k> times(double c, const Dual<T, k>& a) {
  return c == 0 ? Dual<T, k>{} : c * a;
}

template <class T, int k>
FASTPO_FN Dual<T, k> detach(const Dual<T, k>& a) {
  Dual<T, k> out{};
  out.value = a.value;
  return out;
}

// What is not chosen has no influence, also where its value or its slopes are not finite. Condition is a comparison
// of duals, or a bool for all lanes.
template <class Condition, class T, int k>
FASTPO_FN Dual<T, k> where(Condition condition, const Dual<T, k>& a, const Dual<T, k>& b) {
  if constexpr (sizeof(Condition) == sizeof(bool)) {
    return condition ? a : b;
  } else {
    Dual<T, k> out;
    out.value = select(condition, a.value, b.value);
    for (int i = 0; i < k; ++i) out.slope[i] = select(condition, a.slope[i], b.slope[i]);
    return out;
  }
}

template <class Condition, class T, int k>
FASTPO_FN Dual<T, k> where(Condition condition, const Dual<T, k>& a, double b) {
  return where(condition, a, lift<Dual<T, k>>(b));
}

template <class Condition, class T, int k>
FASTPO_FN Dual<T, k> where(Condition condition, double a, const Dual<T, k>& b) {
  return where(condition, lift<Dual<T, k>>(a), b);
}

// `value` is the lesser or the greater of a and b; `a_stays` and `b_stays` say which of them is not. Each gives half
// of its slopes at a tie, and both give all at NaN, as in torch.
template <class T, int k, class Mask>
FASTPO_FN Dual<T, k> extremum(const Dual<T, k>& a, const Dual<T, k>& b, T value, Mask a_stays, Mask b_stays) {
  const T share = select(a.value == b.value, constant<T>(0.5), constant<T>(1.0));
  const T of_a = select(a_stays, T{}, share), of_b = select(b_stays, T{}, share);
  Dual<T, k> out;
  out.value = value;
  for (int i = 0; i < k; ++i) out.slope[i] = of_a * a.slope[i] + of_b * b.slope[i];
  return out;
}

template <class T, int k>
FASTPO_FN Dual<T, k> minimum(const Dual<T, k>& a, const Dual<T, k>& b) {
  return extremum(a, b, minimum(a.value, b.value), b < a, a < b);
}

template <class T, int k>
FASTPO_FN Dual<T, k> maximum(const Dual<T, k>& a, const Dual<T, k>& b) {
  return extremum(a, b, maximum(a.value, b.value), a < b, b < a);
}

template <class T, int k>
FASTPO_FN Dual<T, k> minimum(const Dual<T, k>& a, double b) {
  return minimum(a, lift<Dual<T, k>>(b));
}

template <class T, int k>
FASTPO_FN Dual<T, k> minimum(double a, const Dual<T, k>& b) {
  return minimum(lift<Dual<T, k>>(a), b);
}

template <class T, int k>
FASTPO_FN Dual<T, k> maximum(const Dual<T, k>& a, double b) {
  return maximum(a, lift<Dual<T, k>>(b));
}

template <class T, int k>
FASTPO_FN Dual<T, k> maximum(double a, const Dual<T, k>& b) {
  return maximum(lift<Dual<T, k>>(a), b);
}

// the slope is 1 on both bounds and 0 at NaN, as in torch
template <class T, int k>
FASTPO_FN Dual<T, k> clip(const Dual<T, k>& a, double low, double high) {
  const T one = constant<T>(1.0);
  const T below_high = select(a.value <= constant<T>(high), one, T{});
  return chain(a, clip(a.value, low, high), select(a.value >= constant<T>(low), below_high, T{}));
}

// the slope is 0 at 0 and at NaN, as in torch
template <class T, int k>
FASTPO_FN Dual<T, k> abs(const Dual<T, k>& a) {
  const T sign = select(a.value > T{}, constant<T>(1.0), select(a.value < T{}, constant<T>(-1.0), T{}));
  // adding 0 makes -0 positive
  return chain(a, abs(a.value) + T{}, sign);
}

template <class T, int k>
FASTPO_FN Dual<T, k> exp(const Dual<T, k>& a) {
  const T value = exp(a.value);
  return chain(a, value, value);
}

template <class T, int k>
FASTPO_FN Dual<T, k> exp_near(const Dual<T, k>& a) {
  const T value = exp_near(a.value);
  return chain(a, value, value);
}

template <class T, int k>
FASTPO_FN Dual<T, k> expm1(const Dual<T, k>& a) {
  return chain(a, expm1(a.value), exp(a.value));
}

template <class T, int k>
FASTPO_FN Dual<T, k> log(const Dual<T, k>& a) {
  return chain(a, log(a.value), constant<T>(1.0) / a.value);
}

template <class T, int k>
FASTPO_FN Dual<T, k> log1p(const Dual<T, k>& a) {
  return chain(a, log1p(a.value), constant<T>(1.0) / (a.value + constant<T>(1.0)));
}

template <class T, int k>
FASTPO_FN Dual<T, k> log1mexp(const Dual<T, k>& a) {
  // -e^x / (1 - e^x), with 0 - 0 = +0 in the denominator at 0
  return chain(a, log1mexp(a.value), -(exp(a.value) / (T{} - expm1(a.value))));
}

template <class T, int k>
FASTPO_FN Dual<T, k> sqrt(const Dual<T, k>& a) {
  const T value = sqrt(a.value);
  return chain(a, value, constant<T>(0.5) / value);
}

template <class T, int k>
FASTPO_FN Dual<T, k> square(const Dual<T, k>& a) {
  return chain(a, a.value * a.value, constant<T>(2.0) * a.value);
}

template <int n, class T, int k>
FASTPO_FN Dual<T, k> power(const Dual<T, k>& a) {
  if constexpr (n == 0)
    return lift<Dual<T, k>>(1.0);
  else
    return chain(a, power<n>(a.value), constant<T>(n) * power<n - 1>(a.value));
}

template <class T, int k>
FASTPO_FN Dual<T, k> power(const Dual<T, k>& a, double p) {
  return chain(a, power(a.value, p), constant<T>(p) * power(a.value, p - 1.0));
}

// the slope is 0 at 0 and 1 at NaN, as in torch
template <class T, int k>
FASTPO_FN Dual<T, k> relu(const Dual<T, k>& a) {
  return chain(a, select(a.value < T{}, T{}, a.value), select(a.value <= T{}, T{}, constant<T>(1.0)));
}

// 1 - sigmoid^2 and the like would lose the digits of slopes near 0: they come from the exponential itself
template <class T, int k>
FASTPO_FN Dual<T, k> sigmoid(const Dual<T, k>& a) {
  const T e = exp(-abs(a.value)), sum = e + constant<T>(1.0);
  return chain(a, select(a.value < T{}, e, constant<T>(1.0)) / sum, e / (sum * sum));
}

template <class T, int k>
FASTPO_FN Dual<T, k> tanh(const Dual<T, k>& a) {
  const T e = exp(constant<T>(-2.0) * abs(a.value)), sum = e + constant<T>(1.0);
  return chain(a, tanh(a.value), constant<T>(4.0) * e / (sum * sum));
}

template <class T, int k>
FASTPO_FN Dual<T, k> softplus(const Dual<T, k>& a) {
  // one exponential serves value and slope
  const T e = exp(-abs(a.value));
  const T value = select(a.value < T{}, T{}, a.value) + log1p_unit(e);
  return chain(a, value, select(a.value < T{}, e, constant<T>(1.0)) / (e + constant<T>(1.0)));
}

template <class T, int k>
FASTPO_FN Dual<T, k> log_sigmoid(const Dual<T, k>& a) {
  return -softplus(-a);
}

// e^x for x up to 80, beyond which it is constant: the difference of two of them is never inf - inf in fp32
template <class T, int k>
FASTPO_FN Dual<T, k> bounded_exp(const Dual<T, k>& a) {
  return exp(clip(a, -1e30, 80.0));
}

// log(p / (1 - p)) of p = e^x, where x beyond -1e-6 counts as that: the odds of probability 1 are infinite
template <class T, int k>
FASTPO_FN Dual<T, k> log_odds(const Dual<T, k>& a) {
  const Dual<T, k> x = clip(a, -1e30, -1e-6);
  return x - log1mexp(x);
}

}  // namespace FASTPO_NAMESPACE
