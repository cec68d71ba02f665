// What the ops affine_scan and advantages do on every device before their kernel runs: checks, layouts, outputs.
#pragma once

#include "tensor.h"

namespace fastpo {

struct PreparedScan {
  Scan arguments{};
  Tensor out[2], last, initial;
  // keep the storage alive
  std::vector<Tensor> inputs;

  // null without a tensor; each has `numel` elements
  const void* take(const OptionalTensor& given, int64_t numel) {
    if (!given) return nullptr;
    STD_TORCH_CHECK(given->numel() == numel, "fastpo::affine_scan: a tensor has the wrong size");
    inputs.push_back(as_contiguous(*given));
    return inputs.back().const_data_ptr();
  }

  Numbers numbers(const OptionalTensor& given, int64_t numel) {
    if (!given) return {nullptr, DType::f32};
    return {take(given, numel), dtype_of(*given)};
  }
};

// `tokens` stand in the order of Scan::stream, the first of them is there
inline PreparedScan prepare_scan(ScanKind kind, const std::vector<OptionalTensor>& tokens, const OptionalTensor& mask,
                                 const OptionalTensor& cu_seqlens, const OptionalTensor& initial, bool reverse) {
  PreparedScan p;
  Scan& s = p.arguments;
  const Tensor& like = *tokens[0];
  STD_TORCH_CHECK(like.dim() == (cu_seqlens ? 1 : 2), "fastpo::affine_scan: (B, T), or (N,) with boundaries, expected");
  s.kind = kind;
  s.reverse = reverse;
  s.total = like.numel();
  s.rows = cu_seqlens ? cu_seqlens->size(0) - 1 : like.size(0);
  s.tokens = cu_seqlens ? 0 : like.size(1);
  s.chunks = 1;
  s.boundaries = static_cast<const int*>(cu_seqlens ? p.take(cu_seqlens, s.rows + 1) : nullptr);
  for (size_t i = 0; i < tokens.size(); ++i) {
    s.stream[i] = p.numbers(tokens[i], s.total);
    s.is_double = s.is_double || (tokens[i] && s.stream[i].dtype == DType::f64);
  }
  s.mask = static_cast<const bool*>(p.take(mask, s.total));
  s.initial = p.numbers(initial, s.rows);
  if (initial) p.initial = p.inputs.back();
  s.is_double = s.is_double || (initial && s.initial.dtype == DType::f64);
  return p;
}

inline ScalarType scan_dtype(const PreparedScan& p) {
  return p.arguments.is_double ? ScalarType::Double : ScalarType::Float;
}

// an output of the shape of the tokens
inline void add_output(PreparedScan& p, int which, const Tensor& like, bool wanted) {
  p.out[which] = new_tensor(like, wanted ? shape_of(like) : std::vector<int64_t>{0}, scan_dtype(p));
  p.arguments.out[which] = wanted ? p.out[which].mutable_data_ptr() : nullptr;
}

// x after the last step, per row
inline void add_last(PreparedScan& p, const Tensor& like) {
  p.last = new_tensor(like, {p.arguments.rows}, scan_dtype(p));
  p.arguments.last = p.last.mutable_data_ptr();
}

inline PreparedScan prepare_affine(const Tensor& a, const Tensor& b, const OptionalTensor& initial,
                                   const OptionalTensor& mask, const OptionalTensor& cu_seqlens, bool reverse,
                                   bool keep) {
  PreparedScan p = prepare_scan(ScanKind::affine, {a, b}, mask, cu_seqlens, initial, reverse);
  add_output(p, 0, a, true);
  add_output(p, 1, a, keep);
  return p;
}

inline PreparedScan prepare_adjoint(const Tensor& grad, const Tensor& a, const Tensor& before,
                                    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, bool reverse) {
  PreparedScan p = prepare_scan(ScanKind::adjoint, {a, grad, before}, mask, cu_seqlens, std::nullopt, !reverse);
  add_output(p, 0, a, true);
  add_output(p, 1, a, true);
  add_last(p, a);
  return p;
}

inline PreparedScan prepare_advantages(const Tensor& rewards, const OptionalTensor& values,
                                       const OptionalTensor& next_values, const OptionalTensor& log_ratios,
                                       const OptionalTensor& terminated, const OptionalTensor& truncated,
                                       const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                       const OptionalTensor& bootstrap, const OptionalTensor& repeat, double gamma,
                                       double lambda, double rho_bar, double c_bar, bool skip) {
  PreparedScan p =
      prepare_scan(ScanKind::advantage, {rewards, values, next_values, log_ratios}, mask, cu_seqlens, bootstrap, true);
  Scan& s = p.arguments;
  s.terminated = static_cast<const bool*>(p.take(terminated, s.total));
  s.truncated = static_cast<const bool*>(p.take(truncated, s.total));
  s.repeat = static_cast<const bool*>(p.take(repeat, s.rows));
  s.gamma = gamma;
  s.lambda = lambda;
  s.rho_bar = rho_bar;
  s.c_bar = c_bar;
  s.holes = !skip;
  add_output(p, 0, rewards, true);
  add_output(p, 1, rewards, true);
  return p;
}

}  // namespace fastpo
