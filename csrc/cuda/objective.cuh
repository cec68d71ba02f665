// objective on the GPU: the masked sums of the streams, then the formula, in one launch. See
// fastpo/kernels/objective.py.
//
// A team of threads sums one stream of one row: a warp or four of them, or a single thread where the streams are
// summed already. A block gathers the sums of its rows in shared memory, from which one thread per row evaluates
// the formula.
#pragma once

#include "../arguments.h"
#include "dtypes.cuh"
#include "shape.cuh"
// after dtypes.cuh, which defines the namespace
#include "../formulas/pairwise.h"
#include "../formulas/unpaired.h"

namespace FASTPO_NAMESPACE {

constexpr int long_team = 128;
constexpr int most_threads = 512;
constexpr int single_rows = 256;     // per block, of teams of one thread
constexpr int most_rows = 32;        // per block, of larger teams
constexpr Int64 busy_blocks = 1024;  // more rows per block only where this many blocks remain

// `tokens` per row, of the longest stream on average
FASTPO_HOST_DEVICE Shape objective_shape(Int64 rows, Int64 tokens, int streams) {
  Shape s;
  if (tokens <= 1) {
    s.threads = s.rows = single_rows;
    s.team = 1;
  } else if (tokens <= short_row) {
    s.threads = 256;
    s.team = warp;
    const int at_once = s.threads / (warp * streams);
    s.rows = static_cast<int>(clamp<Int64>(rows / busy_blocks, at_once, most_rows));
  } else {
    s.team = long_team;
    // teams may take a second stream: a block of more threads would leave them too few registers
    s.threads = clamp<int>(long_team * streams, long_team, most_threads);
    s.rows = 1;
  }
  s.blocks = clamp<Int64>(ceil_div<Int64>(rows, s.rows), 1, most_blocks);
  return s;
}

struct Tokens {
  Int64 first, count;
};

// Boundaries are read on the device and cannot be refused there: what is not inside the stream has count -1.
FASTPO_DEVICE Tokens tokens_of(const Layout& layout, Int64 row, Int64 row_stride) {
  if (!layout.boundaries) return {row * row_stride, layout.tokens};
  const Int64 begin = load(layout.boundaries + row), end = load(layout.boundaries + row + 1);
  const bool inside = (row > 0 ? 0 <= begin : 0 == begin) && begin <= end && end <= layout.total;
  return {inside ? begin : 0, inside ? end - begin : -1};
}

FASTPO_DEVICE const bool* mask_of(const Layout& layout, Int64 row) {
  return layout.mask ? layout.mask + tokens_of(layout, row, layout.mask_stride).first : nullptr;
}

struct Partial {
  double sum;
  int count;  // tokens that count
};

// bytes of the mask for N tokens
template <int N>
FASTPO_DEVICE Vector<unsigned char, N> load_mask(const bool* mask) {
  const auto* p = reinterpret_cast<const unsigned char*>(mask);
  if (reinterpret_cast<unsigned long long>(p) % N == 0)
    return load(reinterpret_cast<const Vector<unsigned char, N>*>(p));
  Vector<unsigned char, N> bytes;
  for (int i = 0; i < N; ++i) bytes.at[i] = load(p + i);
  return bytes;
}

// This thread's part of the sum of n tokens, in double: a log-ratio is the small difference of two large sums.
template <DType dtype>
FASTPO_DEVICE Partial sum_part(const void* data, Int64 first, const bool* mask, Int64 n, int rank, int team) {
  using E = Element<dtype>;
  constexpr int width = vector_width<dtype>;
  const auto* p = static_cast<const Storage<dtype>*>(data) + first;
  Partial part{0, 0};
  const auto add_one = [&](Int64 i) {
    if (mask && !load(mask + i)) return;
    part.sum += E::widen(load(p + i));
    ++part.count;
  };
  const Int64 misfit = unaligned_head(p);
  const Int64 head = misfit < n ? misfit : n;
  const Int64 vectors = (n - head) / width;
  for (Int64 i = rank; i < head; i += team) add_one(i);
  const auto* body = reinterpret_cast<const Vector<Storage<dtype>, width>*>(p + head);
  FASTPO_UNROLL(4)
  for (Int64 v = rank; v < vectors; v += team) {
    const Vector<Storage<dtype>, width> x = load(body + v);
    if (mask) {
      const Vector<unsigned char, width> counts = load_mask<width>(mask + head + v * width);
      for (int j = 0; j < width; ++j) {
        part.sum += counts.at[j] ? static_cast<double>(E::widen(x.at[j])) : 0.0;
        part.count += counts.at[j] != 0;
      }
    } else {
      for (int j = 0; j < width; ++j) part.sum += E::widen(x.at[j]);
      part.count += width;
    }
  }
  for (Int64 i = head + vectors * width + rank; i < n; i += team) add_one(i);
  return part;
}

template <DType dtype>
FASTPO_DEVICE Partial sum_of(const void* data, Int64 first, bool single, const bool* mask, Int64 n, int rank,
                             int team) {
  // a number that was summed before: nothing of the rest is needed
  if (single) return {Element<dtype>::widen(load(static_cast<const Storage<dtype>*>(data) + first)), 1};
  return sum_part<dtype>(data, first, mask, n, rank, team);
}

FASTPO_DEVICE Partial sum_stream(const Stream& stream, const Layout& layout, Int64 row, int rank, int team) {
  const Tokens t = tokens_of(layout, row, stream.row_stride);
  // NaN, so that bad boundaries never look like a result
  if (t.count < 0) return {from_bits(0x7fc00000), 0};
  const bool* mask = mask_of(layout, row);
  const bool single = team == 1 && t.count == 1 && !mask;
  switch (stream.dtype) {
    case DType::f32:
      return sum_of<DType::f32>(stream.data, t.first, single, mask, t.count, rank, team);
    case DType::f64:
      return sum_of<DType::f64>(stream.data, t.first, single, mask, t.count, rank, team);
    case DType::bf16:
      return sum_of<DType::bf16>(stream.data, t.first, single, mask, t.count, rank, team);
    default:
      return sum_of<DType::f16>(stream.data, t.first, single, mask, t.count, rank, team);
  }
}

FASTPO_DEVICE Int64 given_length(const Layout& layout, Int64 row) {
  return layout.lengths_are_int64 ? load(static_cast<const Int64*>(layout.lengths) + row)
                                  : load(static_cast<const int*>(layout.lengths) + row);
}

#if defined(FASTPO_USER_FORMULA)
// A formula that the user gave as a Python expression (fastpo/losses/formula.py), with hyper-parameters by place.
struct UserFormula {
  template <class T>
  static FASTPO_FN Dual<T, 2> evaluate(const Row<T, 2>& row, const double* h) {
    using D = Dual<T, 2>;
    [[maybe_unused]] const D w = row.logratio[0], l = row.logratio[1];
    [[maybe_unused]] const D policy_w = row.policy[0], policy_l = row.policy[1];
    [[maybe_unused]] const D reference_w = detach(policy_w - w), reference_l = detach(policy_l - l);
    return FASTPO_USER_FORMULA;
  }
};
#endif

FASTPO_DEVICE Hyper hyper_of(const Objective& o) {
  Hyper hyper;
  int place = 0;
#define FASTPO_TAKE(name) hyper.name = o.hyper[place++];
  FASTPO_HYPER_PARAMETERS(FASTPO_TAKE)
#undef FASTPO_TAKE
  return hyper;
}

template <class A>
FASTPO_DEVICE Dual<A, 2> evaluate(const Objective& o, const Row<A, 2>& row) {
#if defined(FASTPO_USER_FORMULA)
  return UserFormula::evaluate(row, o.hyper);
#else
  const Hyper hyper = hyper_of(o);
  int place = 0;
#define FASTPO_EVALUATE(name, loss) \
  if (o.formula == place++) return pairwise::name::evaluate(row, hyper);
  FASTPO_PAIRWISE_FORMULAS(FASTPO_EVALUATE)
#undef FASTPO_EVALUATE
  return Dual<A, 2>{};
#endif
}

template <class A>
FASTPO_DEVICE Dual<A, 1> evaluate(const Objective& o, const Row<A, 1>& row) {
  const Hyper hyper = hyper_of(o);
  int place = 0;
#define FASTPO_EVALUATE(name, loss) \
  if (o.formula == place++) return unpaired::name::evaluate(row, hyper);
  FASTPO_UNPAIRED_FORMULAS(FASTPO_EVALUATE)
#undef FASTPO_EVALUATE
  return Dual<A, 1>{};
}

// one number, whatever its dtype
FASTPO_DEVICE double column_of(const Stream& column, Int64 row) {
  const Int64 at = row * column.row_stride;
  switch (column.dtype) {
    case DType::f32:
      return Element<DType::f32>::widen(load(static_cast<const Storage<DType::f32>*>(column.data) + at));
    case DType::f64:
      return Element<DType::f64>::widen(load(static_cast<const Storage<DType::f64>*>(column.data) + at));
    case DType::bf16:
      return Element<DType::bf16>::widen(load(static_cast<const Storage<DType::bf16>*>(column.data) + at));
    default:
      return Element<DType::f16>::widen(load(static_cast<const Storage<DType::f16>*>(column.data) + at));
  }
}

// Loss, slopes and rewards of one row from the sums of its streams; returns the loss.
template <class A, int k>
FASTPO_DEVICE A evaluate_row(const Objective& o, Int64 row, const Partial (&sums)[max_streams]) {
  Row<A, k> r;
  FASTPO_UNROLL(2)
  for (int side = 0; side < k; ++side) {
    const double policy = sums[side].sum;
    const double reference = o.models > 1 ? sums[k + side].sum : 0.0;
    r.policy[side] = variable<k>(static_cast<A>(policy), side);
    r.logratio[side] = variable<k>(static_cast<A>(policy - reference), side);
    r.step[side] = variable<k>(o.models > 2 ? static_cast<A>(policy - sums[2 * k + side].sum) : A(0), side);
    r.reference[side] = {static_cast<A>(reference)};
    r.length[side] = {A(1)};
    A reward = static_cast<A>(o.reward_scale) * r.logratio[side].value;
    if (o.use_lengths) {
      const Layout& layout = o.layouts[side];
      const Int64 length = layout.lengths ? given_length(layout, row) : sums[side].count;
      r.length[side] = {static_cast<A>(length < 1 ? 1 : length)};
      if (o.use_lengths & average) {
        const A per_token = A(1) / r.length[side].value;
        r.policy[side] = chain(r.policy[side], r.policy[side].value * per_token, per_token);
        r.logratio[side] = chain(r.logratio[side], r.logratio[side].value * per_token, per_token);
        r.step[side] = chain(r.step[side], r.step[side].value * per_token, per_token);
        r.reference[side] = {r.reference[side].value * per_token};
        if (o.use_lengths & average_rewards) reward = reward * per_token;
      }
    }
    store(static_cast<A*>(o.rewards) + side * o.rows + row, reward);
  }
  FASTPO_UNROLL(4)
  for (int c = 0; c < max_columns; ++c)
    r.column[c] = {c < o.columns ? static_cast<A>(column_of(o.column[c], row)) : A(0)};
  const Dual<A, k> loss = evaluate<A>(o, r);
  if (o.loss) store(static_cast<A*>(o.loss) + row, loss.value);
  FASTPO_UNROLL(2)
  for (int side = 0; side < k; ++side)
    store(static_cast<A*>(o.slopes) + side * o.rows + row, loss.slope[side] * static_cast<A>(o.scale));
  return loss.value;
}

// Sum over the block, of use to its first thread only; all threads take part. `sums` has a cell per warp.
template <class Cells>
FASTPO_DEVICE double block_sum(Cells& sums, double value) {
  const int thread = thread_index(), warps = ceil_div(block_threads(), warp);
  const double of_warp = warp_sum(value);
  if (thread % warp == 0) sums[thread / warp] = of_warp;
  FASTPO_BARRIER();
  double total = 0;
  if (thread == 0)
    for (int i = 0; i < warps; ++i) {
      const double part = sums[i];
      total += part;
    }
  return total;
}

template <class A>
FASTPO_DEVICE void objective_rows(const Objective& o, const Shape& shape) {
  // (streams, rows, warps of a team, at least one)
  FASTPO_SHARED(double, sums, max_streams* single_rows);
  FASTPO_SHARED(int, counts, max_streams* single_rows);
  FASTPO_SHARED(double, losses, warp);
  const int thread = thread_index(), teams = block_threads() / shape.team;
  const int parts = shape.team < warp ? 1 : shape.team / warp;
  const int streams = o.sides * o.models;
  double loss = 0;
  for (Int64 first = block_index() * shape.rows; first < o.rows; first += block_count() * shape.rows) {
    const int rows = static_cast<int>(clamp<Int64>(o.rows - first, 0, shape.rows));
    for (int item = thread / shape.team; item < rows * streams; item += teams) {
      const int s = item / rows, row = item % rows;
      Partial part = sum_stream(o.stream[s], o.layouts[s % o.sides], first + row, thread % shape.team, shape.team);
      if (shape.team > 1) {
        part.sum = warp_sum(part.sum);
        part.count = warp_sum(part.count);
      }
      if (shape.team == 1 || thread % warp == 0) {
        const int cell = item * parts + thread % shape.team / warp;
        sums[cell] = part.sum;
        counts[cell] = part.count;
      }
    }
    FASTPO_BARRIER();
    if (thread < rows) {
      Partial row[max_streams] = {};
      FASTPO_UNROLL(6)
      for (int s = 0; s < max_streams; ++s)
        for (int w = 0; s < streams && w < parts; ++w) {
          const int cell = (s * rows + thread) * parts + w;
          const double sum = sums[cell];
          const int count = counts[cell];
          row[s].sum += sum;
          row[s].count += count;
        }
      loss += o.sides == 1 ? evaluate_row<A, 1>(o, first + thread, row) : evaluate_row<A, 2>(o, first + thread, row);
    }
    // the cells are written again for the next rows
    FASTPO_BARRIER();
  }
  if (o.block_loss) {
    const double total = block_sum(losses, loss);
    if (thread == 0) store(o.block_loss + block_index(), total);
  }
}

FASTPO_KERNEL(objective_f32, FASTPO_ARGUMENT(Objective) o, FASTPO_ARGUMENT(Shape) shape) {
  objective_rows<float>(o, shape);
}
FASTPO_KERNEL(objective_f64, FASTPO_ARGUMENT(Objective) o, FASTPO_ARGUMENT(Shape) shape) {
  objective_rows<double>(o, shape);
}

// The second launch of a reduced loss, one block: the sum of the blocks' losses, in an order that depends on
// nothing but their number.
struct LossSum {
  const double* block_loss;
  Int64 blocks;
  double denominator;
  void* loss;
  bool is_double;
};

constexpr int sum_threads = 512;

FASTPO_KERNEL(objective_sum, FASTPO_ARGUMENT(LossSum) s) {
  FASTPO_SHARED(double, sums, warp);
  double loss = 0;
  for (Int64 i = thread_index(); i < s.blocks; i += block_threads()) loss += load(s.block_loss + i);
  const double total = block_sum(sums, loss) / s.denominator;
  if (thread_index() != 0) return;
  if (s.is_double)
    store(static_cast<double*>(s.loss), total);
  else
    store(static_cast<float*>(s.loss), static_cast<float>(total));
}

// Gradients of the token streams: both sides in one launch, a team per row. What no row has, tokens behind the
// last sequence or of rows with bad boundaries, is left as it is: the launcher fills it with zeros.
struct SpreadSides {
  Spread side[max_sides];
  int sides;
};

FASTPO_HOST_DEVICE Shape spread_shape(Int64 items, Int64 tokens) {
  Shape s;
  s.threads = 256;
  s.team = tokens <= short_row ? warp : long_team;
  s.rows = s.threads / s.team;
  s.blocks = clamp<Int64>(ceil_div<Int64>(items, s.rows), 1, most_blocks);
  return s;
}

template <DType dtype>
FASTPO_DEVICE void fill(const Spread& s, Int64 first, Int64 n, const bool* mask, double value, int rank, int team) {
  using S = Storage<dtype>;
  constexpr int width = vector_width<dtype>;
  S* p = static_cast<S*>(s.gradient) + first;
  const S filled = Element<dtype>::narrow(value);
  const auto fill_one = [&](Int64 i) { store(p + i, !mask || load(mask + i) ? filled : S(0)); };
  const Int64 misfit = unaligned_head(p);
  const Int64 head = misfit < n ? misfit : n;
  const Int64 vectors = (n - head) / width;
  if (rank < head) fill_one(rank);
  auto* body = reinterpret_cast<Vector<S, width>*>(p + head);
  for (Int64 v = rank; v < vectors; v += team) {
    Vector<S, width> x;
    for (int j = 0; j < width; ++j) x.at[j] = filled;
    if (mask) {
      const Vector<unsigned char, width> counts = load_mask<width>(mask + head + v * width);
      for (int j = 0; j < width; ++j) x.at[j] = counts.at[j] ? filled : S(0);
    }
    store(body + v, x);
  }
  const Int64 tail = head + vectors * width + rank;
  if (tail < n) fill_one(tail);
}

FASTPO_DEVICE void spread_row(const Spread& s, Int64 row, int rank, int team) {
  const Int64 at = s.grad_per_row ? row : 0;
  double value;
  // the product is rounded in the accumulator's type, as on the CPU
  if (s.is_double)
    value = load(static_cast<const double*>(s.grad) + at) * load(static_cast<const double*>(s.slopes) + row);
  else
    value = load(static_cast<const float*>(s.grad) + at) * load(static_cast<const float*>(s.slopes) + row);
  const Tokens t = tokens_of(s.layout, row, s.layout.tokens);
  const bool* mask = mask_of(s.layout, row);
  switch (s.dtype) {
    case DType::f32:
      return fill<DType::f32>(s, t.first, t.count, mask, value, rank, team);
    case DType::f64:
      return fill<DType::f64>(s, t.first, t.count, mask, value, rank, team);
    case DType::bf16:
      return fill<DType::bf16>(s, t.first, t.count, mask, value, rank, team);
    default:
      return fill<DType::f16>(s, t.first, t.count, mask, value, rank, team);
  }
}

FASTPO_KERNEL(objective_spread, FASTPO_ARGUMENT(SpreadSides) s, FASTPO_ARGUMENT(Shape) shape) {
  const int thread = thread_index();
  const Int64 rows = s.side[0].rows, items = rows * s.sides;
  for (Int64 item = block_index() * shape.rows + thread / shape.team; item < items;
       item += block_count() * shape.rows) {
    const int side = item < rows ? 0 : 1;
    spread_row(s.side[side], item - side * rows, thread % shape.team, shape.team);
  }
}

}  // namespace FASTPO_NAMESPACE
