// fastpo::objective and its backward on the CPU. The schemas are in fastpo/kernels/objective.py.
#include "objective.h"

namespace fastpo {
namespace {

void check_boundaries(const Tensor& boundaries, int64_t tokens) {
  const int32_t* b = boundaries.const_data_ptr<int32_t>();
  const int64_t n = boundaries.size(0);
  bool ordered = b[0] == 0 && b[n - 1] <= tokens;
  for (int64_t i = 1; ordered && i < n; ++i) ordered = b[i - 1] <= b[i];
  FASTPO_CHECK(ordered, ValueError, "cu_seqlens must rise from 0 to at most ", tokens, ", the number of tokens");
}

std::tuple<Tensor, Tensor, Tensor> forward(int64_t formula, Tensors streams, OptionalTensors masks,
                                           OptionalTensors cu_seqlens, OptionalTensors lengths, Tensors columns,
                                           std::vector<double> hyper, int64_t use_lengths, bool reduce,
                                           std::optional<double> denominator) {
  PreparedObjective p = prepare_objective(formula, std::move(streams), masks, cu_seqlens, lengths, std::move(columns),
                                          hyper, use_lengths, reduce, denominator);
  for (size_t side = 0; side < p.cu_seqlens.size(); ++side)
    if (p.cu_seqlens[side]) check_boundaries(*p.cu_seqlens[side], p.streams[side].size(0));
  Objective& o = p.arguments;
  advise_huge_pages(p.slopes);
  advise_huge_pages(p.rewards);
  // a thread is worth waking for about 32k tokens
  constexpr int64_t worth = 32768;
  const int64_t block_rows =
      std::clamp<int64_t>(worth / p.tokens / objective_lanes * objective_lanes, objective_lanes, objective_block);
  const int64_t blocks = (o.rows + block_rows - 1) / block_rows;
  std::vector<double> block_loss(static_cast<size_t>(blocks));
  o.block_loss = block_loss.data();
  const int64_t grain = std::max<int64_t>(1, worth / (p.tokens * block_rows));
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, blocks, grain,
                              [&](int64_t begin, int64_t end) { k.objective(o, block_rows, begin, end); });
  if (reduce) {
    double total = 0;
    for (double x : block_loss) total += x;
    total /= p.denominator;
    if (o.is_double)
      *p.loss.mutable_data_ptr<double>() = total;
    else
      *p.loss.mutable_data_ptr<float>() = static_cast<float>(total);
  }
  return {p.loss, p.slopes, p.rewards};
}

Tensors backward(Tensor grad, Tensor slopes, Tensors streams, OptionalTensors masks, OptionalTensors cu_seqlens,
                 int64_t needed) {
  check_spread(grad, slopes, streams, masks, cu_seqlens);
  const Kernels& k = kernels();
  std::vector<PreparedSpread> wanted;
  Tensors out;
  int64_t tokens = 1;
  for (size_t i = 0; i < streams.size(); ++i) {
    const Tensor& stream = streams[i];
    if (!(needed >> i & 1)) {
      out.push_back(new_tensor(stream, {0}, stream.scalar_type()));
      continue;
    }
    wanted.push_back(prepare_spread(grad, slopes, stream, static_cast<int64_t>(i), masks[i], cu_seqlens[i]));
    PreparedSpread& p = wanted.back();
    const Spread& s = p.arguments;
    if (p.boundaries) {
      check_boundaries(*p.boundaries, stream.size(0));
      // tokens behind the last sequence
      if (s.layout.boundaries[s.rows] < stream.size(0)) torch::stable::zero_(p.gradient);
    }
    advise_huge_pages(p.gradient);
    if (s.rows > 0) tokens = std::max(tokens, stream.numel() / s.rows);
    out.push_back(p.gradient);
  }
  // the streams' rows one behind the other: threads are woken once
  const int64_t rows = slopes.size(1), all = static_cast<int64_t>(wanted.size()) * rows;
  torch::stable::parallel_for(0, all, std::max<int64_t>(1, 32768 / tokens), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t stream = row / rows, last = std::min(end, (stream + 1) * rows);
      k.spread(wanted[static_cast<size_t>(stream)].arguments, row - stream * rows, last - stream * rows);
      row = last;
    }
  });
  return out;
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) {
  m.impl("objective", TORCH_BOX(&fastpo::forward));
  m.impl("objective_backward", TORCH_BOX(&fastpo::backward));
}

// names of the formulas on pairs and on single completions, and of their hyper-parameters, in the order of their
// numbers
FASTPO_EXPORT const char* fastpo_formulas() {
#define FASTPO_NAME(name, loss) "," #name
  return &(FASTPO_PAIRWISE_FORMULAS(FASTPO_NAME))[1];
#undef FASTPO_NAME
}

FASTPO_EXPORT const char* fastpo_unpaired_formulas() {
#define FASTPO_NAME(name, loss) "," #name
  return &(FASTPO_UNPAIRED_FORMULAS(FASTPO_NAME))[1];
#undef FASTPO_NAME
}

FASTPO_EXPORT const char* fastpo_hyper_parameters() {
#define FASTPO_NAME(name) "," #name
  return &(FASTPO_HYPER_PARAMETERS(FASTPO_NAME))[1];
#undef FASTPO_NAME
}
