// Dual numbers: a value and its slopes with respect to k inputs. The chain rule is here and nowhere else.
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

// hyper-parameters and literals are double; they are rounded to T where they meet it
template <class T, int k>
FASTPO_FN Dual<T, k> operator*(double c, const Dual<T, k>& a) {
  return chain(a, constant<T>(c) * a.value, constant<T>(c));
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator/(const Dual<T, k>& a, double c) {
  return (1.0 / c) * a;
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator-(const Dual<T, k>& a, double c) {
  return chain(a, a.value - constant<T>(c), constant<T>(1.0));
}

template <class T, int k>
FASTPO_FN Dual<T, k> operator-(double c, const Dual<T, k>& a) {
  return chain(a, constant<T>(c) - a.value, constant<T>(-1.0));
}

template <class T, int k>
FASTPO_FN Dual<T, k> square(const Dual<T, k>& a) {
  return chain(a, a.value * a.value, constant<T>(2.0) * a.value);
}

// the slope is 0 at 0 and 1 at NaN, as in torch
template <class T, int k>
FASTPO_FN Dual<T, k> relu(const Dual<T, k>& a) {
  return chain(a, select(a.value < T{}, T{}, a.value), select(a.value <= T{}, T{}, constant<T>(1.0)));
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

}  // namespace FASTPO_NAMESPACE
