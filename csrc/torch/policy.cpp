// fastpo::policy_objective on the CPU. The schema is in fastpo/kernels/policy.py.
#include "policy.h"

namespace fastpo {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(int64_t formula, Tensor logprobs, OptionalTensor old,
                                                           OptionalTensor reference, OptionalTensor rollout,
                                                           OptionalTensor entropy, Tensor advantages, bool per_row,
                                                           OptionalTensor mask, OptionalTensor selected,
                                                           OptionalTensor cu_seqlens, std::vector<double> numbers,
                                                           std::vector<int64_t> choices, bool use_threshold,
                                                           bool entropy_gradient, bool reduce) {
  PreparedPolicy p = prepare_policy(formula, logprobs, old, reference, rollout, entropy, advantages, per_row, mask,
                                    selected, cu_seqlens, numbers, choices, use_threshold, entropy_gradient);
  PolicyObjective& o = p.arguments;
  if (const int* b = o.layout.boundaries) {
    bool ordered = b[0] == 0 && b[o.rows] <= o.layout.total;
    for (int64_t i = 0; ordered && i < o.rows; ++i) ordered = b[i] <= b[i + 1];
    FASTPO_CHECK(ordered, ValueError, "cu_seqlens must rise from 0 to at most ", o.layout.total,
                 ", the number of tokens");
    // tokens behind the last sequence
    if (b[o.rows] < o.layout.total) {
      torch::stable::zero_(p.slopes);
      torch::stable::zero_(p.entropy_slopes);
    }
  }
  advise_huge_pages(p.slopes);
  constexpr int sums = host::sums::count, maxima = host::maxima::count;
  const auto rows = static_cast<size_t>(o.rows);
  std::vector<double> row_loss(rows), row_sums(rows * sums), row_maxima(rows * maxima);
  o.row_loss = row_loss.data();
  o.row_sums = row_sums.data();
  o.row_maxima = row_maxima.data();
  const Kernels& k = kernels();
  // a thread is worth waking for about 8k tokens
  const int64_t tokens = std::max<int64_t>(1, o.layout.total / std::max<int64_t>(1, o.rows));
  torch::stable::parallel_for(0, o.rows, std::max<int64_t>(1, 8192 / tokens),
                              [&](int64_t begin, int64_t end) { k.policy_objective(o, begin, end); });

  Tensor loss = new_tensor(logprobs, reduce ? std::vector<int64_t>{} : std::vector<int64_t>{o.rows}, p.accumulator);
  const auto put = [&](int64_t i, double value) {
    if (o.is_double)
      static_cast<double*>(loss.mutable_data_ptr())[i] = value;
    else
      static_cast<float*>(loss.mutable_data_ptr())[i] = static_cast<float>(value);
  };
  double total = 0;
  for (int64_t row = 0; row < o.rows; ++row) {
    total += row_loss[static_cast<size_t>(row)];
    if (!reduce) put(row, row_loss[static_cast<size_t>(row)]);
  }
  if (reduce) put(0, total);
  Tensor all_sums = new_tensor(logprobs, {sums}, ScalarType::Double);
  Tensor all_maxima = new_tensor(logprobs, {maxima}, ScalarType::Double);
  double* s = static_cast<double*>(all_sums.mutable_data_ptr());
  double* m = static_cast<double*>(all_maxima.mutable_data_ptr());
  std::fill(s, s + sums, 0.0);
  std::fill(m, m + maxima, -std::numeric_limits<double>::infinity());
  for (size_t row = 0; row < rows; ++row) {
    for (int i = 0; i < sums; ++i) s[i] += row_sums[row * sums + static_cast<size_t>(i)];
    for (int i = 0; i < maxima; ++i) m[i] = std::max(m[i], row_maxima[row * maxima + static_cast<size_t>(i)]);
  }
  return {loss, p.slopes, p.entropy_slopes, all_sums, all_maxima};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) { m.impl("policy_objective", TORCH_BOX(&fastpo::forward)); }

#define FASTPO_NAME(name, ...) "," #name

// names of the formulas, their numbers and choices, and of the metrics, in the order of their places
FASTPO_EXPORT const char* fastpo_policy_formulas() { return &(FASTPO_POLICY_FORMULAS(FASTPO_NAME))[1]; }
FASTPO_EXPORT const char* fastpo_policy_numbers() { return &(FASTPO_POLICY_NUMBERS(FASTPO_NAME))[1]; }
FASTPO_EXPORT const char* fastpo_policy_choices() { return &(FASTPO_POLICY_CHOICES(FASTPO_NAME))[1]; }
FASTPO_EXPORT const char* fastpo_policy_sums() { return &(FASTPO_POLICY_SUMS(FASTPO_NAME))[1]; }
FASTPO_EXPORT const char* fastpo_policy_maxima() { return &(FASTPO_POLICY_MAXIMA(FASTPO_NAME))[1]; }
