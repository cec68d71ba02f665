// fastpo::policy_objective on CUDA devices. The schema is in fastpo/kernels/policy.py.
#include "../policy.h"

#include "../../cuda/launch.h"
#include "device.h"

namespace fastpo {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(int64_t formula, Tensor logprobs, OptionalTensor old,
                                                           OptionalTensor reference, OptionalTensor rollout,
                                                           OptionalTensor entropy, Tensor advantages, bool per_row,
                                                           OptionalTensor mask, OptionalTensor selected,
                                                           OptionalTensor cu_seqlens, std::vector<double> numbers,
                                                           std::vector<int64_t> choices, bool use_threshold,
                                                           bool entropy_gradient, bool reduce) {
  const OnDevice device(logprobs);
  PreparedPolicy p = prepare_policy(formula, logprobs, old, reference, rollout, entropy, advantages, per_row, mask,
                                    selected, cu_seqlens, numbers, choices, use_threshold, entropy_gradient);
  PolicyObjective& o = p.arguments;
  if (cu_seqlens) {
    // tokens that no sequence has
    torch::stable::zero_(p.slopes);
    torch::stable::zero_(p.entropy_slopes);
  }
  constexpr int sums = host::sums::count, maxima = host::maxima::count;
  Tensor rows = new_tensor(logprobs, {o.rows * (1 + sums + maxima)}, ScalarType::Double);
  o.row_loss = rows.mutable_data_ptr<double>();
  o.row_sums = o.row_loss + o.rows;
  o.row_maxima = o.row_sums + o.rows * sums;
  Tensor loss = new_tensor(logprobs, reduce ? std::vector<int64_t>{} : std::vector<int64_t>{o.rows}, p.accumulator);
  Tensor all_sums = new_tensor(logprobs, {sums}, ScalarType::Double);
  Tensor all_maxima = new_tensor(logprobs, {maxima}, ScalarType::Double);
  const char* error = gpu::policy_objective(o, reduce, loss.mutable_data_ptr(), all_sums.mutable_data_ptr<double>(),
                                            all_maxima.mutable_data_ptr<double>(), device.stream());
  STD_TORCH_CHECK(!error, "fastpo::policy_objective: ", error);
  return {loss, p.slopes, p.entropy_slopes, all_sums, all_maxima};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(FASTPO_CUDA_LIBRARY, FASTPO_CUDA_KEY, m) {
  m.impl("policy_objective", TORCH_BOX(&fastpo::forward));
}
