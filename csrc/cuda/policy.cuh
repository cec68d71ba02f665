// policy_objective on the GPU, a block per sequence: a sweep for the statistics of the sequence, one over the tokens'
// losses, and where gradients flow through the statistic a last one. See fastpo/kernels/policy.py.
#pragma once

#include "rows.cuh"
// after rows.cuh, which defines the namespace
#include "../formulas/policy.h"

namespace FASTPO_NAMESPACE {

constexpr int policy_threads = 256;
constexpr int policy_warps = policy_threads / warp;
// loss and the slopes by the statistic stand behind the sums
constexpr int policy_totals = sums::count + 2;

FASTPO_HOST_DEVICE Int64 policy_blocks(Int64 rows) { return clamp<Int64>(rows, 1, most_blocks); }

FASTPO_DEVICE PolicyNumbers numbers_of(const PolicyObjective& o) {
  PolicyNumbers h;
  int place = 0;
#define FASTPO_TAKE(name) h.name = o.numbers[place++];
  FASTPO_POLICY_NUMBERS(FASTPO_TAKE)
#undef FASTPO_TAKE
  return h;
}

FASTPO_DEVICE PolicyChoices choices_of(const PolicyObjective& o) {
  PolicyChoices c;
  int place = 0;
#define FASTPO_TAKE(name) c.name = o.choices[place++];
  FASTPO_POLICY_CHOICES(FASTPO_TAKE)
#undef FASTPO_TAKE
  return c;
}

template <class A>
FASTPO_DEVICE PolicyTerms<A, 2> terms_by_number(int formula, const PolicyToken<A, 2>& token, const PolicyNumbers& h) {
  int place = 0;
#define FASTPO_EVALUATE(name, ...) \
  if (formula == place++) return terms_of<policy::name>(token, h);
  FASTPO_POLICY_FORMULAS(FASTPO_EVALUATE)
#undef FASTPO_EVALUATE
  return {};
}

// The statistic of a formula: its term, and its traits.
struct StatisticTraits {
  bool needed, averaged, differentiable;
};

FASTPO_DEVICE StatisticTraits statistic_of(int formula) {
  int place = 0;
#define FASTPO_EVALUATE(name, ...)                      \
  if (formula == place++) {                             \
    using S = policy::name::statistic;                  \
    return {S::needed, S::averaged, S::differentiable}; \
  }
  FASTPO_POLICY_FORMULAS(FASTPO_EVALUATE)
#undef FASTPO_EVALUATE
  return {};
}

template <class A>
FASTPO_DEVICE Dual<A, 1> statistic_term(int formula, const Dual<A, 1>& d, const Given<A>& advantage,
                                        const PolicyNumbers& h) {
  int place = 0;
#define FASTPO_EVALUATE(name, ...) \
  if (formula == place++) return policy::name::statistic::term(d, advantage, h);
  FASTPO_POLICY_FORMULAS(FASTPO_EVALUATE)
#undef FASTPO_EVALUATE
  return d;
}

// One sequence: where its tokens are in each stream.
struct SequenceAt {
  Int64 row, first, count;
};

FASTPO_DEVICE Int64 place_of(const PolicyObjective& o, const Stream& stream, const SequenceAt& at, Int64 i) {
  return (o.layout.boundaries ? at.first : at.row * stream.row_stride) + i;
}

template <class A>
FASTPO_DEVICE A read(const PolicyObjective& o, const Stream& stream, const SequenceAt& at, Int64 i) {
  return stream.data ? static_cast<A>(number_at(stream, place_of(o, stream, at, i))) : A(0);
}

template <class A>
FASTPO_DEVICE A read_advantage(const PolicyObjective& o, const SequenceAt& at, Int64 i) {
  if (o.advantage_per_row) return static_cast<A>(number_at(o.advantages, at.row * o.advantages.row_stride));
  return read<A>(o, o.advantages, at, i);
}

FASTPO_DEVICE bool counts_at(const PolicyObjective& o, const SequenceAt& at, Int64 i) {
  return !o.layout.mask || load(o.layout.mask + at.first + i);
}

// The sum over the block, the same in each thread; all take part. `cells` has one per warp.
template <class Cells>
FASTPO_DEVICE double shared_sum(Cells& cells, double value) {
  const double of_warp = warp_sum(value);
  // the cells may still be read for the sum before
  FASTPO_BARRIER();
  if (thread_index() % warp == 0) cells[thread_index() / warp] = of_warp;
  FASTPO_BARRIER();
  double total = 0;
  for (int w = 0; w < policy_warps; ++w) {
    const double part = cells[w];
    total += part;
  }
  return total;
}

template <class T>
FASTPO_DEVICE T warp_max(T value) {
  for (int lanes = warp / 2; lanes > 0; lanes /= 2) {
    const T other = FASTPO_SHUFFLE_XOR(value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

template <class A>
FASTPO_DEVICE void policy_rows(const PolicyObjective& o) {
  FASTPO_SHARED(double, cells, policy_warps);
  FASTPO_SHARED(double, totals, policy_totals* policy_warps);
  FASTPO_SHARED(double, tops, maxima::count* policy_warps);
  const PolicyNumbers h = numbers_of(o);
  const PolicyChoices c = choices_of(o);
  const PolicyPresent present{o.old.data != nullptr,     o.reference.data != nullptr, o.rollout.data != nullptr,
                              o.entropy.data != nullptr, o.selected != nullptr,       o.use_threshold};
  const StatisticTraits statistic = statistic_of(o.formula);
  const int thread = thread_index(), threads = block_threads();
  const bool corrected = present.rollout && (c.weight_level > level_token || c.reject_level > level_token);
  const bool sweep = statistic.needed || corrected || present.threshold;
  const A lowest = -infinity<A>();
  for (Int64 row = block_index(); row < o.rows; row += block_count()) {
    const Tokens t = tokens_of(o.layout, row, o.layout.tokens);
    const SequenceAt at{row, t.first, t.count < 0 ? 0 : t.count};
    double own_count = 0, own_statistic = 0, own_rollout = 0, own_drift = 0;
    for (Int64 i = thread; i < at.count; i += threads) {
      if (!counts_at(o, at, i)) continue;
      own_count += 1;
      if (!sweep) continue;
      const A p = read<A>(o, o.logprobs, at, i), old = present.old ? read<A>(o, o.old, at, i) : p;
      const A rollout = present.rollout ? read<A>(o, o.rollout, at, i) : old;
      if (statistic.needed)
        own_statistic +=
            statistic_term(o.formula, variable<1>(p - old, 0), Given<A>{read_advantage<A>(o, at, i)}, h).value;
      own_rollout += old - rollout;
      own_drift += rollout - p;
    }
    const double n = shared_sum(cells, own_count);
    const double length = n < 1 ? 1 : n;
    const double statistic_sum = shared_sum(cells, own_statistic), rollout_sum = shared_sum(cells, own_rollout);
    const double drift_sum = shared_sum(cells, own_drift);
    const SequenceNumbers<A> sequence{
        static_cast<A>(statistic_sum / (statistic.averaged ? length : 1)), ratio_of(static_cast<A>(rollout_sum)),
        ratio_of(static_cast<A>(rollout_sum / length)), static_cast<A>(drift_sum / length)};
    const double scale = c.average ? 1 / length : 1;
    A partial[sums::count] = {}, largest[maxima::count] = {lowest, lowest, lowest, lowest};
    static_assert(maxima::count == 4);
    double loss = 0, through = 0;
    for (Int64 i = thread; i < at.count; i += threads) {
      const bool counts = counts_at(o, at, i);
      A slope = A(0);
      if (counts) {
        const TokenNumbers<A> x{read<A>(o, o.logprobs, at, i),
                                read<A>(o, o.old, at, i),
                                read<A>(o, o.reference, at, i),
                                read<A>(o, o.rollout, at, i),
                                read<A>(o, o.entropy, at, i),
                                read_advantage<A>(o, at, i),
                                o.selected && load(o.selected + at.first + i) ? A(1) : A(0)};
        const TokenResult<A> r = evaluate_token<2>(
            [&](const PolicyToken<A, 2>& token) { return terms_by_number(o.formula, token, h); }, x, sequence, h, c,
            present, [&](int place, A value) { partial[place] += value; },
            [&](int place, A value) { largest[place] = value > largest[place] ? value : largest[place]; });
        loss += r.loss;
        through += r.through;
        slope = r.slope * static_cast<A>(scale);
      }
      store(static_cast<A*>(o.slopes) + at.first + i, slope);
      if (o.entropy_slopes)
        store(static_cast<A*>(o.entropy_slopes) + at.first + i,
              counts ? static_cast<A>(-h.entropy_coefficient * scale) : A(0));
    }
    FASTPO_UNROLL(32)
    for (int s = 0; s < sums::count; ++s) {
      const double part = warp_sum(static_cast<double>(partial[s]));
      if (thread % warp == 0) totals[s * policy_warps + thread / warp] = part;
    }
    const double loss_part = warp_sum(loss), through_part = warp_sum(through);
    if (thread % warp == 0) {
      totals[sums::count * policy_warps + thread / warp] = loss_part;
      totals[(sums::count + 1) * policy_warps + thread / warp] = through_part;
    }
    FASTPO_UNROLL(4)
    for (int m = 0; m < maxima::count; ++m) {
      const A part = warp_max(largest[m]);
      if (thread % warp == 0) tops[m * policy_warps + thread / warp] = static_cast<double>(part);
    }
    FASTPO_BARRIER();
    if (thread < sums::count + 1) {
      double total = 0;
      for (int w = 0; w < policy_warps; ++w) {
        const double part = totals[thread * policy_warps + w];
        total += part;
      }
      if (thread == sums::tokens) total = n;
      if (thread == sums::sequences) total = n > 0 ? 1 : 0;
      // NaN, so that bad boundaries never look like a result
      if (thread == sums::count)
        store(o.row_loss + row, t.count < 0 ? static_cast<double>(not_a_number<A>()) : total * scale);
      else
        store(o.row_sums + row * sums::count + thread, total);
    }
    if (thread < maxima::count) {
      double top = static_cast<double>(lowest);
      for (int w = 0; w < policy_warps; ++w) {
        const double part = tops[thread * policy_warps + w];
        top = part > top ? part : top;
      }
      store(o.row_maxima + row * maxima::count + thread, top);
    }
    if (statistic.differentiable) {
      double total = 0;
      for (int w = 0; w < policy_warps; ++w) {
        const double part = totals[(sums::count + 1) * policy_warps + w];
        total += part;
      }
      const A factor = static_cast<A>(total * scale / (statistic.averaged ? length : 1));
      for (Int64 i = thread; i < at.count; i += threads) {
        if (!counts_at(o, at, i)) continue;
        const A p = read<A>(o, o.logprobs, at, i), old = present.old ? read<A>(o, o.old, at, i) : p;
        const A own =
            statistic_term(o.formula, variable<1>(p - old, 0), Given<A>{read_advantage<A>(o, at, i)}, h).slope[0];
        A* to = static_cast<A*>(o.slopes) + at.first + i;
        store(to, load(to) + own * factor);
      }
    }
    // the cells are written again for the next row
    FASTPO_BARRIER();
  }
}

FASTPO_KERNEL(policy_f32, FASTPO_ARGUMENT(PolicyObjective) o) { policy_rows<float>(o); }
FASTPO_SMALL_KERNEL(policy_f64, FASTPO_ARGUMENT(PolicyObjective) o) { policy_rows<double>(o); }

// The second launch, one block: what the rows have, added in an order that depends on nothing but their number.
struct PolicySum {
  const double* row_loss;
  const double* row_sums;
  const double* row_maxima;
  Int64 rows;
  void* loss;  // a scalar, or one per row
  double* sums;
  double* maxima;
  bool is_double;
  bool reduce;
};

FASTPO_KERNEL(policy_sum, FASTPO_ARGUMENT(PolicySum) s) {
  FASTPO_SHARED(double, cells, policy_warps);
  FASTPO_SHARED(double, tops, policy_warps);
  const int thread = thread_index(), threads = block_threads();
  const auto put = [&](Int64 i, double value) {
    if (s.is_double)
      store(static_cast<double*>(s.loss) + i, value);
    else
      store(static_cast<float*>(s.loss) + i, static_cast<float>(value));
  };
  double loss = 0;
  for (Int64 row = thread; row < s.rows; row += threads) {
    const double value = load(s.row_loss + row);
    loss += value;
    if (!s.reduce) put(row, value);
  }
  const double total = shared_sum(cells, loss);
  if (s.reduce && thread == 0) put(0, total);
  for (int k = 0; k < sums::count; ++k) {
    double part = 0;
    for (Int64 row = thread; row < s.rows; row += threads) part += load(s.row_sums + row * sums::count + k);
    const double all = shared_sum(cells, part);
    if (thread == 0) store(s.sums + k, all);
  }
  for (int k = 0; k < maxima::count; ++k) {
    double top = -static_cast<double>(infinity<float>());
    for (Int64 row = thread; row < s.rows; row += threads) {
      const double value = load(s.row_maxima + row * maxima::count + k);
      top = value > top ? value : top;
    }
    const double of_warp = warp_max(top);
    FASTPO_BARRIER();
    if (thread % warp == 0) tops[thread / warp] = of_warp;
    FASTPO_BARRIER();
    if (thread == 0) {
      for (int w = 0; w < policy_warps; ++w) {
        const double part = tops[w];
        top = part > top ? part : top;
      }
      store(s.maxima + k, top);
    }
  }
}

}  // namespace FASTPO_NAMESPACE
