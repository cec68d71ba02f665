// Sums of exponentials over rows of logits, block by block: what token_logprobs and linear_logprobs share.
//
// A row is walked in blocks that stay in the first-level cache, with the largest logit so far as the offset
// of the exponentials. A block is summed and its maximum found in one go; only if that shows that the offset
// was too far off for the range of the exponent is the block summed again. In units of log 2, with t = (x -
// offset) / (T ln 2), the sums are S = Σ 2^t, W = Σ t 2^t (for the entropy) and Q = Σ 4^t (for Σ p²).
#pragma once

#include "vec.h"

namespace FASTPO_NAMESPACE {

constexpr int64_t block_columns = 4096;
// the processor's own prefetch stops at the end of a page, this one does not
constexpr int64_t prefetch_bytes = 8192;
constexpr double ln2 = 0.69314718055994530942;

// below this 2^t is nothing next to the row's largest term 1
template <class V>
constexpr double lowest_power = -Traits<V>::exponent_bias;

// 2^f for |f| <= 1/2. float: the minimax polynomial of degree 6, relative error 2e-9, and exactly 1 at 0, so
// that a row with one certain token has log-prob 0.
template <class V>
FASTPO_FN V exp2_reduced(V f) {
  if constexpr (sizeof(Scalar<V>) == 8) {
    return exp_reduced(f * constant<V>(ln2));
  } else {
    V p = constant<V>(0.00015345812158740182);
    p = p * f + constant<V>(0.001339993120947414);
    p = p * f + constant<V>(0.0096184889565227916);
    p = p * f + constant<V>(0.055503287769976638);
    p = p * f + constant<V>(0.24022646890639572);
    p = p * f + constant<V>(0.69314720573725268);
    return p * f + constant<V>(1.0);
  }
}

// 2^t for t of at most a few units, with exactly 0 for -inf; NaN stays
template <class V>
FASTPO_FN V exp2(V t) {
#if FASTPO_AVX512
  if constexpr (sizeof(Scalar<V>) == 4) {
    const V f = (V)_mm512_reduce_ps((__m512)t, 0);
    return (V)_mm512_scalef_ps((__m512)exp2_reduced(f), (__m512)(t - f));
  }
#endif
  const V lowest = constant<V>(lowest_power<V>);
  const V clamped = select(t < lowest, lowest, t);
  const V n = round_nearest(clamped);
  return exp2_reduced(clamped - n) * power_of_two(n);
}

// `n` columns from `column` on as contiguous storage: in place, or gathered into the buffer
template <DType dtype>
FASTPO_FN const Storage<dtype>* columns(const Storage<dtype>* row, int64_t stride, int64_t column, int64_t n,
                                        Storage<dtype>* buffer) {
  if (stride == 1) return row + column;
  for (int64_t i = 0; i < n; ++i) buffer[i] = row[(column + i) * stride];
  return buffer;
}

// The columns that a softmax is over, counted from a block's first: every one, or those whose bit is set. What is not
// among them may hold anything.
struct EveryColumn {
  static constexpr bool every = true;
  static FASTPO_FN EveryColumn of_row(const uint32_t*, int64_t, int64_t) { return {}; }
  FASTPO_FN EveryColumn from(int64_t) const { return {}; }
  FASTPO_FN bool has(int64_t) const { return true; }
  template <class V>
  FASTPO_FN V operator()(int64_t, V x, Scalar<V>) const {
    return x;
  }
};

struct AllowedColumns {
  static constexpr bool every = false;
  const uint32_t* words;
  static FASTPO_FN AllowedColumns of_row(const uint32_t* words, int64_t stride, int64_t row) {
    return {words + row * stride};
  }
  // counted from a multiple of 32
  FASTPO_FN AllowedColumns from(int64_t column) const { return {words + column / 32}; }
  FASTPO_FN bool has(int64_t column) const { return words[column / 32] >> (column % 32) & 1; }
  // of the vector that begins at `column` the elements that are among them, and `out` for the others
  template <class V>
  FASTPO_FN V operator()(int64_t column, V x, Scalar<V> out) const {
    return where_bit(words, column, x, out);
  }
};

// largest of n elements; a NaN is passed over
template <DType dtype, class Set = EveryColumn>
Acc<dtype> block_max(const Storage<dtype>* p, int64_t n, Set set = {}) {
  using A = Acc<dtype>;
  using V = Vec<A>;
  constexpr int w = lanes<A>;
  const A least = -std::numeric_limits<A>::infinity();
  V m[4];
  for (auto& v : m) v = constant<V>(least);
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int j = 0; j < 4; ++j) m[j] = larger_of(set(i + j * w, Element<dtype>::load(p + i + j * w), least), m[j]);
  for (; i + w <= n; i += w) m[0] = larger_of(set(i, Element<dtype>::load(p + i), least), m[0]);
  if (i < n) m[1] = larger_of(set(i, load_some<dtype>(p + i, 1, n - i, least), least), m[1]);
  return max_lanes(larger_of(larger_of(m[0], m[1]), larger_of(m[2], m[3])));
}

struct Sums {
  double s = 0, w = 0, q = 0;

  // to an offset that is higher by `shift` in t
  void lower(double shift) {
    const double factor = ::exp2(-shift);
    w = factor * (w - shift * s);
    s *= factor;
    q *= factor * factor;
  }
};

// t up to which a block need not be summed again: Σ 4^t over a block stays finite in float
constexpr double highest_power = 48;

// Four vectors of adjacent elements, in any order: a word of two bf16 numbers is split where it stands.
template <DType dtype>
FASTPO_FN void load_four(const Storage<dtype>* p, Vec<Acc<dtype>> (&x)[4]) {
  constexpr int width = lanes<Acc<dtype>>;
  if constexpr (dtype == DType::bf16) {
    for (int j = 0; j < 4; j += 2) {
      VecU words;
      __builtin_memcpy(&words, p + j * width, sizeof words);
      x[j] = (VecF)(words << 16);
      x[j + 1] = (VecF)(words & 0xffff0000u);
    }
  } else {
    for (int j = 0; j < 4; ++j) x[j] = Element<dtype>::load(p + j * width);
  }
}

// Sums of n elements for a given offset; returns their maximum.
template <DType dtype, bool weighted, bool squared, class Set>
Acc<dtype> block_sums(const Storage<dtype>* p, int64_t n, Set set, Acc<dtype> offset, Acc<dtype> scale, Sums& sums) {
  using A = Acc<dtype>;
  using V = Vec<A>;
  constexpr int width = lanes<A>;
  constexpr A least = -std::numeric_limits<A>::infinity();
  V m[4];
  for (auto& v : m) v = constant<V>(least);
  const V lowest = constant<V>(lowest_power<V>);
  // two levels: equal terms round the same way each time, which a long chain of additions would pile up
  V total_s = {}, total_w = {}, total_q = {};
  for (int64_t i = 0; i < n;) {
    V s[4] = {}, w[4] = {}, q[4] = {};
    const auto add = [&](V x, int j) __attribute__((always_inline)) {
      m[j] = larger_of(x, m[j]);
      const V t = (x - offset) * scale;
      const V e = exp2(t);
      s[j] += e;
      // where e is 0, t may be -inf: an impossible token adds nothing
      if constexpr (weighted) w[j] += e * select(t < lowest, lowest, t);
      if constexpr (squared) q[j] += e * e;
    };
    constexpr int64_t run = 16 * 4 * width;
    const int64_t end = n - i < run ? n : i + run;
    for (; i + 4 * width <= end; i += 4 * width) {
      V x[4];
      if constexpr (Set::every)
        load_four<dtype>(p + i, x);
      else  // a bit's place is that of its element
        for (int j = 0; j < 4; ++j) x[j] = set(i + j * width, Element<dtype>::load(p + i + j * width), least);
      for (size_t line = 0; line < 4 * width * sizeof(*p); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(p + i) + line + prefetch_bytes);
      for (int j = 0; j < 4; ++j) add(x[j], j);
    }
    for (; i + width <= end; i += width) add(set(i, Element<dtype>::load(p + i), least), 0);
    if (i < end) add(set(i, load_some<dtype>(p + i, 1, end - i, least), least), 1);
    i = end;
    total_s += (s[0] + s[1]) + (s[2] + s[3]);
    if constexpr (weighted) total_w += (w[0] + w[1]) + (w[2] + w[3]);
    if constexpr (squared) total_q += (q[0] + q[1]) + (q[2] + q[3]);
  }
  sums.s = sum_lanes(total_s);
  if constexpr (weighted) sums.w = sum_lanes(total_w);
  if constexpr (squared) sums.q = sum_lanes(total_q);
  return max_lanes(larger_of(larger_of(m[0], m[1]), larger_of(m[2], m[3])));
}

// first column of the set that holds `value`, or the first NaN for a NaN; n if there is none
template <DType dtype, class Set>
int64_t find(const Storage<dtype>* p, int64_t stride, int64_t n, Set set, Acc<dtype> value) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc<dtype> x = load_one<dtype>(p + i * stride);
    if ((x == value || (value != value && x != x)) && set.has(i)) return i;
  }
  return n;
}

// A row's sums so far, in double, relative to its largest logit so far.
struct RowSums {
  double largest = -std::numeric_limits<double>::infinity();
  int64_t top1 = 0;
  Sums sums;
};

// Adds those of n adjacent columns, n <= block_columns, that are in the set; the first is number `column` of the row.
template <DType dtype, bool weighted, bool squared, class Set>
FASTPO_FN void fold_block(const Storage<dtype>* p, int64_t n, Set set, int64_t column, Acc<dtype> scale, bool top1,
                          RowSums& row) {
  using A = Acc<dtype>;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  const A largest = static_cast<A>(row.largest);
  Sums block;
  A candidate = largest;
  if (largest == -infinity)
    candidate = block_max<dtype>(p, n, set);
  else
    candidate = block_sums<dtype, weighted, squared>(p, n, set, largest, scale, block);
  if (candidate > largest || largest == -infinity) {
    // in double, for t may be far beyond what a float holds
    const double shift = (static_cast<double>(candidate) - largest) * scale;
    if (shift <= highest_power)
      block.lower(shift);
    else  // the row's first block is here too, and a NaN
      block_sums<dtype, weighted, squared>(p, n, set, candidate == -infinity ? A(0) : candidate, scale, block);
    if (largest != -infinity) row.sums.lower(shift);
    if (top1 && candidate > largest) row.top1 = column + find<dtype>(p, 1, n, set, candidate);
    row.largest = candidate;
  }
  row.sums.s += block.s;
  row.sums.w += block.w;
  row.sums.q += block.q;
}

// 2^t (at + slope t) for a row: the part of the gradient that every column has. The division of 2^t by the
// row's sum is in the coefficients, where it is made in double.
template <class A, bool weighted>
struct RowGradient {
  A largest, scale, at, slope;

  template <class V>
  FASTPO_FN V operator()(V x) const {
    const V t = (x - largest) * scale;
    if constexpr (!weighted) return exp2(t) * at;
    const V lowest = constant<V>(lowest_power<V>);
    return exp2(t) * (slope * select(t < lowest, lowest, t) + at);
  }
};

}  // namespace FASTPO_NAMESPACE
