// fastpo::objective and its backward on the CPU. The schemas are in fastpo/kernels/objective.py.
#define FASTPO_NAMESPACE fastpo::host
#include "../formulas/pairwise.h"
#include "tensor.h"

namespace fastpo {
namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

constexpr int formula_count = 0
#define FASTPO_COUNT(name, loss) +1
    FASTPO_PAIRWISE_FORMULAS(FASTPO_COUNT);
#undef FASTPO_COUNT

void check_boundaries(const Tensor& boundaries, int64_t tokens) {
  const int32_t* b = boundaries.const_data_ptr<int32_t>();
  const int64_t n = boundaries.size(0);
  bool ordered = b[0] == 0 && b[n - 1] <= tokens;
  for (int64_t i = 1; ordered && i < n; ++i) ordered = b[i - 1] <= b[i];
  FASTPO_CHECK(ordered, ValueError, "cu_seqlens must rise from 0 to at most ", tokens, ", the number of tokens");
}

// Layout of one side. The mask is made contiguous by the caller and kept alive there.
Layout layout_of(const Tensor& stream, const OptionalTensor& mask, const OptionalTensor& boundaries,
                 const OptionalTensor& lengths) {
  Layout layout;
  if (boundaries) {
    check_boundaries(*boundaries, stream.size(0));
    layout.boundaries = boundaries->const_data_ptr<int32_t>();
  } else if (stream.dim() == 2) {
    layout.tokens = stream.size(1);
  }
  if (mask) {
    STD_TORCH_CHECK(mask->numel() == stream.numel(), "fastpo::objective: a mask has the wrong size");
    layout.mask = mask->const_data_ptr<bool>();
  }
  layout.mask_stride = layout.tokens;
  if (lengths) {
    STD_TORCH_CHECK(lengths->numel() == stream.size(0), "fastpo::objective: lengths have the wrong size");
    layout.lengths = lengths->const_data_ptr();
    layout.lengths_are_int64 = is_int64(*lengths);
  }
  return layout;
}

OptionalTensors all_contiguous(const OptionalTensors& tensors) {
  OptionalTensors out;
  for (const OptionalTensor& t : tensors) out.push_back(as_contiguous(t));
  return out;
}

int64_t row_count(const Tensor& stream, const OptionalTensor& boundaries) {
  return boundaries ? boundaries->size(0) - 1 : stream.size(0);
}

std::tuple<Tensor, Tensor, Tensor> forward(int64_t formula, Tensors streams, OptionalTensors masks,
                                           OptionalTensors cu_seqlens, OptionalTensors lengths,
                                           std::vector<double> hyper, bool length_norm, bool reduce,
                                           std::optional<double> given_denominator) {
  STD_TORCH_CHECK(formula >= 0 && formula < formula_count, "fastpo::objective: there is no formula ", formula);
  STD_TORCH_CHECK(masks.size() == 2 && cu_seqlens.size() == 2 && lengths.size() == 2,
                  "fastpo::objective: a pair has two sides");
  STD_TORCH_CHECK(streams.size() == 2 || streams.size() == 4, "fastpo::objective: two or four streams expected");
  STD_TORCH_CHECK(hyper.size() * sizeof(double) == sizeof(host::Hyper),
                  "fastpo::objective: wrong number of hyper-parameters");
  masks = all_contiguous(masks);
  cu_seqlens = all_contiguous(cu_seqlens);
  lengths = all_contiguous(lengths);
  Objective o{};
  o.formula = static_cast<int>(formula);
  o.streams = static_cast<int>(streams.size());
  o.rows = row_count(streams[0], cu_seqlens[0]);
  o.is_double = false;
  for (size_t i = 0; i < streams.size(); ++i) {
    Tensor& t = streams[i];
    const size_t side = i % 2;
    STD_TORCH_CHECK(row_count(t, cu_seqlens[side]) == o.rows, "fastpo::objective: streams differ in rows");
    STD_TORCH_CHECK(t.numel() == streams[side].numel(), "fastpo::objective: streams of one side differ in size");
    const bool token_level = t.dim() == 2 || cu_seqlens[side];
    // tokens of a row must be adjacent; rows, and summed streams, may have any stride
    if (token_level && t.stride(t.dim() - 1) != 1) t = as_contiguous(t);
    o.stream[i] = {t.const_data_ptr(), dtype_of(t), t.dim() > 0 ? t.stride(0) : 1};
    o.is_double = o.is_double || o.stream[i].dtype == DType::f64;
    if (i < 2) o.layouts[side] = layout_of(t, masks[side], cu_seqlens[side], lengths[side]);
  }
  const ScalarType accumulator = o.is_double ? ScalarType::Double : ScalarType::Float;
  const int64_t blocks = (o.rows + Objective::block - 1) / Objective::block;
  Tensor loss = new_tensor(streams[0], reduce ? std::vector<int64_t>{} : std::vector<int64_t>{o.rows}, accumulator);
  Tensor slopes = new_tensor(streams[0], {2, o.rows}, accumulator);
  Tensor rewards = new_tensor(streams[0], {2, o.rows}, accumulator);
  advise_huge_pages(slopes);
  advise_huge_pages(rewards);
  std::vector<double> block_loss(static_cast<size_t>(blocks));
  o.hyper = hyper.data();
  o.length_norm = length_norm;
  const double denominator = given_denominator.value_or(static_cast<double>(o.rows));
  o.scale = 1 / denominator;
  o.loss = reduce ? nullptr : loss.mutable_data_ptr();
  o.block_loss = block_loss.data();
  o.slopes = slopes.mutable_data_ptr();
  o.rewards = rewards.mutable_data_ptr();
  // a thread is worth waking for about 32k tokens
  const int64_t tokens = o.rows > 0 ? std::max<int64_t>(1, streams[0].numel() / o.rows) : 1;
  const int64_t grain = std::max<int64_t>(1, 32768 / (tokens * Objective::block));
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) { k.objective(o, begin, end); });
  if (reduce) {
    double total = 0;
    for (double x : block_loss) total += x;
    total /= denominator;
    if (o.is_double)
      *loss.mutable_data_ptr<double>() = total;
    else
      *loss.mutable_data_ptr<float>() = static_cast<float>(total);
  }
  return {loss, slopes, rewards};
}

Tensors backward(Tensor grad, Tensor slopes, Tensors streams, OptionalTensors masks, OptionalTensors cu_seqlens,
                 int64_t needed) {
  masks = all_contiguous(masks);
  cu_seqlens = all_contiguous(cu_seqlens);
  grad = as_contiguous(grad);
  slopes = as_contiguous(slopes);
  STD_TORCH_CHECK(grad.scalar_type() == slopes.scalar_type(), "fastpo::objective_backward: wrong dtype");
  STD_TORCH_CHECK(slopes.dim() == 2 && static_cast<size_t>(slopes.size(0)) == streams.size() &&
                      masks.size() == streams.size() && cu_seqlens.size() == streams.size() &&
                      (grad.dim() == 0 || grad.numel() == slopes.size(1)),
                  "fastpo::objective_backward: one row of slopes and one layout per stream expected");
  const Kernels& k = kernels();
  Tensors out;
  for (size_t i = 0; i < streams.size(); ++i) {
    const Tensor& stream = streams[i];
    const bool wanted = needed >> i & 1;
    Tensor gradient = new_tensor(stream, wanted ? shape_of(stream) : std::vector<int64_t>{0}, stream.scalar_type());
    out.push_back(gradient);
    if (!wanted) continue;
    STD_TORCH_CHECK(row_count(stream, cu_seqlens[i]) == slopes.size(1),
                    "fastpo::objective_backward: a stream has not as many rows as the slopes");
    advise_huge_pages(gradient);
    Spread s{};
    s.layout = layout_of(stream, masks[i], cu_seqlens[i], std::nullopt);
    s.dtype = dtype_of(stream);
    s.is_double = slopes.scalar_type() == ScalarType::Double;
    s.rows = slopes.size(1);
    s.grad = grad.const_data_ptr();
    s.grad_per_row = grad.dim() == 1;
    s.slopes =
        static_cast<const char*>(slopes.const_data_ptr()) + static_cast<int64_t>(i) * s.rows * (s.is_double ? 8 : 4);
    s.gradient = gradient.mutable_data_ptr();
    // tokens behind the last sequence
    if (s.layout.boundaries && s.layout.boundaries[s.rows] < stream.size(0)) torch::stable::zero_(gradient);
    const int64_t tokens = s.rows > 0 ? std::max<int64_t>(1, stream.numel() / s.rows) : 1;
    torch::stable::parallel_for(0, s.rows, std::max<int64_t>(1, 32768 / tokens),
                                [&](int64_t begin, int64_t end) { k.spread(s, begin, end); });
  }
  return out;
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) {
  m.impl("objective", TORCH_BOX(&fastpo::forward));
  m.impl("objective_backward", TORCH_BOX(&fastpo::backward));
}

#define FASTPO_EXPORT extern "C" __attribute__((visibility("default")))

// names of the formulas and of their hyper-parameters, in the order of their numbers
FASTPO_EXPORT const char* fastpo_formulas() {
#define FASTPO_NAME(name, loss) "," #name
  return &(FASTPO_PAIRWISE_FORMULAS(FASTPO_NAME))[1];
#undef FASTPO_NAME
}

FASTPO_EXPORT const char* fastpo_hyper_parameters() {
#define FASTPO_NAME(name) "," #name
  return &(FASTPO_HYPER_PARAMETERS(FASTPO_NAME))[1];
#undef FASTPO_NAME
}
