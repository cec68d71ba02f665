// segment_stats on the GPU: a team, a warp or a block, takes a segment in three passes. See
// fastpo/kernels/segment_stats.py.
#pragma once

#include "../arguments.h"
#include "dtypes.cuh"
#include "shape.cuh"
// after dtypes.cuh, which defines the namespace
#include "../formulas/segment.h"

namespace FASTPO_NAMESPACE {

struct Members {
  Int64 first, count;
};

// Boundaries cannot be refused on a device: what is not inside has count -1. Behind the last segment stand the members
// of none, as one more; without an order, the first must begin at 0.
FASTPO_DEVICE Members members_of(const Segments& s, Int64 segment) {
  if (!s.boundaries) return {segment * s.members, s.members};
  const Int64 begin = load(s.boundaries + segment);
  const Int64 end = segment < s.segments ? load(s.boundaries + segment + 1) : s.total;
  const bool first = segment > 0 || s.order ? 0 <= begin : 0 == begin;
  const bool inside = first && begin <= end && end <= s.total;
  return {inside ? begin : 0, inside ? end - begin : -1};
}

FASTPO_DEVICE Sums of_lane(const Sums& s, int lanes) {
  Sums out;
  out.count = FASTPO_SHUFFLE_XOR(s.count, lanes);
  out.sum = FASTPO_SHUFFLE_XOR(s.sum, lanes);
  out.weight = FASTPO_SHUFFLE_XOR(s.weight, lanes);
  out.weighted = FASTPO_SHUFFLE_XOR(s.weighted, lanes);
  return out;
}
FASTPO_DEVICE Extremes of_lane(const Extremes& e, int lanes) {
  Extremes out;
  out.min = FASTPO_SHUFFLE_XOR(e.min, lanes);
  out.max = FASTPO_SHUFFLE_XOR(e.max, lanes);
  out.second = FASTPO_SHUFFLE_XOR(e.second, lanes);
  return out;
}
FASTPO_DEVICE Deviations of_lane(const Deviations& d, int lanes) {
  Deviations out;
  out.sum = FASTPO_SHUFFLE_XOR(d.sum, lanes);
  out.squares = FASTPO_SHUFFLE_XOR(d.squares, lanes);
  return out;
}

constexpr int cell_width = 4;

template <class Cells>
FASTPO_DEVICE void put_cells(Cells& cells, int at, const Sums& s) {
  cells[at] = s.count;
  cells[at + 1] = s.sum;
  cells[at + 2] = s.weight;
  cells[at + 3] = s.weighted;
}
template <class Cells>
FASTPO_DEVICE void put_cells(Cells& cells, int at, const Extremes& e) {
  cells[at] = e.min;
  cells[at + 1] = e.max;
  cells[at + 2] = e.second;
}
template <class Cells>
FASTPO_DEVICE void put_cells(Cells& cells, int at, const Deviations& d) {
  cells[at] = d.sum;
  cells[at + 1] = d.squares;
}
template <class Cells>
FASTPO_DEVICE Sums get_cells(Cells& cells, int at, const Sums&) {
  const double count = cells[at], sum = cells[at + 1], weight = cells[at + 2], weighted = cells[at + 3];
  return {count, sum, weight, weighted};
}
template <class Cells>
FASTPO_DEVICE Extremes get_cells(Cells& cells, int at, const Extremes&) {
  const double min = cells[at], max = cells[at + 1], second = cells[at + 2];
  return {min, max, second};
}
template <class Cells>
FASTPO_DEVICE Deviations get_cells(Cells& cells, int at, const Deviations&) {
  const double sum = cells[at], squares = cells[at + 1];
  return {sum, squares};
}

// of the whole team, the same in each thread; all threads of it take part
template <class Cells, class Part>
FASTPO_DEVICE Part team_merge(Cells& cells, Part part, int rank, int team) {
  for (int lanes = warp / 2; lanes > 0; lanes /= 2) part = merge(part, of_lane(part, lanes));
  if (team == warp) return part;
  if (rank % warp == 0) put_cells(cells, rank / warp * cell_width, part);
  FASTPO_BARRIER();
  Part all = get_cells(cells, 0, part);
  for (int w = 1; w < team / warp; ++w) all = merge(all, get_cells(cells, w * cell_width, part));
  // the cells are written again by the next pass
  FASTPO_BARRIER();
  return all;
}

struct Member {
  Int64 at;
  double value;
  bool counts;
};

FASTPO_DEVICE Member member(const Segments& s, Int64 place) {
  const Int64 at = s.order ? load(s.order + place) : place;
  // an order that is none
  if (at < 0 || at >= s.total) return {-1, 0.0, false};
  const double value = number_at(s.values, at);
  return {at, value, (!s.mask || load(s.mask + at)) && (!s.skip_nan || value == value)};
}

FASTPO_DEVICE void write_member(const Segments& s, const Member& m, double value, bool informative) {
  if (m.at < 0) return;
  if (s.is_double)
    store(static_cast<double*>(s.normalized) + m.at, value);
  else
    store(static_cast<float*>(s.normalized) + m.at, static_cast<float>(value));
  if (s.informative) store(s.informative + m.at, informative);
}

FASTPO_DEVICE void take_segment(const Segments& s, Int64 segment, const Members& m, int rank, int team) {
  FASTPO_SHARED(double, cells, team_warps* cell_width);
  // of groups there are as many as members, most of them empty
  if (m.count == 0 && !s.statistics) return;
  Sums sums{0, 0, 0, 0};
  Extremes extremes = no_members();
  for (Int64 j = rank; j < m.count; j += team) {
    const Member x = member(s, m.first + j);
    if (!x.counts) continue;
    const double weight = s.weights.data ? number_at(s.weights, x.at) : 0.0;
    sums = merge(sums, Sums{1, x.value, weight, weight == 0 ? 0.0 : weight * x.value});
    extremes = merge(extremes, Extremes{x.value, x.value, -infinity<double>()});
  }
  sums = team_merge(cells, sums, rank, team);
  extremes = team_merge(cells, extremes, rank, team);
  const double mean = first_mean(sums);
  Deviations deviations{0, 0};
  for (Int64 j = rank; j < m.count; j += team) {
    const Member x = member(s, m.first + j);
    if (x.counts) deviations = merge(deviations, Deviations{x.value - mean, (x.value - mean) * (x.value - mean)});
  }
  deviations = team_merge(cells, deviations, rank, team);
  const Statistics found = statistics_of(sums, mean, extremes, deviations, s.ddof);
  if (s.statistics && rank == 0) {
    double* out = s.statistics + segment;
    store(out, sums.count);
    store(out + s.segments, sums.sum);
    store(out + 2 * s.segments, found.mean);
    store(out + 3 * s.segments, found.variance);
    store(out + 4 * s.segments, extremes.min);
    store(out + 5 * s.segments, extremes.max);
  }
  if (!s.normalized) return;
  const Normalization n = normalization_of(found, s.mode, s.ddof, s.eps, s.weights.data != nullptr, s.raw_singletons);
  for (Int64 j = rank; j < m.count; j += team) {
    const Member x = member(s, m.first + j);
    write_member(s, x, x.counts ? normalized(n, extremes, x.value) : 0.0, x.counts && !found.constant);
  }
}

// Members of a segment with bad boundaries keep what the launcher wrote, NaN.
FASTPO_KERNEL(segment_stats, FASTPO_ARGUMENT(Segments) s, FASTPO_ARGUMENT(Shape) shape) {
  const int thread = thread_index(), rank = thread % shape.team;
  // members of no segment, which an order has only where an id is out of range
  const Int64 segments = s.boundaries && !s.order && s.normalized ? s.segments + 1 : s.segments;
  for (Int64 segment = block_index() * shape.rows + thread / shape.team; segment < segments;
       segment += block_count() * shape.rows) {
    const Members m = members_of(s, segment);
    if (segment == s.segments) {
      for (Int64 j = rank; j < m.count; j += shape.team) write_member(s, {m.first + j, 0.0, false}, 0.0, false);
    } else if (m.count >= 0) {
      take_segment(s, segment, m, rank, shape.team);
    } else if (s.statistics && rank < 6) {
      store(s.statistics + rank * s.segments + segment, not_a_number<double>());
    }
  }
}

}  // namespace FASTPO_NAMESPACE
