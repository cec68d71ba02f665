// listwise on the GPU: a team, a warp or a block, takes a list, a thread its items in turn, and each item goes over all
// others, so that nothing is sorted. See fastpo/kernels/listwise.py.
#pragma once

#include "../arguments.h"
#include "dtypes.cuh"
#include "shape.cuh"
// after dtypes.cuh, which defines the namespace
#include "../formulas/listwise.h"

namespace FASTPO_NAMESPACE {

constexpr int short_list = 64;  // items that one warp takes

// fastpo/kernels/cuda/listwise.py restates it for the launch through CuPy.
FASTPO_HOST_DEVICE Shape list_shape(Int64 lists, Int64 items) {
  Shape s;
  s.threads = 256;
  s.team = items <= short_list ? warp : s.threads;
  s.rows = s.threads / s.team;
  s.blocks = clamp<Int64>(ceil_div<Int64>(lists, s.rows), 1, most_blocks);
  return s;
}

struct AddUp {
  static FASTPO_DEVICE double both(double a, double b) { return a + b; }
};
struct TakeLarger {
  static FASTPO_DEVICE double both(double a, double b) { return a > b ? a : b; }
};

// One list, and the thread's place in its team.
template <class A>
struct TeamList {
  const Listwise& o;
  Int64 first, count;
  int rank, team;

  FASTPO_DEVICE bool counts(Int64 i) const { return !o.mask || load(o.mask + first + i); }
  FASTPO_DEVICE A score(Int64 i) const { return load(static_cast<const A*>(o.scores) + first + i); }
  FASTPO_DEVICE A target(Int64 i) const {
    return static_cast<A>(number_at(o.targets, first + i)) * static_cast<A>(o.target_scale);
  }
  FASTPO_DEVICE double noted(Int64 i) const { return load(o.scratch + first + i); }
  FASTPO_DEVICE void note(Int64 i, double value) const { store(o.scratch + first + i, value); }
  FASTPO_DEVICE void slope(Int64 i, double value) const {
    store(static_cast<A*>(o.slopes) + first + i, static_cast<A>(value));
  }
  FASTPO_DEVICE A slope_of(Int64 i) const { return load(static_cast<const A*>(o.slopes) + first + i); }

  // what the team has written to memory is there for all of it
  FASTPO_DEVICE void meet() const {
    if (team == warp)
      FASTPO_WARP_BARRIER();
    else
      FASTPO_BARRIER();
  }

  // the same in each thread; all of the team take part
  template <class Merge, class Cells>
  FASTPO_DEVICE double merge(Cells& cells, double value) const {
    for (int lanes = warp / 2; lanes > 0; lanes /= 2) {
      const double theirs = FASTPO_SHUFFLE_XOR(value, lanes);
      value = Merge::both(value, theirs);
    }
    if (team == warp) return value;
    FASTPO_BARRIER();
    if (rank % warp == 0) cells[rank / warp] = value;
    FASTPO_BARRIER();
    double all = cells[0];
    for (int w = 1; w < team / warp; ++w) {
      const double part = cells[w];
      all = Merge::both(all, part);
    }
    return all;
  }

  // f(i) for the thread's items that count
  template <class F>
  FASTPO_DEVICE void each(const F& f) const {
    for (Int64 i = rank; i < count; i += team)
      if (counts(i)) f(i);
  }

  // f(j) for all items that count
  template <class F>
  FASTPO_DEVICE void all(const F& f) const {
    for (Int64 j = 0; j < count; ++j)
      if (counts(j)) f(j);
  }
};

// whether item j with key b stands before item i with key a: the larger first, equal ones as they come
template <class A>
FASTPO_DEVICE bool list_before(A b, Int64 j, A a, Int64 i) {
  return b > a || (b == a && j < i);
}

template <class A, class Cells>
FASTPO_DEVICE double pair_list(ListKind kind, const TeamList<A>& x, Cells& cells) {
  if (kind == ListKind::lambda) {
    x.each([&](Int64 i) {
      const A s = x.score(i);
      int rank = 0;
      x.all([&](Int64 j) { rank += list_before(x.score(j), j, s, i); });
      x.note(i, static_cast<double>(rank));
    });
    x.meet();
  }
  const auto item = [&](Int64 i, A t) {
    return pair_item(kind, t, kind == ListKind::lambda ? static_cast<A>(x.noted(i)) : A(0));
  };
  double loss = 0, number = 0;
  x.each([&](Int64 i) {
    const A s = x.score(i), t = x.target(i);
    const PairItem<A> own = item(i, t);
    double slope = 0;
    x.all([&](Int64 j) {
      const A other = x.target(j);
      if (t == other) return;
      const bool leads = (t > other) != ascends(kind);
      const A sign = leads ? A(1) : A(-1);
      const Dual<A, 1> pair = pair_loss(kind, variable<1>(sign * (s - x.score(j)), 0));
      const A weight = pair_weight(kind, own, item(j, other));
      slope += static_cast<double>(sign * weight * pair.slope[0]);
      if (leads) {
        loss += static_cast<double>(weight * pair.value);
        number += 1;
      }
    });
    x.slope(i, slope);
  });
  const double pairs = x.template merge<AddUp>(cells, number);
  const double factor = x.o.weight * (x.o.pair_mean && pairs > 0 ? 1 / pairs : 1);
  x.each([&](Int64 i) { x.slope(i, x.slope_of(i) * factor); });
  return loss * factor;
}

// e^(s_k - L_m), L_m the log-sum-exp of the scores from m on: see the CPU's
template <class A>
FASTPO_DEVICE double mle_list(const TeamList<A>& x) {
  double loss = 0;
  x.each([&](Int64 i) {
    const A s = x.score(i), t = x.target(i);
    A top = s;
    x.all([&](Int64 j) {
      if (!list_before(x.target(j), j, t, i)) top = x.score(j) > top ? x.score(j) : top;
    });
    double sum = 0;
    x.all([&](Int64 j) {
      if (!list_before(x.target(j), j, t, i)) sum += static_cast<double>(exp(x.score(j) - top));
    });
    const double log_sum = log(sum);
    loss += (static_cast<double>(top) - s) + log_sum;
    x.note(i, top + log_sum);
  });
  x.meet();
  x.each([&](Int64 i) {
    const A s = x.score(i), t = x.target(i);
    // its own term comes first, less 1
    double slope = static_cast<double>(expm1(static_cast<A>(s - x.noted(i))));
    x.all([&](Int64 j) {
      if (list_before(x.target(j), j, t, i)) slope += static_cast<double>(exp(static_cast<A>(s - x.noted(j))));
    });
    x.slope(i, slope);
  });
  return loss;
}

struct ListLogSum {
  double top, log, sum;
};

template <class A, class Value, class Cells>
FASTPO_DEVICE ListLogSum log_sum_of(const TeamList<A>& x, const Value& value, Cells& cells) {
  double top = -infinity<double>(), sum = 0;
  x.each([&](Int64 i) { top = TakeLarger::both(value(i), top); });
  top = x.template merge<TakeLarger>(cells, top);
  x.each([&](Int64 i) { sum += static_cast<double>(exp(static_cast<A>(value(i) - top))); });
  sum = x.template merge<AddUp>(cells, sum);
  return {top, log(sum), sum};
}

template <class A, class Cells>
FASTPO_DEVICE double softmax_list(ListKind kind, const TeamList<A>& x, Cells& cells) {
  const auto score = [&](Int64 i) { return static_cast<double>(x.score(i)); };
  const auto target = [&](Int64 i) { return static_cast<double>(x.target(i)); };
  const ListLogSum p = log_sum_of(x, score, cells);
  ListLogSum q{0, 0, 0};
  if (kind == ListKind::softmax) {
    double sum = 0;
    x.each([&](Int64 i) { sum += target(i); });
    q.sum = x.template merge<AddUp>(cells, sum);
  } else {
    q = log_sum_of(x, target, cells);
  }
  const bool nothing = kind == ListKind::softmax && q.sum == 0;
  double loss = 0;
  x.each([&](Int64 i) {
    const A log_p = static_cast<A>(score(i) - p.top - p.log), log_q = static_cast<A>(target(i) - q.top - q.log);
    const A of_target = kind == ListKind::softmax ? static_cast<A>(target(i) / q.sum) : exp(log_q);
    const Term<A> term = softmax_term(kind, exp(log_p), log_p, of_target, log_q);
    if (!nothing) loss += static_cast<double>(term.loss);
    x.slope(i, nothing ? 0.0 : static_cast<double>(term.slope));
  });
  if (kind == ListKind::exo) {
    const double total = x.template merge<AddUp>(cells, loss);
    x.each([&](Int64 i) {
      x.slope(i, x.slope_of(i) - static_cast<double>(exp(static_cast<A>(score(i) - p.top - p.log))) * total);
    });
  }
  return loss;
}

template <class A, class Cells>
FASTPO_DEVICE double nca_list(const TeamList<A>& x, double n, Cells& cells) {
  const auto target = [&](Int64 i) { return static_cast<double>(x.target(i)); };
  const ListLogSum q = log_sum_of(x, target, cells);
  const Given<A> share = {static_cast<A>(1 / n)};
  double loss = 0;
  x.each([&](Int64 i) {
    const A of_target = exp(static_cast<A>(target(i) - q.top - q.log));
    const Dual<A, 1> item = nca_loss(variable<1>(x.score(i), 0), Given<A>{of_target}, share);
    loss += static_cast<double>(item.value);
    x.slope(i, static_cast<double>(item.slope[0]));
  });
  return loss;
}

template <class A, class Cells>
FASTPO_DEVICE double pro_list(const TeamList<A>& x, double n, Cells& cells) {
  double low = -infinity<double>(), loss = 0;
  x.each([&](Int64 i) { low = TakeLarger::both(-static_cast<double>(x.target(i)), low); });
  const A worst = static_cast<A>(-x.template merge<TakeLarger>(cells, low));
  x.each([&](Int64 i) {
    const A t = x.target(i), own = x.score(i) * (t - worst);
    A top = own;
    x.all([&](Int64 j) {
      const A other = x.target(j);
      if (j == i || list_before(other, j, t, i)) return;
      const A logit = x.score(j) * (t - other);
      top = logit > top ? logit : top;
    });
    double sum = static_cast<double>(exp(own - top));
    x.all([&](Int64 j) {
      const A other = x.target(j);
      if (j != i && !list_before(other, j, t, i)) sum += static_cast<double>(exp(x.score(j) * (t - other) - top));
    });
    const double log_sum = log(sum);
    loss += (static_cast<double>(top) - own) + log_sum;
    x.note(i, top + log_sum);
  });
  x.meet();
  const double share = x.o.weight * (n - 1) * (n - 1);
  x.each([&](Int64 i) {
    const A s = x.score(i), t = x.target(i), distance = t - worst;
    double slope = static_cast<double>(distance * expm1(static_cast<A>(s * distance - x.noted(i))));
    bool best = true;
    x.all([&](Int64 j) {
      const A other = x.target(j);
      if (!list_before(other, j, t, i)) return;
      best = false;
      slope += static_cast<double>((other - t) * exp(static_cast<A>(s * (other - t) - x.noted(j))));
    });
    slope /= number_at(x.o.other, x.first + i);
    if (best) {
      slope -= share;
      loss -= share * number_at(x.o.policy, x.first + i);
    }
    x.slope(i, slope);
  });
  return loss;
}

// the thread's part of the list's loss; slopes are by the scores, but of pro by the log-probs
template <class A, class Cells>
FASTPO_DEVICE double evaluate_list(ListKind kind, const TeamList<A>& x, double n, Cells& cells) {
  if (is_point(kind)) {
    double loss = 0;
    x.each([&](Int64 i) {
      const Dual<A, 1> item = point_loss(kind, variable<1>(x.score(i), 0), Given<A>{x.target(i)});
      loss += static_cast<double>(item.value);
      x.slope(i, static_cast<double>(item.slope[0]));
    });
    return loss;
  } else if (is_pair(kind)) {
    return pair_list(kind, x, cells);
  } else if (kind == ListKind::list_mle) {
    return mle_list(x);
  } else if (kind == ListKind::nca) {
    return nca_list(x, n, cells);
  } else if (kind == ListKind::pro) {
    return pro_list(x, n, cells);
  } else {
    return softmax_list(kind, x, cells);
  }
}

template <class A, class Cells>
FASTPO_DEVICE void take_list(const Listwise& o, Int64 list, const TeamList<A>& x, Cells& cells) {
  const ListKind kind = static_cast<ListKind>(o.kind);
  const A scale = static_cast<A>(o.scale);
  double n = 0, wrong = 0;
  for (Int64 i = x.rank; i < x.count; i += x.team) {
    A s = 0;
    if (x.counts(i)) {
      s = static_cast<A>(number_at(o.policy, x.first + i));
      if (o.other.data) {
        const A other = static_cast<A>(number_at(o.other, x.first + i));
        s = divides(kind) ? s / other : s - other;
      }
      s *= scale;
      const A t = x.target(i);
      n += 1;
      wrong += (s - s) + (t - t) == 0 ? 0.0 : 1.0;
    } else {
      x.slope(i, 0.0);
    }
    store(static_cast<A*>(o.scores) + x.first + i, s);
  }
  x.meet();
  n = x.template merge<AddUp>(cells, n);
  const bool finite = x.template merge<AddUp>(cells, wrong) == 0;
  double loss = 0;
  if (finite && n > 0) loss = evaluate_list(kind, x, n, cells);
  loss = x.template merge<AddUp>(cells, loss);
  const double factor = finite ? (divides(kind) ? 1.0 : o.scale) * o.factor : 0.0;
  x.each([&](Int64 i) { x.slope(i, finite ? x.slope_of(i) * factor : not_a_number<double>()); });
  if (x.rank == 0) store(o.list_loss + list, finite ? loss : not_a_number<double>());
  // the scratch is read until here
  x.meet();
}

// Boundaries are read on the device and cannot be refused there: what is not inside, or too long, has the loss NaN, and
// keeps the zeros that the launcher wrote.
template <class A>
FASTPO_DEVICE void lists_of(const Listwise& o, const Shape& shape) {
  FASTPO_SHARED(double, cells, team_warps);
  const int thread = thread_index(), rank = thread % shape.team;
  for (Int64 list = block_index() * shape.rows + thread / shape.team; list < o.lists;
       list += block_count() * shape.rows) {
    Int64 first = list * o.items, count = o.items;
    if (o.boundaries) {
      const Int64 begin = load(o.boundaries + list), end = load(o.boundaries + list + 1);
      const bool inside = (list > 0 ? 0 <= begin : 0 == begin) && begin <= end && end <= o.total;
      first = inside ? begin : 0;
      count = inside && end - begin <= max_list ? end - begin : -1;
    }
    if (count >= 0)
      take_list(o, list, TeamList<A>{o, first, count, rank, shape.team}, cells);
    else if (rank == 0)
      store(o.list_loss + list, not_a_number<double>());
  }
}

FASTPO_SMALL_KERNEL(listwise_f32, FASTPO_ARGUMENT(Listwise) o, FASTPO_ARGUMENT(Shape) shape) {
  lists_of<float>(o, shape);
}
FASTPO_SMALL_KERNEL(listwise_f64, FASTPO_ARGUMENT(Listwise) o, FASTPO_ARGUMENT(Shape) shape) {
  lists_of<double>(o, shape);
}

// The second launch, one block: the losses, or their sum, added in an order that depends on nothing but their number.
struct ListSum {
  const double* list_loss;
  Int64 lists;
  double denominator;
  void* loss;  // a scalar, or one per list
  bool is_double;
  bool reduce;
};

FASTPO_KERNEL(listwise_sum, FASTPO_ARGUMENT(ListSum) s) {
  FASTPO_SHARED(double, cells, team_warps);
  const int thread = thread_index(), threads = block_threads();
  const auto put = [&](Int64 i, double value) {
    if (s.is_double)
      store(static_cast<double*>(s.loss) + i, value);
    else
      store(static_cast<float*>(s.loss) + i, static_cast<float>(value));
  };
  double sum = 0;
  for (Int64 i = thread; i < s.lists; i += threads) {
    const double value = load(s.list_loss + i);
    sum += value;
    if (!s.reduce) put(i, value);
  }
  const double of_warp = warp_sum(sum);
  if (thread % warp == 0) cells[thread / warp] = of_warp;
  FASTPO_BARRIER();
  if (!s.reduce || thread > 0) return;
  double total = 0;
  for (int w = 0; w < threads / warp; ++w) {
    const double part = cells[w];
    total += part;
  }
  put(0, total / s.denominator);
}

}  // namespace FASTPO_NAMESPACE
