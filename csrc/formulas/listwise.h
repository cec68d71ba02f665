// Objectives on a list of items, each with a score and a target: what an item or a pair of items adds to the loss. CPU
// and GPU share them; how items are ordered, summed and paired is in their kernels. On the CPU the kind is a constant,
// which leaves one branch of each.
#pragma once

#include "dual.h"

namespace FASTPO_NAMESPACE {

// An objective's number is its place, and compiled graphs keep it: append only.
#define FASTPO_LIST_KINDS(F) \
  F(point_mse)               \
  F(point_sigmoid)           \
  F(pair_logistic)           \
  F(pair_hinge)              \
  F(lambda)                  \
  F(ranknet)                 \
  F(list_mle)                \
  F(softmax)                 \
  F(info_nca)                \
  F(brain)                   \
  F(nca)                     \
  F(exo)                     \
  F(pro)

#define FASTPO_ENUMERATOR(name) name,
enum class ListKind : int { FASTPO_LIST_KINDS(FASTPO_ENUMERATOR) count };
#undef FASTPO_ENUMERATOR

FASTPO_FN constexpr bool is_point(ListKind k) { return k == ListKind::point_mse || k == ListKind::point_sigmoid; }
FASTPO_FN constexpr bool is_pair(ListKind k) {
  return k == ListKind::pair_logistic || k == ListKind::pair_hinge || k == ListKind::lambda || k == ListKind::ranknet;
}
// whether the scores are the log-probs over `other`, not less it
FASTPO_FN constexpr bool divides(ListKind k) { return k == ListKind::pro; }
// whether the smallest target is the best
FASTPO_FN constexpr bool ascends(ListKind k) { return k == ListKind::ranknet; }

// of one item: score s, target t
template <class T>
FASTPO_FN Dual<T, 1> point_loss(ListKind kind, const Dual<T, 1>& s, const Given<T>& t) {
  if (kind == ListKind::point_mse) return square(t - s);
  return softplus(s) - t * s;
}

// of a pair whose better item leads by `margin`
template <class T>
FASTPO_FN Dual<T, 1> pair_loss(ListKind kind, const Dual<T, 1>& margin) {
  if (kind == ListKind::pair_hinge) return relu(1.0 - margin);
  return softplus(-margin);
}

// What an item brings to the weights of its pairs, from its target and its rank by the scores, the first being 0.
template <class T>
struct PairItem {
  T gain, inverse_discount;
};

template <class T>
FASTPO_FN PairItem<T> pair_item(ListKind kind, T target, T rank) {
  if (kind == ListKind::lambda)
    // 2^target - 1, and 1 / log(1 + rank) of a rank that begins at 1
    return {expm1(target * constant<T>(0.6931471805599453)), constant<T>(1.0) / log(rank + constant<T>(2.0))};
  return {target, T{}};
}

template <class T>
FASTPO_FN T pair_weight(ListKind kind, const PairItem<T>& a, const PairItem<T>& b) {
  if (kind == ListKind::lambda) return abs(a.gain - b.gain) * abs(a.inverse_discount - b.inverse_discount);
  if (kind == ListKind::ranknet) return constant<T>(1.0) / (a.gain + b.gain);
  return constant<T>(1.0);
}

// of one of n items whose targets' softmax is q
template <class T>
FASTPO_FN Dual<T, 1> nca_loss(const Dual<T, 1>& s, const Given<T>& q, const Given<T>& inverse_n) {
  return q * softplus(-s) + inverse_n * softplus(s);
}

// Of one item with the probabilities p of the scores and q of the targets, the loss of the list, and its slope by the
// item's score where it needs nothing else; exo's is p (log p - log q) less p times the list's loss.
template <class T>
struct Term {
  T loss, slope;
};

template <class T>
FASTPO_FN Term<T> softmax_term(ListKind kind, T p, T log_p, T q, T log_q) {
  if (kind == ListKind::brain) return {q * (log_q - log_p), p - q};
  if (kind == ListKind::exo) return {p * (log_p - log_q), p * (log_p - log_q)};
  return {-(q * log_p), p - q};
}

}  // namespace FASTPO_NAMESPACE
