// fastpo::objective and its backward on CUDA devices. The schemas are in fastpo/kernels/objective.py.
#include "../objective.h"

#include "../../cuda/launch.h"
#include "device.h"

namespace fastpo {
namespace {

void check_launch(const char* error) { STD_TORCH_CHECK(!error, "fastpo::objective: ", error); }

std::tuple<Tensor, Tensor, Tensor> forward(int64_t formula, Tensors streams, OptionalTensors masks,
                                           OptionalTensors cu_seqlens, OptionalTensors lengths, Tensors columns,
                                           std::vector<double> hyper, int64_t use_lengths, bool reduce,
                                           std::optional<double> denominator) {
  STD_TORCH_CHECK(!streams.empty(), "fastpo::objective: one to three streams per side expected");
  const OnDevice device(streams[0]);
  PreparedObjective p = prepare_objective(formula, std::move(streams), masks, cu_seqlens, lengths, std::move(columns),
                                          hyper, use_lengths, reduce, denominator);
  Objective& o = p.arguments;
  OptionalTensor block_loss;
  if (reduce) {
    block_loss =
        new_tensor(p.streams[0], {gpu::objective_blocks(o.rows, p.tokens, o.sides * o.models)}, ScalarType::Double);
    o.block_loss = block_loss->mutable_data_ptr<double>();
  }
  if (reduce || o.rows > 0)
    check_launch(
        gpu::objective(o, p.tokens, p.denominator, reduce ? p.loss.mutable_data_ptr() : nullptr, device.stream()));
  return {p.loss, p.slopes, p.rewards};
}

Tensors backward(Tensor grad, Tensor slopes, Tensors streams, OptionalTensors masks, OptionalTensors cu_seqlens,
                 int64_t needed) {
  check_spread(grad, slopes, streams, masks, cu_seqlens);
  STD_TORCH_CHECK(streams.size() <= max_sides, "fastpo::objective_backward: a pair has two sides");
  const OnDevice device(slopes);
  Tensors out;
  std::vector<PreparedSpread> prepared;
  std::vector<Spread> sides;
  for (size_t i = 0; i < streams.size(); ++i) {
    const Tensor& stream = streams[i];
    if (needed >> i & 1) {
      prepared.push_back(prepare_spread(grad, slopes, stream, static_cast<int64_t>(i), masks[i], cu_seqlens[i]));
      sides.push_back(prepared.back().arguments);
      Tensor gradient = prepared.back().gradient;
      // tokens that no sequence has
      if (cu_seqlens[i]) torch::stable::zero_(gradient);
      out.push_back(gradient);
    } else {
      out.push_back(new_tensor(stream, {0}, stream.scalar_type()));
    }
  }
  const int64_t tokens = tokens_per_row(streams, slopes.size(1));
  if (!sides.empty())
    check_launch(gpu::objective_spread(sides.data(), static_cast<int>(sides.size()), tokens, device.stream()));
  return out;
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(FASTPO_CUDA_LIBRARY, FASTPO_CUDA_KEY, m) {
  m.impl("objective", TORCH_BOX(&fastpo::forward));
  m.impl("objective_backward", TORCH_BOX(&fastpo::backward));
}
