// Pairwise objectives. Each line is one method: its name in the registry and its loss, as the paper writes
// it.
#pragma once

#include "dual.h"

namespace FASTPO_NAMESPACE {

// Hyper-parameters of all formulas, by name; Python reads the names from the library and fills them in this
// order.
#define FASTPO_HYPER_PARAMETERS(X) \
  X(beta)                          \
  X(label_smoothing)

struct Hyper {
#define FASTPO_FIELD(name) double name;
  FASTPO_HYPER_PARAMETERS(FASTPO_FIELD)
#undef FASTPO_FIELD
};

// What a formula sees of a pair: log-probs of both completions under the policy and their ratios to the
// reference, sums or, with length_norm, per-token averages.
template <class T>
struct Pair {
  using D = Dual<T, 2>;
  D chosen, rejected;
  D chosen_logratio, rejected_logratio;

  FASTPO_FN D margin() const { return chosen_logratio - rejected_logratio; }
};

// An objective's number is its place in the list, and compiled graphs keep it: append only.
// p is the pair, h the hyper-parameters.
#define FASTPO_PAIRWISE_FORMULAS(F)                                            \
  F(dpo, -log_sigmoid(h.beta* p.margin()))                                     \
  F(cdpo, -((1 - h.label_smoothing) * log_sigmoid(h.beta * p.margin())) -      \
              h.label_smoothing * log_sigmoid(-(h.beta * p.margin())))         \
  F(robust_dpo, (h.label_smoothing * log_sigmoid(-(h.beta * p.margin())) -     \
                 (1 - h.label_smoothing) * log_sigmoid(h.beta * p.margin())) / \
                    (1 - 2 * h.label_smoothing))                               \
  F(ipo, square(p.margin() - 1 / (2 * h.beta)))                                \
  F(hinge, relu(1 - h.beta * p.margin()))

#define FASTPO_FORMULA(name, loss)                                           \
  struct name {                                                              \
    template <class T>                                                       \
    static FASTPO_FN Dual<T, 2> evaluate(const Pair<T>& p, const Hyper& h) { \
      return loss;                                                           \
    }                                                                        \
  };
namespace pairwise {
FASTPO_PAIRWISE_FORMULAS(FASTPO_FORMULA)
}
#undef FASTPO_FORMULA

}  // namespace FASTPO_NAMESPACE
