// What the op fastpo::policy_objective does on every device before its kernel runs: checks, layout, outputs.
#pragma once

#define FASTPO_NAMESPACE fastpo::host
#include "../formulas/policy.h"
#include "tensor.h"

namespace fastpo {

#define FASTPO_COUNT(...) +1
constexpr int policy_formula_count = 0 FASTPO_POLICY_FORMULAS(FASTPO_COUNT);
#undef FASTPO_COUNT
static_assert(sizeof(host::PolicyNumbers) <= sizeof(PolicyObjective::numbers));
static_assert(sizeof(host::PolicyChoices) <= sizeof(PolicyObjective::choices));

struct PreparedPolicy {
  PolicyObjective arguments;
  Tensor slopes, entropy_slopes;
  ScalarType accumulator;
  // keep the storage alive
  std::vector<OptionalTensor> kept;
};

inline PreparedPolicy prepare_policy(int64_t formula, const Tensor& logprobs, const OptionalTensor& old,
                                     const OptionalTensor& reference, const OptionalTensor& rollout,
                                     const OptionalTensor& entropy, const Tensor& advantages, bool per_row,
                                     const OptionalTensor& mask, const OptionalTensor& selected,
                                     const OptionalTensor& cu_seqlens, const std::vector<double>& numbers,
                                     const std::vector<int64_t>& choices, bool use_threshold, bool entropy_gradient) {
  STD_TORCH_CHECK(formula >= 0 && formula < policy_formula_count, "fastpo::policy_objective: there is no formula ",
                  formula);
  STD_TORCH_CHECK(numbers.size() * sizeof(double) == sizeof(host::PolicyNumbers) &&
                      choices.size() * sizeof(int) == sizeof(host::PolicyChoices),
                  "fastpo::policy_objective: wrong number of numbers or choices");
  PreparedPolicy p{};
  PolicyObjective& o = p.arguments;
  const OptionalTensor boundaries = as_contiguous(cu_seqlens);
  p.kept.push_back(boundaries);
  STD_TORCH_CHECK(logprobs.dim() == (boundaries ? 1 : 2), "fastpo::policy_objective: log-probs per token expected");
  o.rows = boundaries ? boundaries->size(0) - 1 : logprobs.size(0);
  o.layout.tokens = boundaries ? 1 : logprobs.size(1);
  o.layout.mask_stride = o.layout.tokens;
  o.layout.total = logprobs.numel();
  if (boundaries) o.layout.boundaries = boundaries->const_data_ptr<int32_t>();
  const auto take = [&](const OptionalTensor& given, bool of_rows) -> Stream {
    if (!given) return {};
    STD_TORCH_CHECK(given->numel() == (of_rows ? o.rows : logprobs.numel()),
                    "fastpo::policy_objective: streams differ in size");
    // the tokens of a row must be adjacent
    const bool strided = !of_rows && given->numel() > 0 && given->stride(given->dim() - 1) != 1;
    p.kept.push_back(strided ? as_contiguous(*given) : *given);
    const Tensor& t = *p.kept.back();
    o.is_double = o.is_double || (!of_rows && dtype_of(t) == DType::f64);
    return {t.const_data_ptr(), t.stride(0), dtype_of(t)};
  };
  o.advantage_per_row = per_row;
  o.logprobs = take(logprobs, false);
  o.old = take(old, false);
  o.reference = take(reference, false);
  o.rollout = take(rollout, false);
  o.entropy = take(entropy, false);
  o.advantages = take(advantages, o.advantage_per_row);
  const auto take_mask = [&](const OptionalTensor& given) -> const bool* {
    if (!given) return nullptr;
    STD_TORCH_CHECK(given->numel() == logprobs.numel(), "fastpo::policy_objective: a mask has the wrong size");
    p.kept.push_back(as_contiguous(*given));
    return p.kept.back()->const_data_ptr<bool>();
  };
  o.layout.mask = take_mask(mask);
  o.selected = take_mask(selected);
  o.formula = static_cast<int>(formula);
  o.use_threshold = use_threshold;
  std::copy(numbers.begin(), numbers.end(), o.numbers);
  std::copy(choices.begin(), choices.end(), o.choices);
  p.accumulator = o.is_double ? ScalarType::Double : ScalarType::Float;
  p.slopes = new_tensor(logprobs, shape_of(logprobs), p.accumulator);
  p.entropy_slopes =
      new_tensor(logprobs, entropy_gradient ? shape_of(logprobs) : std::vector<int64_t>{0}, p.accumulator);
  o.slopes = p.slopes.mutable_data_ptr();
  o.entropy_slopes = entropy_gradient ? p.entropy_slopes.mutable_data_ptr() : nullptr;
  return p;
}

}  // namespace fastpo
