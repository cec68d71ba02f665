// Pairwise objectives. Each line is one formula: its name in the registry and its loss, as the paper writes it.
#pragma once

#include "row.h"

namespace FASTPO_NAMESPACE {

// P3O's loss of one side from its log-ratio, the other side's, and the gap of rewards to it; the ratio is clipped.
template <class T, int k>
FASTPO_FN Dual<T, k> p3o_side(const Dual<T, k>& step, const Dual<T, k>& other, const Dual<T, k>& gap, double epsilon) {
  const Dual<T, k> ratio = exp(clip(step, -20.0, 20.0)), weight = gap * detach(exp(clip(other, -20.0, 20.0)));
  return -0.5 * minimum(weight * ratio, weight * clip(ratio, 1 - epsilon, 1 + epsilon));
}

// of both sides, whose difference of log-ratios is clipped
template <class T, int k>
FASTPO_FN Dual<T, k> p3o_both(const Dual<T, k>& first, const Dual<T, k>& second, const Dual<T, k>& gap,
                              double epsilon) {
  const Dual<T, k> weight = gap * detach(exp(clip(first, -20.0, 20.0)) * exp(clip(second, -20.0, 20.0)));
  const Dual<T, k> margin = first - second;
  return -0.5 * minimum(weight * margin, weight * clip(margin, -epsilon, epsilon));
}

// A formula's number is its place in the list, and compiled graphs keep it: append only.
// w, l: log-ratios of the chosen and the rejected completion to the reference; policy_*, reference_*: log-probs;
// step_*: log-ratios to the previous iterate; n_w, n_l: lengths; c: columns; h: hyper-parameters.
#define FASTPO_PAIRWISE_FORMULAS(F)                                                                                   \
  F(dpo, -log_sigmoid(h.beta*(w - l)))                                                                                \
  F(cdpo, -((1 - h.label_smoothing) * log_sigmoid(h.beta * (w - l))) -                                                \
              times(h.label_smoothing, log_sigmoid(-(h.beta * (w - l)))))                                             \
  F(robust_dpo, (times(h.label_smoothing, log_sigmoid(-(h.beta * (w - l)))) -                                         \
                 (1 - h.label_smoothing) * log_sigmoid(h.beta * (w - l))) /                                           \
                    (1 - 2 * h.label_smoothing))                                                                      \
  F(ipo, square(w - l - 1 / (2 * h.beta)))                                                                            \
  F(hinge, relu(1 - h.beta * (w - l)))                                                                                \
  F(cdpo_each,                                                                                                        \
    -((1 - c[0]) * log_sigmoid(h.beta * (w - l))) - where(c[0] > 0, c[0] * log_sigmoid(-(h.beta * (w - l))), 0.0))    \
  F(slic, relu(h.delta - h.beta * (policy_w - policy_l)) - h.lambda_ * policy_w)                                      \
  F(sppo, 0.5 * (square(w - (c[0] - 0.5) / h.beta) + square(l - (c[1] - 0.5) / h.beta)))                              \
  F(sppo_hard, square(w - 0.5 / h.beta) + square(l + 0.5 / h.beta))                                                   \
  F(inpo, square(h.beta / h.eta * (w - l) + (1 - h.beta / h.eta) * (step_w - step_l) - 1 / (2 * h.eta)))              \
  F(xpo, -log_sigmoid(h.beta*(w - l)) + h.alpha * where(c[0] > 0.5, policy_w, policy_l))                              \
  F(rpo, -log_sigmoid(h.beta*(w - l)) - h.eta * h.beta * policy_w)                                                    \
  F(iterative_rpo, -log_sigmoid(h.beta*(w - l)) - h.alpha * (policy_w / n_w))                                         \
  F(forward_kl_dpo, -log_sigmoid(h.beta*(bounded_exp(-l) - bounded_exp(-w))))                                         \
  F(jsd_dpo, -log_sigmoid(h.beta*(log_sigmoid(w) - log_sigmoid(l))))                                                  \
  F(alpha_dpo_divergence, -log_sigmoid(h.beta / h.alpha * (bounded_exp(-h.alpha * l) - bounded_exp(-h.alpha * w))))   \
  F(chi_po, -log_sigmoid(clip(h.beta*((bounded_exp(w) + w) - (bounded_exp(l) + l)), -2 * h.r_max, 2 * h.r_max)))      \
  F(nca_pair, -log_sigmoid(h.beta* w) - 0.5 * (log_sigmoid(-(h.beta * w)) + log_sigmoid(-(h.beta * l))))              \
  F(exo_pair,                                                                                                         \
    sigmoid(h.beta*(w - l)) * (log_sigmoid(h.beta * (w - l)) - log(given<T>(1 - h.label_smoothing))) +                \
        sigmoid(-(h.beta * (w - l))) * (log_sigmoid(-(h.beta * (w - l))) - log(given<T>(h.label_smoothing))))         \
  F(apo_zero, sigmoid(-(h.beta * w)) + sigmoid(h.beta * l))                                                           \
  F(apo_down, sigmoid(h.beta* w) + sigmoid(-(h.beta * (w - l))))                                                      \
  F(bco_pair, -log_sigmoid(h.beta* w - c[0]) - log_sigmoid(c[0] - h.beta * l))                                        \
  F(offset_dpo, -((1 - h.label_smoothing) * log_sigmoid(h.beta * (w - l) + c[0])) -                                   \
                    times(h.label_smoothing, log_sigmoid(-(h.beta * (w - l) + c[0]))))                                \
  F(discopop, sigmoid(-(h.beta / h.tau * (w - l))) * softplus(-(h.beta * (w - l))) +                                  \
                  exp(log_sigmoid(h.beta / h.tau * (w - l)) - h.beta * (w - l)))                                      \
  F(flex_dpo, -log_sigmoid(h.beta* w - h.beta_rejected * l))                                                          \
  F(cal_dpo, -log_sigmoid(w - l) + h.lambda_ * (square(w - 0.5 / h.beta) + square(l + 0.5 / h.beta)))                 \
  F(online_ipo, c[0] * square(w - l - 0.5 / h.beta) + (1 - c[0]) * square(w - l + 0.5 / h.beta))                      \
  F(sharpening_rebel, square(h.beta*(w - l) - (reference_w - reference_l)))                                           \
  F(sharpening_xpo, h.alpha* policy_l + square(h.beta * (w - l) - (reference_w - reference_l)))                       \
  F(dpop, -log_sigmoid(h.beta*(w - l - h.lambda_ * relu(-w))))                                                        \
  F(dpo_each, -(c[1] * log_sigmoid(c[0] * (w - l))))                                                                  \
  F(ipo_each, square(c[0] * (w - l) - 1 / (2 * h.beta)))                                                              \
  F(alpha_dpo, -log_sigmoid(h.beta*((policy_w - policy_l) - h.alpha * detach((w - l - c[0]) / c[1])) - h.gamma))      \
  F(simpo, -log_sigmoid(h.beta*(policy_w - policy_l) - h.gamma))                                                      \
  F(alpha_po,                                                                                                         \
    -log_sigmoid(h.beta / h.alpha * (bounded_exp(-h.alpha * policy_l) - bounded_exp(-h.alpha * policy_w)) - h.gamma)) \
  F(cpo, -log_sigmoid(h.beta*(policy_w - policy_l)) - h.alpha * policy_w)                                             \
  F(orpo, -policy_w - h.lambda_ * log_sigmoid(log_odds(policy_w) - log_odds(policy_l)))                               \
  F(simper, exp(policy_l) - exp(policy_w))                                                                            \
  F(rrhf, relu(policy_l / n_l - policy_w / n_w) - h.alpha * policy_w)                                                 \
  F(r_dpo, -log_sigmoid(h.beta*(w - l) + h.alpha * (n_w - n_l)))                                                      \
  F(copg, square(c[0] - h.beta * (w - l)) / (2 * h.beta))                                                             \
  F(p3o, p3o_side(step_w, step_l, c[0] - h.beta * detach((w - step_w) - (l - step_l)), h.epsilon) +                   \
             p3o_side(step_l, step_w, h.beta * detach((w - step_w) - (l - step_l)) - c[0], h.epsilon))                \
  F(p3o_joint, p3o_both(step_w, step_l, c[0] - h.beta * detach((w - step_w) - (l - step_l)), h.epsilon))

#define FASTPO_FORMULA(name, loss)                                                                \
  struct name {                                                                                   \
    template <class T>                                                                            \
    static FASTPO_FN Dual<T, 2> evaluate(const Row<T, 2>& row, [[maybe_unused]] const Hyper& h) { \
      using D = Dual<T, 2>;                                                                       \
      using C = Given<T>;                                                                         \
      [[maybe_unused]] const D w = row.logratio[0], l = row.logratio[1];                          \
      [[maybe_unused]] const D policy_w = row.policy[0], policy_l = row.policy[1];                \
      [[maybe_unused]] const D step_w = row.step[0], step_l = row.step[1];                        \
      [[maybe_unused]] const C reference_w = row.reference[0], reference_l = row.reference[1];    \
      [[maybe_unused]] const C n_w = row.length[0], n_l = row.length[1];                          \
      [[maybe_unused]] const C* c = row.column;                                                   \
      return loss;                                                                                \
    }                                                                                             \
  };
namespace pairwise {
FASTPO_PAIRWISE_FORMULAS(FASTPO_FORMULA)
}
#undef FASTPO_FORMULA

}  // namespace FASTPO_NAMESPACE
