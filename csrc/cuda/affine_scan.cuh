// affine_scan and the advantages on the GPU. See fastpo/kernels/affine_scan.py.
//
// A team, a warp or a block, walks a row in chunks of as many tokens as it has threads: each thread makes the step of
// its token, the lanes of a warp compose theirs by shuffles, the warps of a block through shared memory, and what the
// row carries into a chunk is applied last. Threads are in the order of the walk.
#pragma once

#include "../arguments.h"
#include "dtypes.cuh"
#include "shape.cuh"
// after dtypes.cuh, which defines the namespace
#include "../formulas/recurrence.h"

namespace FASTPO_NAMESPACE {

struct RowSpan {
  Int64 first, count;
};

// Boundaries are read on the device and cannot be refused there: what is not inside has count -1. Behind the last row
// stand the tokens of no row, as one more.
FASTPO_DEVICE RowSpan span_of(const Scan& s, Int64 row) {
  if (!s.boundaries) return {row * s.tokens, s.tokens};
  const Int64 begin = load(s.boundaries + row), end = row < s.rows ? load(s.boundaries + row + 1) : s.total;
  const bool inside = (row > 0 ? 0 <= begin : 0 == begin) && begin <= end && end <= s.total;
  return {inside ? begin : 0, inside ? end - begin : -1};
}

FASTPO_DEVICE void put_number(void* out, bool is_double, Int64 i, double value) {
  if (is_double)
    store(static_cast<double*>(out) + i, value);
  else
    store(static_cast<float*>(out) + i, static_cast<float>(value));
}

FASTPO_DEVICE bool flag_at(const bool* flags, Int64 i) { return flags && load(flags + i); }

// What the walk has seen: x, whether there was a step, and the value of the last.
struct ScanCarry {
  double state, value;
  bool seen;
};

FASTPO_DEVICE void walk_row(const Scan& s, Int64 row, const RowSpan& t, int rank, int team) {
  // of each warp: whether a token counts, whether there is a step, the value of its last step, its composed steps
  FASTPO_SHARED(int, counting, team_warps);
  FASTPO_SHARED(int, stepping, team_warps);
  FASTPO_SHARED(double, values, team_warps);
  FASTPO_SHARED(double, slopes, team_warps);
  FASTPO_SHARED(double, shifts, team_warps);
  const bool wide = team > warp, advantage = s.kind == ScanKind::advantage;
  const int lane = rank % warp, own = rank / warp, warps = team / warp;
  const unsigned earlier = (1u << lane) - 1;
  const bool own_state = s.kind == ScanKind::affine || (advantage && !s.stream[1].data);
  ScanCarry carry{own_state && s.initial.data ? number_at(s.initial, row) : 0.0, 0.0, false};
  for (Int64 begin = 0; begin < t.count; begin += team) {
    const Int64 k = begin + rank;
    const bool inside = k < t.count;
    const Int64 at = t.first + (s.reverse ? t.count - 1 - k : k);
    const bool counts = inside && (!s.mask || load(s.mask + at));
    const unsigned counted = FASTPO_BALLOT(counts);
    bool seen = carry.seen || (counted & earlier) != 0;
    if (wide) {
      if (lane == 0) counting[own] = counted != 0;
      FASTPO_BARRIER();
      for (int w = 0; w < own; ++w) {
        const int any = counting[w];
        seen = seen || any;
      }
    }
    const bool steps = counts || (s.holes && inside && seen);
    const double value = advantage && s.stream[1].data && counts ? number_at(s.stream[1], at) : 0.0;
    const unsigned stepped = FASTPO_BALLOT(steps);
    const unsigned before_me = stepped & earlier;
    const double of_lane = FASTPO_SHUFFLE(value, before_me ? highest_bit(before_me) : lane);
    const double of_last = FASTPO_SHUFFLE(value, stepped ? highest_bit(stepped) : lane);
    ScanCarry behind = carry;
    if (wide) {
      if (lane == 0) {
        stepping[own] = stepped != 0;
        values[own] = of_last;
      }
      FASTPO_BARRIER();
      for (int w = 0; w < own; ++w) {
        const int any = stepping[w];
        const double last = values[w];
        behind.seen = behind.seen || any;
        behind.value = any ? last : behind.value;
      }
    }
    if (before_me) behind.value = of_lane;
    behind.seen = behind.seen || before_me;
    Affine<double> step{1.0, 0.0};
    double push = 0, given = 0;
    if (steps && advantage) {
      if (!behind.seen) {
        behind.value = s.initial.data ? number_at(s.initial, row) : 0.0;
        if (flag_at(s.repeat, row)) behind.value = value;
      }
      double next_value = s.stream[1].data ? behind.value : 0.0;
      if (s.stream[2].data) next_value = counts ? number_at(s.stream[2], at) : 0.0;
      const bool terminated = counts && flag_at(s.terminated, at);
      const bool ended = terminated || (counts && flag_at(s.truncated, at));
      const double reward = counts ? number_at(s.stream[0], at) : 0.0;
      AdvantageStep<double> made = advantage_step(reward, value, next_value, terminated, ended, s.gamma, s.lambda);
      if (s.stream[3].data) made = off_policy(made, counts ? number_at(s.stream[3], at) : 0.0, s.rho_bar, s.c_bar);
      step = made.step;
      push = made.push;
    } else if (steps) {
      step.slope = number_at(s.stream[0], at);
      given = number_at(s.stream[1], at);
      step.shift = s.kind == ScanKind::adjoint ? step.slope * given : given;
    }
    const double shift = step.shift;
    for (int by = 1; by < warp; by *= 2) {
      const double slope_before = FASTPO_SHUFFLE(step.slope, lane < by ? lane : lane - by);
      const double shift_before = FASTPO_SHUFFLE(step.shift, lane < by ? lane : lane - by);
      if (lane >= by) step = compose(step, {slope_before, shift_before});
    }
    const double slope_before = FASTPO_SHUFFLE(step.slope, lane < 1 ? lane : lane - 1);
    const double shift_before = FASTPO_SHUFFLE(step.shift, lane < 1 ? lane : lane - 1);
    double into_warp = carry.state, out_of_chunk = carry.state;
    if (wide) {
      if (lane == warp - 1) {
        slopes[own] = step.slope;
        shifts[own] = step.shift;
      }
      FASTPO_BARRIER();
      for (int w = 0; w < warps; ++w) {
        const double slope = slopes[w];
        const double of_warp = shifts[w];
        if (w == own) into_warp = out_of_chunk;
        out_of_chunk = apply({slope, of_warp}, out_of_chunk);
        const int any = stepping[w];
        const double last = values[w];
        carry.seen = carry.seen || any;
        carry.value = any ? last : carry.value;
      }
    }
    const double before = lane == 0 ? into_warp : apply({slope_before, shift_before}, into_warp);
    const double state = apply(step, into_warp);
    if (!wide) {
      out_of_chunk = FASTPO_SHUFFLE(state, warp - 1);
      carry.seen = carry.seen || stepped;
      carry.value = stepped ? of_last : carry.value;
    }
    carry.state = out_of_chunk;
    if (inside) {
      double first = state, second = before;
      if (s.kind == ScanKind::adjoint) {
        second = given + before;
        first = counts ? second * number_at(s.stream[2], at) : 0.0;
      } else if (advantage) {
        second = state + value;
        if (s.stream[3].data) first = (push == 0 ? 0.0 : push * before) + shift;
      }
      if (s.out[0]) put_number(s.out[0], s.is_double, at, counts ? first : 0.0);
      if (s.out[1]) put_number(s.out[1], s.is_double, at, counts ? second : 0.0);
    }
    // the cells are written again for the next chunk
    if (wide) FASTPO_BARRIER();
  }
  if (s.last && rank == 0) put_number(s.last, s.is_double, row, carry.state);
}

// Tokens of a row with bad boundaries keep what the launcher wrote, NaN.
FASTPO_KERNEL(affine_scan, FASTPO_ARGUMENT(Scan) s, FASTPO_ARGUMENT(Shape) shape) {
  const int thread = thread_index(), rank = thread % shape.team;
  const Int64 rows = s.boundaries ? s.rows + 1 : s.rows;
  for (Int64 row = block_index() * shape.rows + thread / shape.team; row < rows; row += block_count() * shape.rows) {
    const RowSpan t = span_of(s, row);
    if (row < s.rows) {
      if (t.count >= 0)
        walk_row(s, row, t, rank, shape.team);
      else if (s.last && rank == 0)
        put_number(s.last, s.is_double, row, not_a_number<double>());
    } else {
      for (Int64 i = rank; i < t.count; i += shape.team)
        for (int o = 0; o < 2; ++o)
          if (s.out[o]) put_number(s.out[o], s.is_double, t.first + i, 0.0);
    }
  }
}

}  // namespace FASTPO_NAMESPACE
