// Statistics of a segment of numbers, and what becomes of its members. CPU and GPU share them.
#pragma once

#include "math.h"

namespace FASTPO_NAMESPACE {

struct Extremes {
  double min, max, second;  // second: the largest but one, equal to max where two members are
};

FASTPO_FN Extremes no_members() { return {infinity<double>(), -infinity<double>(), -infinity<double>()}; }

// NaN stays in both ends, as in torch
FASTPO_FN Extremes merge(const Extremes& a, const Extremes& b) {
  const double lower = minimum(a.max, b.max);
  return {minimum(a.min, b.min), maximum(a.max, b.max), maximum(lower, maximum(a.second, b.second))};
}

struct Sums {
  double count, sum, weight, weighted;
};

FASTPO_FN Sums merge(const Sums& a, const Sums& b) {
  return {a.count + b.count, a.sum + b.sum, a.weight + b.weight, a.weighted + b.weighted};
}

// Of the differences from a first mean, which they correct: a sum of many numbers has the error of all of them.
struct Deviations {
  double sum, squares;
};

FASTPO_FN Deviations merge(const Deviations& a, const Deviations& b) { return {a.sum + b.sum, a.squares + b.squares}; }

struct Statistics {
  Sums sums;
  Extremes extremes;
  double mean, variance;
  bool constant;
};

FASTPO_FN double first_mean(const Sums& s) { return s.count > 0 ? s.sum / s.count : 0.0; }

// A constant segment has exactly its number as mean, and no variance; one with no more members than ddof has none
// either.
FASTPO_FN Statistics statistics_of(const Sums& s, double mean, const Extremes& e, const Deviations& d, int ddof) {
  Statistics out{s, e, 0.0, 0.0, s.count > 0 && e.min == e.max};
  if (out.constant) {
    out.mean = e.min;
  } else if (s.count > 0) {
    out.mean = mean + d.sum / s.count;
    const double squares = d.squares - d.sum * d.sum / s.count;
    // not by max(): NaN stays
    out.variance = s.count > ddof ? (squares < 0 ? 0.0 : squares) / (s.count - ddof) : 0.0;
  }
  return out;
}

// (x - centre) factor, or 0 for every member, or for all but those at the maximum
struct Normalization {
  double centre, factor;
  bool zero, best_alone;
};

FASTPO_FN Normalization normalization_of(const Statistics& s, Normalize mode, int ddof, double eps, bool weighted,
                                         bool raw_singletons) {
  const bool scaled = mode == Normalize::standardize || mode == Normalize::standardized_lead;
  const double n = s.sums.count;
  if (n == 1 && raw_singletons) return {0.0, scaled ? 1 / (1 + eps) : 1.0, false, false};
  Normalization out{s.mean, 1.0, s.constant || n < 2, false};
  // no weight at all leaves nothing to take off, and nothing to learn
  if (weighted) {
    out.zero = out.zero || s.sums.weight == 0;
    out.centre = s.sums.weighted / s.sums.weight;
  }
  if (mode == Normalize::lead || mode == Normalize::standardized_lead) {
    out.best_alone = true;
    out.centre = s.extremes.second;
  }
  if (mode == Normalize::leave_one_out) out.factor = n / (n - 1);
  if (scaled) {
    out.zero = out.zero || n <= ddof;
    out.factor = 1 / (sqrt(s.variance) + eps);
  }
  return out;
}

FASTPO_FN double normalized(const Normalization& n, const Extremes& e, double x) {
  if (n.zero || (n.best_alone && x < e.max)) return 0.0;
  return (x - n.centre) * n.factor;
}

}  // namespace FASTPO_NAMESPACE
