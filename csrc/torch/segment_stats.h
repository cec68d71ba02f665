// What the op segment_stats does on every device before its kernel runs: checks, layouts, outputs.
#pragma once

#include "tensor.h"

namespace fastpo {

struct PreparedSegments {
  Segments arguments{};
  Tensor statistics, normalized, informative;
  // keep the storage alive
  Tensor values;
  OptionalTensor weights, mask, order, boundaries;
};

inline PreparedSegments prepare_segments(const Tensor& values, const OptionalTensor& weights,
                                         const OptionalTensor& mask, const OptionalTensor& order,
                                         const OptionalTensor& boundaries, int64_t mode, int64_t ddof, double eps,
                                         bool skip_nan, bool raw_singletons, int64_t wanted) {
  STD_TORCH_CHECK(boundaries ? values.dim() == 1 : values.dim() == 2,
                  "fastpo::segment_stats: (S, N), or (N,) with boundaries, expected");
  STD_TORCH_CHECK(mode >= 0 && mode <= static_cast<int64_t>(Normalize::standardized_lead),
                  "fastpo::segment_stats: there is no mode ", mode);
  PreparedSegments p{};
  p.values = as_contiguous(values);
  p.mask = as_contiguous(mask);
  p.order = as_contiguous(order);
  p.boundaries = as_contiguous(boundaries);
  Segments& s = p.arguments;
  s.values = {p.values.const_data_ptr(), dtype_of(p.values)};
  s.is_double = s.values.dtype == DType::f64;
  const ScalarType accumulator = s.is_double ? ScalarType::Double : ScalarType::Float;
  if (weights) {
    p.weights = as_contiguous(torch::stable::to(*weights, ScalarType::Double));
    s.weights = {p.weights->const_data_ptr(), DType::f64};
  }
  for (const OptionalTensor* t : {&p.weights, &p.mask, &p.order})
    STD_TORCH_CHECK(!*t || (*t)->numel() == values.numel(), "fastpo::segment_stats: a tensor has the wrong size");
  STD_TORCH_CHECK(!boundaries || boundaries->scalar_type() == ScalarType::Long,
                  "fastpo::segment_stats: int64 boundaries expected");
  s.mask = static_cast<const bool*>(data_or_null(p.mask));
  s.order = static_cast<const Int64*>(data_or_null(p.order));
  s.boundaries = static_cast<const Int64*>(data_or_null(p.boundaries));
  s.segments = boundaries ? boundaries->size(0) - 1 : values.size(0);
  s.members = boundaries ? 0 : values.size(1);
  s.total = values.numel();
  s.mode = static_cast<Normalize>(mode);
  s.ddof = static_cast<int>(ddof);
  s.eps = eps;
  s.skip_nan = skip_nan;
  s.raw_singletons = raw_singletons;
  const auto output = [&](int bit, std::vector<int64_t> shape, ScalarType dtype, void** pointer) {
    Tensor t = new_tensor(values, wanted >> bit & 1 ? shape : std::vector<int64_t>{0}, dtype);
    *pointer = wanted >> bit & 1 ? t.mutable_data_ptr() : nullptr;
    return t;
  };
  void *statistics = nullptr, *informative = nullptr;
  p.statistics = output(0, {6, s.segments}, ScalarType::Double, &statistics);
  p.normalized = output(1, shape_of(values), accumulator, &s.normalized);
  p.informative = output(2, shape_of(values), ScalarType::Bool, &informative);
  s.statistics = static_cast<double*>(statistics);
  s.informative = static_cast<bool*>(informative);
  return p;
}

}  // namespace fastpo
