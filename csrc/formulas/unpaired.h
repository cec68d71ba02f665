// Objectives on one completion per row: labelled desirable or not, or sampled from the policy. As pairwise.h.
#pragma once

#include "row.h"

namespace FASTPO_NAMESPACE {

// Append only. y: log-ratio to the reference; policy: log-prob; step: log-ratio to the previous iterate;
// c: columns; h: hyper-parameters.
#define FASTPO_UNPAIRED_FORMULAS(F)                                                                                    \
  F(kto,                                                                                                               \
    (c[0] * h.lambda_desirable + (1 - c[0]) * h.lambda_undesirable) * sigmoid((1 - 2 * c[0]) * (h.beta * (y - c[1])))) \
  F(bco, -(c[2] * log_sigmoid((2 * c[0] - 1) * (h.beta * y - c[1]))))                                                  \
  F(npo, 2 / h.beta * softplus(h.beta * y))                                                                            \
  F(nash, -(detach(c[0] - 0.5 - h.beta * y - h.eta * step) * policy))                                                  \
  F(nash_to_go, policy)

#define FASTPO_FORMULA(name, loss)                                                                \
  struct name {                                                                                   \
    template <class T>                                                                            \
    static FASTPO_FN Dual<T, 1> evaluate(const Row<T, 1>& row, [[maybe_unused]] const Hyper& h) { \
      using D = Dual<T, 1>;                                                                       \
      [[maybe_unused]] const D y = row.logratio[0], policy = row.policy[0], step = row.step[0];   \
      [[maybe_unused]] const Given<T>* c = row.column;                                            \
      return loss;                                                                                \
    }                                                                                             \
  };
namespace unpaired {
FASTPO_UNPAIRED_FORMULAS(FASTPO_FORMULA)
}
#undef FASTPO_FORMULA

}  // namespace FASTPO_NAMESPACE
