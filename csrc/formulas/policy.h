// Objectives on the tokens of sampled completions. Each line of the list is one formula; what all of them share, the
// penalty towards the reference, the weights of off-policy data and the metrics, is `evaluate_token`.
//
// Two variables: 0 is the log-prob of the token, 1 a statistic of its sequence, the sum or mean of a function g of the
// tokens' log-ratios. The gradient of token t is that of its own loss by 0, plus g'(d_t) times what all the sequence's
// losses have by 1.
#pragma once

#include "dual.h"

namespace FASTPO_NAMESPACE {

// Numbers of all formulas, by name; Python reads the names from the library and fills them in this order.
// clip_*: bounds of what is clipped; both_sides: they hold for any sign of the advantage. weight_*, reject_*: bounds of
// the off-policy ratio. threshold: of the off-policy mask. infinite where there is none.
#define FASTPO_POLICY_NUMBERS(X) \
  X(clip_low)                    \
  X(clip_high)                   \
  X(both_sides)                  \
  X(dual_clip)                   \
  X(tau_positive)                \
  X(tau_negative)                \
  X(k_positive)                  \
  X(lambda_positive)             \
  X(k_negative)                  \
  X(lambda_negative)             \
  X(penalty)                     \
  X(beta)                        \
  X(entropy_coefficient)         \
  X(weight_low)                  \
  X(weight_high)                 \
  X(reject_low)                  \
  X(reject_high)                 \
  X(threshold)

// Choices, as above. kl, kl_gradient: 1, 2 or 3 for k1, k2, k3; corrected: times the ratio. average: losses are divided
// by the sequence's length. weight_level, reject_level: a PolicyLevel. keep: `selected` chooses the tokens with a
// policy term, else it is the formula's.
#define FASTPO_POLICY_CHOICES(X) \
  X(kl)                          \
  X(kl_gradient)                 \
  X(corrected)                   \
  X(average)                     \
  X(weight_level)                \
  X(reject_level)                \
  X(keep)

enum PolicyLevel : int { level_none, level_token, level_sequence, level_sequence_mean };

// Sums over the tokens that count, and maxima over them, in the order in which Python names them.
#define FASTPO_POLICY_SUMS(X) \
  X(tokens)                   \
  X(sequences)                \
  X(policy_loss)              \
  X(clipped_high)             \
  X(clipped_low)              \
  X(clipped_dual)             \
  X(ratio)                    \
  X(ratio_square)             \
  X(old_k1)                   \
  X(old_k2)                   \
  X(kl)                       \
  X(entropy)                  \
  X(dropped)                  \
  X(rollout_ratio)            \
  X(rollout_ratio_square)     \
  X(rollout_k1)               \
  X(rollout_k3)               \
  X(weight)                   \
  X(weight_square)            \
  X(truncated)                \
  X(rejected)

#define FASTPO_POLICY_MAXIMA(X) \
  X(ratio)                      \
  X(negative_ratio)             \
  X(rollout_ratio)              \
  X(negative_rollout_ratio)

struct PolicyNumbers {
#define FASTPO_FIELD(name) double name;
  FASTPO_POLICY_NUMBERS(FASTPO_FIELD)
#undef FASTPO_FIELD
};

struct PolicyChoices {
#define FASTPO_FIELD(name) int name;
  FASTPO_POLICY_CHOICES(FASTPO_FIELD)
#undef FASTPO_FIELD
};

namespace sums {
enum Place : int {
#define FASTPO_PLACE(name) name,
  FASTPO_POLICY_SUMS(FASTPO_PLACE)
#undef FASTPO_PLACE
      count
};
}  // namespace sums

namespace maxima {
enum Place : int {
#define FASTPO_PLACE(name) name,
  FASTPO_POLICY_MAXIMA(FASTPO_PLACE)
#undef FASTPO_PLACE
      count
};
}  // namespace maxima

// log-ratios beyond it count as it, without gradient: e^20 is the largest ratio
constexpr double furthest_logratio = 20.0;

template <class T, int k>
FASTPO_FN Dual<T, k> ratio_of(const Dual<T, k>& logratio) {
  return exp_near(clip(logratio, -furthest_logratio, furthest_logratio));
}

template <class T>
FASTPO_FN T ratio_of(T logratio) {
  return exp_near(clip(logratio, -furthest_logratio, furthest_logratio));
}

// a number without slopes
template <class T, int k>
FASTPO_FN Given<T> held(const Dual<T, k>& a) {
  return {a.value};
}

template <class T, class Condition>
FASTPO_FN Given<T> choose(Condition condition, double a, double b) {
  return {select(condition, constant<T>(a), constant<T>(b))};
}

// What a formula sees of a token, with slopes by k variables: the second only where gradients flow through it.
template <class T, int k>
struct PolicyToken {
  Dual<T, k> policy;     // log-prob
  Dual<T, k> logratio;   // to the policy of the sampling step
  Dual<T, k> statistic;  // of the sequence
  Given<T> old, advantage, selected;
};

// max(-A r, -A clip(r)), and for A < 0 at most -A times the dual bound. The slope is that of -A r, or 0 where a bound
// is taken: within the bounds both are -A r, which also has the slope on them.
template <class T, int k>
FASTPO_FN Dual<T, k> clipped_surrogate(const Dual<T, k>& ratio, const Given<T>& advantage, const PolicyNumbers& h) {
  const T slope = -advantage.value, free = slope * ratio.value;
  const T bounded = slope * clip(ratio.value, h.clip_low, h.clip_high);
  // the bounded one is NaN where the free one is, and `most` never where they are not
  const T worse = larger_of(free, bounded), most = select(slope > T{}, slope * constant<T>(h.dual_clip), infinity<T>());
  const T taken = select(free < bounded, T{}, slope);
  return chain(ratio, smaller_of(most, worse), select(worse > most, T{}, taken));
}

template <class T>
FASTPO_FN Given<T> tau(const Given<T>& advantage, const PolicyNumbers& h) {
  return choose<T>(advantage > 0, h.tau_positive, h.tau_negative);
}

// VESPO's weight of a token: x is the sequence's log-ratio
template <class T, int k>
FASTPO_FN Given<T> vespo_weight(const Dual<T, k>& statistic, const Given<T>& advantage, const PolicyNumbers& h) {
  const T x = clip(statistic.value, -18.420680743952367, furthest_logratio);  // log 1e-8
  const Given<T> power = choose<T>(advantage < 0, h.k_negative, h.k_positive);
  const Given<T> lambda = choose<T>(advantage < 0, h.lambda_negative, h.lambda_positive);
  return {exp(lambda.value + power.value * x - lambda.value * exp(x))};
}

// The statistics: g and whether it is averaged, and whether gradients flow through it.
namespace statistics {

struct none {
  static constexpr bool needed = false, averaged = false, differentiable = false;
  template <class T>
  static FASTPO_FN Dual<T, 1> term(const Dual<T, 1>& d, const Given<T>&, const PolicyNumbers&) {
    return d;
  }
};

struct mean {
  static constexpr bool needed = true, averaged = true, differentiable = true;
  template <class T>
  static FASTPO_FN Dual<T, 1> term(const Dual<T, 1>& d, const Given<T>&, const PolicyNumbers&) {
    return d;
  }
};

struct mean_held : mean {
  static constexpr bool differentiable = false;
};

struct geometric {
  static constexpr bool needed = true, averaged = true, differentiable = true;
  template <class T>
  static FASTPO_FN Dual<T, 1> term(const Dual<T, 1>& d, const Given<T>& advantage, const PolicyNumbers& h) {
    const Dual<T, 1> clipped = clip(d, h.clip_low, h.clip_high);
    return where(advantage > 0, minimum(d, clipped), where(advantage < 0, maximum(d, clipped), 0.0));
  }
};

struct total {
  static constexpr bool needed = true, averaged = false, differentiable = false;
  template <class T>
  static FASTPO_FN Dual<T, 1> term(const Dual<T, 1>& d, const Given<T>&, const PolicyNumbers&) {
    return clip(d, -furthest_logratio, furthest_logratio);
  }
};

}  // namespace statistics

// A formula's number is its place in the list, and compiled graphs keep it: append only.
// Name; the statistic D; the ratio r; what is clipped, for the metrics; the loss.
// p: log-prob; d: log-ratio; A: advantage; s: selected; h: numbers.
#define FASTPO_POLICY_FORMULAS(F)                                                               \
  F(clipped, none, ratio_of(d), r, clipped_surrogate(r, A, h))                                  \
  F(gspo, mean, ratio_of(D), r, clipped_surrogate(r, A, h))                                     \
  F(gspo_token, mean_held, held(ratio_of(D)) * exp(d - held(d)), r, clipped_surrogate(r, A, h)) \
  F(cispo, none, ratio_of(d), r, -(held(clip(r, h.clip_low, h.clip_high)) * A * p))             \
  F(gmpo, geometric, ratio_of(D), d, -(A * r))                                                  \
  F(sapo, none, ratio_of(d), r, -(A * (4 / tau(A, h)) * sigmoid(tau(A, h) * (r - 1))))          \
  F(vespo, total, ratio_of(d), r, -(vespo_weight(D, A, h) * A * p))                             \
  F(reinforce, none, ratio_of(d), r, -(A * p))                                                  \
  F(kl_cov, none, ratio_of(d), r, where(s > 0.5, h.penalty * abs(d) - A * r, -(A * r)))         \
  F(value_clip, none, ratio_of(d), d,                                                           \
    0.5 * maximum(square(p - A), square(clip(d, h.clip_low, h.clip_high) + (old - A))))

#define FASTPO_FORMULA(name, statistic_, ratio_, bounded_, loss_)                                  \
  struct name {                                                                                    \
    using statistic = statistics::statistic_;                                                      \
    template <class T, int k>                                                                      \
    static FASTPO_FN Dual<T, k> ratio(const PolicyToken<T, k>& token) {                            \
      [[maybe_unused]] const Dual<T, k> d = token.logratio, D = token.statistic;                   \
      return ratio_;                                                                               \
    }                                                                                              \
    template <class T, int k>                                                                      \
    static FASTPO_FN T bounded(const PolicyToken<T, k>& token, const Dual<T, k>& ratio) {          \
      [[maybe_unused]] const Dual<T, k>&d = token.logratio, &r = ratio;                            \
      return bounded_.value;                                                                       \
    }                                                                                              \
    template <class T, int k>                                                                      \
    static FASTPO_FN Dual<T, k> loss(const PolicyToken<T, k>& token, const Dual<T, k>& r,          \
                                     [[maybe_unused]] const PolicyNumbers& h) {                    \
      [[maybe_unused]] const Dual<T, k> p = token.policy, d = token.logratio, D = token.statistic; \
      [[maybe_unused]] const Given<T> A = token.advantage, s = token.selected, old = token.old;    \
      return loss_;                                                                                \
    }                                                                                              \
  };
namespace policy {
FASTPO_POLICY_FORMULAS(FASTPO_FORMULA)
}
#undef FASTPO_FORMULA

// an estimator of KL(policy, reference) from one sample's log-ratio
template <class T, int k>
FASTPO_FN Dual<T, k> kl_estimate(int which, const Dual<T, k>& logratio) {
  if (which == 1) return logratio;
  if (which == 2) return 0.5 * square(logratio);
  // e^-x - 1 + x without the digits that cancel for small x, and its slope, 1 - e^-x
  const T x = logratio.value, rest = expm1_near(clip(-x, -furthest_logratio, furthest_logratio));
  return chain(logratio, rest + x, select(abs(x) > constant<T>(furthest_logratio), constant<T>(1.0), -rest));
}

// One token, or as many as T has lanes; what has no tensor is not read.
template <class T>
struct TokenNumbers {
  T policy, old, reference, rollout, entropy, advantage, selected;
};

// What is known of the whole sequence; ratios to the rollout's policy are of the sum and the mean of the log-ratios,
// and `drift` is the mean of rollout (or old) minus policy.
template <class T>
struct SequenceNumbers {
  T statistic, rollout_ratio, rollout_mean_ratio, drift;
};

struct PolicyPresent {
  bool old, reference, rollout, entropy, selected, threshold;
};

template <class T>
struct TokenResult {
  T loss, slope, through;  // slopes by the log-prob and by the statistic
};

// What a formula gives: the loss, its ratio, and what is clipped.
template <class T, int k>
struct PolicyTerms {
  Dual<T, k> loss, ratio;
  T bounded;
};

template <class Formula, class T, int k>
FASTPO_FN PolicyTerms<T, k> terms_of(const PolicyToken<T, k>& token, const PolicyNumbers& h) {
  const Dual<T, k> ratio = Formula::ratio(token);
  return {Formula::loss(token, ratio, h), ratio, Formula::bounded(token, ratio)};
}

// The loss of a token with its slopes, `terms(token)` being the formula. Sums and maxima go to `add(place, value)` and
// `top(place, value)`.
template <int k, class Terms, class T, class Add, class Top>
FASTPO_FN TokenResult<T> evaluate_token(const Terms& terms, const TokenNumbers<T>& x,
                                        const SequenceNumbers<T>& sequence, const PolicyNumbers& h,
                                        const PolicyChoices& c, const PolicyPresent& present, const Add& add,
                                        const Top& top) {
  using D = Dual<T, k>;
  const T zero{}, one = constant<T>(1.0);
  PolicyToken<T, k> token;
  const T old = present.old ? x.old : x.policy;
  token.policy = variable<k>(x.policy, 0);
  token.logratio = token.policy - Given<T>{old};
  token.statistic = variable<k>(sequence.statistic, 1);
  token.old = {old};
  token.advantage = {x.advantage};
  token.selected = {present.selected ? x.selected : zero};
  const PolicyTerms<T, k> given = terms(token);
  const D ratio = given.ratio;
  D policy = given.loss;

  // clipped, in the metrics
  const T bounded = given.bounded;
  const T above = select(bounded > constant<T>(h.clip_high), one, zero);
  const T below = select(bounded < constant<T>(h.clip_low), one, zero);
  if (h.both_sides > 0.5) {
    add(sums::clipped_high, above);
    add(sums::clipped_low, below);
  } else {
    add(sums::clipped_high, select(x.advantage > zero, above, zero));
    add(sums::clipped_low, select(x.advantage < zero, below, zero));
  }
  const T beyond = select(bounded > constant<T>(h.dual_clip), one, zero);
  add(sums::clipped_dual, select(x.advantage < zero, beyond, zero));
  add(sums::ratio, ratio.value);
  add(sums::ratio_square, ratio.value * ratio.value);
  top(maxima::ratio, ratio.value);
  top(maxima::negative_ratio, -ratio.value);
  const T old_logratio = token.logratio.value;
  add(sums::old_k1, -old_logratio);
  add(sums::old_k2, constant<T>(0.5) * old_logratio * old_logratio);

  // tokens without a policy term
  T kept = one;
  if (present.selected && c.keep) kept = select(x.selected > constant<T>(0.5), one, zero);
  if (present.threshold) {
    const T near = select(sequence.drift <= constant<T>(h.threshold), kept, zero);
    const T stays = select(x.advantage >= zero, kept, near);
    add(sums::dropped, kept - stays);
    kept = stays;
  }

  // off-policy weights, which are constants
  if (present.rollout) {
    const T logratio = old - x.rollout, of_token = ratio_of(logratio);
    const auto ratio_at = [&](int level) {
      return level == level_sequence        ? sequence.rollout_ratio
             : level == level_sequence_mean ? sequence.rollout_mean_ratio
                                            : of_token;
    };
    const T raw = ratio_at(c.weight_level);
    T weight = c.weight_level == level_none ? one : clip(raw, h.weight_low, h.weight_high);
    if (c.weight_level != level_none) add(sums::truncated, select(raw != weight, one, zero));
    if (c.reject_level != level_none) {
      const T judged = ratio_at(c.reject_level);
      const T inside = select(judged <= constant<T>(h.reject_high), one, zero);
      const T accepted = select(judged >= constant<T>(h.reject_low), inside, zero);
      add(sums::rejected, one - accepted);
      weight = select(accepted > zero, weight, zero);
    }
    add(sums::rollout_ratio, raw);
    add(sums::rollout_ratio_square, raw * raw);
    top(maxima::rollout_ratio, raw);
    top(maxima::negative_rollout_ratio, -raw);
    add(sums::rollout_k1, -logratio);
    add(sums::rollout_k3, expm1_near(clip(logratio, -furthest_logratio, furthest_logratio)) - logratio);
    add(sums::weight, weight);
    add(sums::weight_square, weight * weight);
    policy = Given<T>{weight} * policy;
    kept = select(weight > zero, kept, zero);
  }
  policy = where(kept > zero, policy, 0.0);
  add(sums::policy_loss, policy.value);

  D loss = policy;
  if (present.reference) {
    const D logratio = token.policy - Given<T>{x.reference};
    D kl = kl_estimate(c.kl, logratio);
    if (c.kl_gradient != c.kl) {
      const D other = kl_estimate(c.kl_gradient, logratio);
      for (int i = 0; i < k; ++i) kl.slope[i] = other.slope[i];
    }
    if (c.corrected) kl = ratio * kl;
    add(sums::kl, kl.value);
    loss = loss + h.beta * kl;
  }
  T value = loss.value;
  if (present.entropy) {
    add(sums::entropy, x.entropy);
    value = value - constant<T>(h.entropy_coefficient) * x.entropy;
  }
  return {value, loss.slope[0], k > 1 ? loss.slope[k - 1] : zero};
}

}  // namespace FASTPO_NAMESPACE
