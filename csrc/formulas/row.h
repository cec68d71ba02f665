// What a formula of an objective sees: one row of the batch, and the hyper-parameters.
#pragma once

#include "dual.h"

namespace FASTPO_NAMESPACE {

// Hyper-parameters of all formulas, by name; Python reads the names from the library and fills them in this
// order.
#define FASTPO_HYPER_PARAMETERS(X) \
  X(beta)                          \
  X(label_smoothing)               \
  X(alpha)                         \
  X(gamma)                         \
  X(delta)                         \
  X(eta)                           \
  X(tau)                           \
  X(lambda_)                       \
  X(beta_rejected)                 \
  X(r_max)                         \
  X(lambda_desirable)              \
  X(lambda_undesirable)            \
  X(epsilon)

struct Hyper {
#define FASTPO_FIELD(name) double name;
  FASTPO_HYPER_PARAMETERS(FASTPO_FIELD)
#undef FASTPO_FIELD
};

constexpr int max_columns = 4;

// One row with k sides (a pair: chosen and rejected). Log-probs are sums, or per-token averages where the objective
// is on averages.
template <class T, int k>
struct Row {
  Dual<T, k> policy[k];
  Dual<T, k> logratio[k];  // to the reference; the policy's own log-prob where there is none
  Dual<T, k> step[k];      // log-ratio to the previous iterate
  Given<T> reference[k];
  Given<T> length[k];  // tokens, at least 1; only of objectives that ask for them
  Given<T> column[max_columns];
};

}  // namespace FASTPO_NAMESPACE
