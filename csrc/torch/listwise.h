// What the op fastpo::listwise does on every device before its kernel runs: checks, layout, outputs.
#pragma once

#define FASTPO_NAMESPACE fastpo::host
#include "../formulas/listwise.h"
#include "tensor.h"

namespace fastpo {

struct PreparedLists {
  Listwise arguments;
  Tensor loss, slopes, scores;
  double denominator;
  // keep the storage alive
  std::vector<Tensor> kept;
};

inline PreparedLists prepare_lists(int64_t kind, const Tensor& policy, const OptionalTensor& other,
                                   const Tensor& targets, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                   const std::vector<double>& numbers, bool pair_mean, bool reduce,
                                   std::optional<double> denominator) {
  STD_TORCH_CHECK(kind >= 0 && kind < static_cast<int64_t>(host::ListKind::count),
                  "fastpo::listwise: there is no objective ", kind);
  STD_TORCH_CHECK(numbers.size() == 3, "fastpo::listwise: three numbers expected");
  STD_TORCH_CHECK(policy.dim() == (cu_seqlens ? 1 : 2), "fastpo::listwise: (B, K), or (N,) with cu_seqlens, expected");
  PreparedLists p{};
  Listwise& o = p.arguments;
  const auto take = [&](const Tensor& given) -> const Tensor& {
    p.kept.push_back(as_contiguous(given));
    return p.kept.back();
  };
  const auto take_numbers = [&](const Tensor& given) -> Numbers {
    STD_TORCH_CHECK(given.numel() == policy.numel(), "fastpo::listwise: tensors differ in size");
    const Tensor& t = take(given);
    return {t.const_data_ptr(), dtype_of(t)};
  };
  p.kept.reserve(5);
  o.policy = take_numbers(policy);
  if (other) o.other = take_numbers(*other);
  o.targets = take_numbers(targets);
  if (mask) {
    STD_TORCH_CHECK(mask->numel() == policy.numel(), "fastpo::listwise: the mask has the wrong size");
    o.mask = take(*mask).const_data_ptr<bool>();
  }
  if (cu_seqlens) o.boundaries = take(*cu_seqlens).const_data_ptr<int32_t>();
  o.lists = cu_seqlens ? cu_seqlens->size(0) - 1 : policy.size(0);
  o.items = cu_seqlens ? 0 : policy.size(1);
  o.total = policy.numel();
  STD_TORCH_CHECK(o.items <= max_list, "fastpo::listwise: lists of at most ", max_list, " items expected");
  o.scale = numbers[0];
  o.target_scale = numbers[1];
  o.weight = numbers[2];
  p.denominator = denominator ? *denominator : static_cast<double>(o.lists);
  o.factor = 1 / p.denominator;
  o.pair_mean = pair_mean;
  o.is_double = o.policy.dtype == DType::f64 || (other && o.other.dtype == DType::f64);
  o.kind = static_cast<int>(kind);
  const ScalarType accumulator = o.is_double ? ScalarType::Double : ScalarType::Float;
  p.loss = new_tensor(policy, reduce ? std::vector<int64_t>{} : std::vector<int64_t>{o.lists}, accumulator);
  p.slopes = new_tensor(policy, shape_of(policy), accumulator);
  p.scores = new_tensor(policy, shape_of(policy), accumulator);
  o.slopes = p.slopes.mutable_data_ptr();
  o.scores = p.scores.mutable_data_ptr();
  return p;
}

}  // namespace fastpo
