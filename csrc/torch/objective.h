// What the op fastpo::objective does on every device before its kernel runs: checks, layouts, outputs.
#pragma once

#define FASTPO_NAMESPACE fastpo::host
#include "../formulas/pairwise.h"
#include "../formulas/unpaired.h"
#include "tensor.h"

namespace fastpo {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

#define FASTPO_COUNT(name, loss) +1
// by the number of sides
constexpr int formula_count[] = {0, 0 FASTPO_UNPAIRED_FORMULAS(FASTPO_COUNT), 0 FASTPO_PAIRWISE_FORMULAS(FASTPO_COUNT)};
#undef FASTPO_COUNT
static_assert(sizeof(host::Hyper) <= sizeof(Objective::hyper));
static_assert(max_given == host::max_columns);

// Layout of one side. The mask is made contiguous by the caller and kept alive there.
inline Layout layout_of(const Tensor& stream, const OptionalTensor& mask, const OptionalTensor& boundaries,
                        const OptionalTensor& lengths) {
  Layout layout{};
  layout.tokens = 1;
  layout.total = stream.numel();
  if (boundaries)
    layout.boundaries = boundaries->const_data_ptr<int32_t>();
  else if (stream.dim() == 2)
    layout.tokens = stream.size(1);
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

inline OptionalTensors all_contiguous(const OptionalTensors& tensors) {
  OptionalTensors out;
  for (const OptionalTensor& t : tensors) out.push_back(as_contiguous(t));
  return out;
}

inline int64_t row_count(const Tensor& stream, const OptionalTensor& boundaries) {
  return boundaries ? boundaries->size(0) - 1 : stream.size(0);
}

// of the stream with most tokens, on average, at least one: what a device can know without reading boundaries
inline int64_t tokens_per_row(const Tensors& streams, int64_t rows) {
  int64_t tokens = 1;
  for (const Tensor& t : streams) tokens = std::max(tokens, t.numel() / std::max<int64_t>(1, rows));
  return tokens;
}

struct PreparedObjective {
  Objective arguments;
  Tensor loss, slopes, rewards;
  double denominator;
  int64_t tokens;
  // keep the storage alive
  Tensors streams;
  OptionalTensors masks, cu_seqlens, lengths;
  Tensors columns;
};

inline PreparedObjective prepare_objective(int64_t formula, Tensors streams, const OptionalTensors& masks,
                                           const OptionalTensors& cu_seqlens, const OptionalTensors& lengths,
                                           Tensors columns, const std::vector<double>& hyper, int64_t use_lengths,
                                           bool reduce, std::optional<double> denominator) {
  const size_t sides = masks.size();
  STD_TORCH_CHECK(sides >= 1 && sides <= max_sides && cu_seqlens.size() == sides && lengths.size() == sides,
                  "fastpo::objective: one or two sides expected");
  STD_TORCH_CHECK(formula >= 0 && formula < formula_count[sides], "fastpo::objective: there is no formula ", formula);
  STD_TORCH_CHECK(!streams.empty() && streams.size() % sides == 0 && streams.size() <= sides * max_models,
                  "fastpo::objective: one to ", max_models, " streams per side expected");
  STD_TORCH_CHECK(columns.size() <= max_given, "fastpo::objective: at most ", max_given, " columns expected");
  STD_TORCH_CHECK(hyper.size() * sizeof(double) == sizeof(host::Hyper),
                  "fastpo::objective: wrong number of hyper-parameters");
  Objective o{};
  OptionalTensors m = all_contiguous(masks), c = all_contiguous(cu_seqlens), l = all_contiguous(lengths);
  o.formula = static_cast<int>(formula);
  o.sides = static_cast<int>(sides);
  o.models = static_cast<int>(streams.size() / sides);
  o.columns = static_cast<int>(columns.size());
  o.rows = row_count(streams[0], c[0]);
  for (size_t i = 0; i < streams.size(); ++i) {
    Tensor& t = streams[i];
    const size_t side = i % sides;
    STD_TORCH_CHECK(row_count(t, c[side]) == o.rows, "fastpo::objective: streams differ in rows");
    STD_TORCH_CHECK(t.numel() == streams[side].numel(), "fastpo::objective: streams of one side differ in size");
    const bool token_level = t.dim() == 2 || c[side];
    // tokens of a row must be adjacent; rows, and summed streams, may have any stride
    if (token_level && t.stride(t.dim() - 1) != 1) t = as_contiguous(t);
    o.stream[i] = {t.const_data_ptr(), t.dim() > 0 ? t.stride(0) : 1, dtype_of(t)};
    o.is_double = o.is_double || o.stream[i].dtype == DType::f64;
    if (i < sides) o.layouts[side] = layout_of(t, m[side], c[side], l[side]);
  }
  for (size_t i = 0; i < columns.size(); ++i) {
    const Tensor& t = columns[i];
    STD_TORCH_CHECK(t.dim() == 1 && t.numel() == o.rows, "fastpo::objective: a column has the wrong size");
    o.column[i] = {t.const_data_ptr(), t.stride(0), dtype_of(t)};
  }
  const ScalarType accumulator = o.is_double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = new_tensor(streams[0], reduce ? std::vector<int64_t>{} : std::vector<int64_t>{o.rows}, accumulator);
  Tensor slopes = new_tensor(streams[0], {o.sides, o.rows}, accumulator);
  Tensor rewards = new_tensor(streams[0], {o.sides, o.rows}, accumulator);
  std::copy(hyper.begin(), hyper.end(), o.hyper);
  host::Hyper named;
  std::memcpy(&named, o.hyper, sizeof named);
  o.reward_scale = named.beta;
  o.use_lengths = static_cast<int>(use_lengths);
  const double divisor = denominator.value_or(static_cast<double>(o.rows));
  o.scale = 1 / divisor;
  o.loss = reduce ? nullptr : loss.mutable_data_ptr();
  o.slopes = slopes.mutable_data_ptr();
  o.rewards = rewards.mutable_data_ptr();
  const int64_t tokens = tokens_per_row(streams, o.rows);
  return {o,
          loss,
          slopes,
          rewards,
          divisor,
          tokens,
          std::move(streams),
          std::move(m),
          std::move(c),
          std::move(l),
          std::move(columns)};
}

struct PreparedSpread {
  Spread arguments;
  // keep the storage alive
  Tensor gradient, grad, slopes;
  OptionalTensor mask, boundaries;
};

inline void check_spread(const Tensor& grad, const Tensor& slopes, const Tensors& streams, const OptionalTensors& masks,
                         const OptionalTensors& cu_seqlens) {
  STD_TORCH_CHECK(grad.scalar_type() == slopes.scalar_type(), "fastpo::objective_backward: wrong dtype");
  STD_TORCH_CHECK(slopes.dim() == 2 && static_cast<size_t>(slopes.size(0)) == streams.size() &&
                      masks.size() == streams.size() && cu_seqlens.size() == streams.size() &&
                      (grad.dim() == 0 || grad.numel() == slopes.size(1)),
                  "fastpo::objective_backward: one row of slopes and one layout per stream expected");
}

// the gradient of stream `side`, not filled yet
inline PreparedSpread prepare_spread(const Tensor& grad, const Tensor& slopes, const Tensor& stream, int64_t side,
                                     const OptionalTensor& mask, const OptionalTensor& boundaries) {
  PreparedSpread p{{},
                   new_tensor(stream, shape_of(stream), stream.scalar_type()),
                   as_contiguous(grad),
                   as_contiguous(slopes),
                   as_contiguous(mask),
                   as_contiguous(boundaries)};
  STD_TORCH_CHECK(row_count(stream, p.boundaries) == slopes.size(1),
                  "fastpo::objective_backward: a stream has not as many rows as the slopes");
  Spread& s = p.arguments;
  s.layout = layout_of(stream, p.mask, p.boundaries, std::nullopt);
  s.dtype = dtype_of(stream);
  s.is_double = slopes.scalar_type() == ScalarType::Double;
  s.rows = slopes.size(1);
  s.grad = p.grad.const_data_ptr();
  s.grad_per_row = grad.dim() == 1;
  s.slopes = static_cast<const char*>(p.slopes.const_data_ptr()) + side * s.rows * (s.is_double ? 8 : 4);
  s.gradient = p.gradient.mutable_data_ptr();
  return p;
}

}  // namespace fastpo
