// fastpo::token_logprobs and its backward on the CPU. The schema is in fastpo/kernels/token_logprobs.py.
#include "tensor.h"

namespace fastpo {
namespace {

// What the arguments must fulfil for the memory accesses to be inside the tensors; the rest is checked in
// Python.
void check_arguments(const TokenLogprobs& a, const Tensor& targets) {
  for (int64_t i = 0; i < a.rows * a.ids; ++i) {
    const int64_t id = a.target(i);
    if (id == a.ignore_index || (id >= 0 && id < a.logits.columns)) continue;
    std::string where;
    int64_t rest = i;
    for (int64_t d = targets.dim() - 1; d >= 0; --d) {
      // (..., 1) stands for (...)
      if (d < targets.dim() - 1 || a.ids > 1)
        where = std::to_string(rest % targets.size(d)) + (where.empty() ? "" : ", ") + where;
      rest /= targets.size(d);
    }
    FASTPO_CHECK(false, IndexError, "targets[", where, "] is ", id, ", out of range for a vocabulary of ",
                 a.logits.columns, " (ignore_index is ", a.ignore_index, ")");
  }
  check_temperatures(a.temperatures, a.dtype, a.rows);
  const int64_t words = (a.logits.columns + 31) / 32;
  // bits behind the last column say nothing
  const uint32_t last = ~uint32_t{0} >> (32 * words - a.logits.columns);
  for (int64_t r = 0; a.allowed && r < a.rows; ++r) {
    const uint32_t* set = a.allowed + r * a.allowed_stride;
    const bool some = (set[words - 1] & last) || std::any_of(set, set + words - 1, [](uint32_t w) { return w != 0; });
    bool asked = false;
    for (int64_t k = 0; k < a.ids; ++k) asked |= a.target(r * a.ids + k) != a.ignore_index;
    FASTPO_CHECK(some || !asked, ValueError, "allowed holds no token for row ", r, ", which has a target");
  }
}

struct Prepared {
  TokenLogprobs arguments;
  ScalarType accumulator;
  // keep the storage alive
  Tensor targets;
  OptionalTensor temperatures, allowed;
};

Prepared prepare(const Tensor& logits, const Tensor& targets, const OptionalTensor& temperatures, double temperature,
                 int64_t ignore_index, const OptionalTensor& allowed) {
  const ScalarType accumulator = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Prepared p{{}, accumulator, as_contiguous(targets), std::nullopt, as_contiguous(allowed)};
  if (temperatures) p.temperatures = as_contiguous(torch::stable::to(*temperatures, accumulator));
  TokenLogprobs& a = p.arguments;
  a.logits = rows_of(logits, "token_logprobs");
  a.dtype = dtype_of(logits);
  a.rows = a.logits.count();
  a.ids = targets.size(targets.dim() - 1);
  a.targets = p.targets.const_data_ptr();
  a.targets_are_int64 = is_int64(targets);
  a.ignore_index = ignore_index;
  a.temperatures = data_or_null(p.temperatures);
  a.temperature = temperature;
  if (p.allowed) {
    const int64_t words = (a.logits.columns + 31) / 32;
    const bool shared = p.allowed->dim() == 1;
    STD_TORCH_CHECK(p.allowed->scalar_type() == ScalarType::Int && p.allowed->dim() >= 1 &&
                        p.allowed->size(p.allowed->dim() - 1) == words &&
                        p.allowed->numel() == words * (shared ? 1 : a.rows),
                    "fastpo::token_logprobs: allowed has the wrong dtype or shape");
    a.allowed = static_cast<const uint32_t*>(p.allowed->const_data_ptr());
    a.allowed_stride = shared ? 0 : words;
  }
  check_arguments(a, targets);
  return p;
}

// a thread is worth waking for about 20 microseconds of work
int64_t grain(const TokenLogprobs& a) { return std::max<int64_t>(1, 32768 / a.logits.columns); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor logits, Tensor targets,
                                                                   OptionalTensor temperatures, double temperature,
                                                                   int64_t ignore_index, int64_t stats,
                                                                   OptionalTensor allowed) {
  Prepared p = prepare(logits, targets, temperatures, temperature, ignore_index, allowed);
  TokenLogprobs& a = p.arguments;
  std::vector<int64_t> shape = shape_of(logits);
  shape.pop_back();
  Tensor logprobs = new_tensor(logits, shape_of(targets), p.accumulator);
  Tensor state = new_tensor(logits, {2, a.rows}, p.accumulator);
  const auto statistic = [&](int bit, ScalarType dtype, auto& pointer) {
    const bool wanted = stats >> bit & 1;
    Tensor t = new_tensor(logits, wanted ? shape : std::vector<int64_t>{0}, dtype);
    pointer = wanted ? static_cast<std::remove_reference_t<decltype(pointer)>>(t.mutable_data_ptr()) : nullptr;
    return t;
  };
  Tensor entropy = statistic(0, p.accumulator, a.entropy);
  Tensor logsumexp = statistic(1, p.accumulator, a.logsumexp);
  Tensor log_sum_p2 = statistic(2, p.accumulator, a.log_sum_p2);
  Tensor top1 = statistic(3, ScalarType::Long, a.top1);
  a.logprobs = logprobs.mutable_data_ptr();
  a.row_max = state.mutable_data_ptr();
  a.row_sum = static_cast<char*>(a.row_max) + a.rows * (p.accumulator == ScalarType::Double ? 8 : 4);
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, a.rows, grain(a),
                              [&](int64_t begin, int64_t end) { k.token_logprobs(a, begin, end); });
  return {logprobs, state, entropy, logsumexp, log_sum_p2, top1};
}

void write_gradient(const Tensor& logits, const Tensor& gradient, const Tensor& targets, const Tensor& state,
                    const OptionalTensor& entropy, const OptionalTensor& temperatures, double temperature,
                    int64_t ignore_index, const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                    const OptionalTensor& grad_logsumexp, const OptionalTensor& allowed) {
  Prepared p = prepare(logits, targets, temperatures, temperature, ignore_index, allowed);
  TokenLogprobs& a = p.arguments;
  const Tensor row_state = as_contiguous(state);
  const OptionalTensor h = as_contiguous(entropy), g = as_contiguous(grad_logprobs), gh = as_contiguous(grad_entropy),
                       gl = as_contiguous(grad_logsumexp);
  for (const OptionalTensor* t : {&h, &g, &gh, &gl})
    STD_TORCH_CHECK(!*t || (*t)->scalar_type() == p.accumulator, "fastpo::token_logprobs_backward: wrong dtype");
  STD_TORCH_CHECK(!gh || h, "fastpo::token_logprobs_backward: grad_entropy without entropy");
  a.row_max = const_cast<void*>(row_state.const_data_ptr());
  a.row_sum = static_cast<char*>(a.row_max) + a.rows * (p.accumulator == ScalarType::Double ? 8 : 4);
  a.entropy = const_cast<void*>(data_or_null(h));
  a.grad_logprobs = data_or_null(g);
  a.grad_entropy = data_or_null(gh);
  a.grad_logsumexp = data_or_null(gl);
  a.gradient = rows_of(gradient, "token_logprobs");
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, a.rows, grain(a),
                              [&](int64_t begin, int64_t end) { k.token_logprobs_backward(a, begin, end); });
}

Tensor backward(Tensor logits, Tensor targets, Tensor state, OptionalTensor entropy, OptionalTensor temperatures,
                double temperature, int64_t ignore_index, OptionalTensor grad_logprobs, OptionalTensor grad_entropy,
                OptionalTensor grad_logsumexp, OptionalTensor allowed) {
  Tensor gradient = new_tensor(logits, shape_of(logits), logits.scalar_type());
  advise_huge_pages(gradient);
  write_gradient(logits, gradient, targets, state, entropy, temperatures, temperature, ignore_index, grad_logprobs,
                 grad_entropy, grad_logsumexp, allowed);
  return gradient;
}

void backward_inplace(Tensor logits, Tensor targets, Tensor state, OptionalTensor entropy, OptionalTensor temperatures,
                      double temperature, int64_t ignore_index, OptionalTensor grad_logprobs,
                      OptionalTensor grad_entropy, OptionalTensor grad_logsumexp, OptionalTensor allowed) {
  write_gradient(logits, logits, targets, state, entropy, temperatures, temperature, ignore_index, grad_logprobs,
                 grad_entropy, grad_logsumexp, allowed);
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&fastpo::forward));
  m.impl("token_logprobs_backward", TORCH_BOX(&fastpo::backward));
  m.impl("token_logprobs_backward_", TORCH_BOX(&fastpo::backward_inplace));
}
