// Steps of returns and advantages: what a token does to the advantage of what comes behind it. CPU and GPU share them.
#pragma once

#include "math.h"

namespace FASTPO_NAMESPACE {

// x <- slope x + shift
template <class T>
struct Affine {
  T slope, shift;
};

// A slope of 0 forgets x, also one that is inf or NaN: what another episode holds has no influence.
template <class T>
FASTPO_FN T apply(const Affine<T>& step, T x) {
  return select(step.slope == T{}, step.shift, step.slope * x + step.shift);
}

// first `inner`, then `outer`
template <class T>
FASTPO_FN Affine<T> compose(const Affine<T>& outer, const Affine<T>& inner) {
  return {select(outer.slope == T{}, T{}, outer.slope * inner.slope), apply(outer, inner.shift)};
}

template <class T>
struct AdvantageStep {
  Affine<T> step;
  T push;  // weight in the policy-gradient advantage of x behind the token
};

// delta = rho (r + gamma V' - V), and a = gamma lambda min(c_bar, ratio); rho = min(rho_bar, ratio). V' is 0 behind a
// terminated token, and nothing is carried over the end of an episode. Without log-ratios rho = ratio = 1: GAE.
template <class T, class Flag>
FASTPO_FN AdvantageStep<T> advantage_step(T reward, T value, T next_value, Flag terminated, Flag ended, double gamma,
                                          double lambda) {
  const T ahead = select(terminated, T{}, constant<T>(gamma) * next_value);
  const T carried = select(ended, T{}, constant<T>(gamma));
  return {{carried * constant<T>(lambda), (reward + ahead) - value}, carried};
}

template <class T>
FASTPO_FN AdvantageStep<T> off_policy(const AdvantageStep<T>& on, T log_ratio, double rho_bar, double c_bar) {
  const T ratio = exp(log_ratio), rho = minimum(ratio, constant<T>(rho_bar));
  const T c = minimum(ratio, constant<T>(c_bar));
  return {{on.step.slope * c, rho * on.step.shift}, rho * on.push};
}

}  // namespace FASTPO_NAMESPACE
