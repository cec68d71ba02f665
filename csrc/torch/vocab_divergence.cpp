// fastpo::vocab_divergence and its backward on the CPU. The schemas are in fastpo/kernels/vocab_divergence.py.
#include "tensor.h"

namespace fastpo {
namespace {

struct Prepared {
  VocabDivergence arguments;
  ScalarType accumulator;
  // keep the storage alive
  OptionalTensor mask;
  OptionalTensor temperatures;
};

Prepared prepare(const Tensor& logits, const Tensor& reference, const OptionalTensor& mask,
                 const OptionalTensor& temperatures, double temperature, int64_t kind, double parameter) {
  const ScalarType accumulator = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Prepared p{{}, accumulator, as_contiguous(mask), std::nullopt};
  if (temperatures) p.temperatures = as_contiguous(torch::stable::to(*temperatures, accumulator));
  VocabDivergence& a = p.arguments;
  a.logits = rows_of(logits, "vocab_divergence");
  a.reference = rows_of(reference, "vocab_divergence");
  a.dtype = dtype_of(logits);
  a.rows = a.logits.count();
  a.mask = static_cast<const bool*>(data_or_null(p.mask));
  a.temperatures = data_or_null(p.temperatures);
  a.temperature = temperature;
  STD_TORCH_CHECK(kind >= 0 && kind < static_cast<int64_t>(Divergence::count),
                  "fastpo::vocab_divergence: no divergence has the number ", kind);
  a.kind = static_cast<Divergence>(kind);
  a.parameter = parameter;
  // what must hold for the memory accesses to be inside the tensors; the rest is checked in Python
  STD_TORCH_CHECK(shape_of(reference) == shape_of(logits) && dtype_of(reference) == a.dtype,
                  "fastpo::vocab_divergence: the streams differ in shape or dtype");
  STD_TORCH_CHECK(!mask || (mask->numel() == a.rows && mask->scalar_type() == ScalarType::Bool),
                  "fastpo::vocab_divergence: the mask has the wrong size or dtype");
  STD_TORCH_CHECK(!temperatures || temperatures->numel() == a.rows,
                  "fastpo::vocab_divergence: not one temperature per row");
  check_temperatures(a.temperatures, a.dtype, a.rows);
  return p;
}

// a thread is worth waking for about 20 microseconds of work
int64_t grain(const VocabDivergence& a) { return std::max<int64_t>(1, 16384 / a.logits.columns); }

std::tuple<Tensor, Tensor> forward(Tensor logits, Tensor reference, OptionalTensor mask, OptionalTensor temperatures,
                                   double temperature, int64_t kind, double parameter) {
  Prepared p = prepare(logits, reference, mask, temperatures, temperature, kind, parameter);
  VocabDivergence& a = p.arguments;
  std::vector<int64_t> shape = shape_of(logits);
  shape.pop_back();
  Tensor divergence = new_tensor(logits, shape, p.accumulator);
  Tensor state = new_tensor(logits, {a.numbers(), a.rows}, p.accumulator);
  a.divergence = divergence.mutable_data_ptr();
  a.state = state.mutable_data_ptr();
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, a.rows, grain(a),
                              [&](int64_t begin, int64_t end) { k.vocab_divergence(a, begin, end); });
  return {divergence, state};
}

std::tuple<Tensor, Tensor> backward(Tensor logits, Tensor reference, Tensor grad, Tensor divergence, Tensor state,
                                    OptionalTensor mask, OptionalTensor temperatures, double temperature, int64_t kind,
                                    double parameter, bool policy, bool of_reference) {
  Prepared p = prepare(logits, reference, mask, temperatures, temperature, kind, parameter);
  VocabDivergence& a = p.arguments;
  const Tensor g = as_contiguous(grad), d = as_contiguous(divergence), s = as_contiguous(state);
  for (const Tensor* t : {&g, &d, &s})
    STD_TORCH_CHECK(t->scalar_type() == p.accumulator && t->numel() == (t == &s ? a.numbers() : 1) * a.rows,
                    "fastpo::vocab_divergence_backward: wrong dtype or size");
  a.grad = g.const_data_ptr();
  a.divergence = const_cast<void*>(d.const_data_ptr());
  a.state = const_cast<void*>(s.const_data_ptr());
  const auto gradient = [&](bool wanted, void*& pointer) {
    Tensor t = new_tensor(logits, wanted ? shape_of(logits) : std::vector<int64_t>{0}, logits.scalar_type());
    advise_huge_pages(t);
    pointer = wanted ? t.mutable_data_ptr() : nullptr;
    return t;
  };
  Tensor to_policy = gradient(policy, a.grad_logits), to_reference = gradient(of_reference, a.grad_reference);
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, a.rows, grain(a),
                              [&](int64_t begin, int64_t end) { k.vocab_divergence_backward(a, begin, end); });
  return {to_policy, to_reference};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) {
  m.impl("vocab_divergence", TORCH_BOX(&fastpo::forward));
  m.impl("vocab_divergence_backward", TORCH_BOX(&fastpo::backward));
}
