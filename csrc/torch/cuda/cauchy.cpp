// fastpo::cauchy and its backward on CUDA devices. The schemas are in fastpo/kernels/cauchy.py.
#include "../../cuda/launch.h"
#include "../state_space.h"
#include "device.h"

namespace fastpo {
namespace {

Tensor forward(Tensor v, Tensor z, Tensor w, bool symmetric) {
  const OnDevice device(v);
  PreparedCauchy p = prepare_cauchy(v, z, w, symmetric, std::nullopt, 0);
  const char* error = p.out.numel() > 0 ? gpu::cauchy(p.arguments, device.stream()) : nullptr;
  STD_TORCH_CHECK(!error, "fastpo::cauchy: ", error);
  return p.out;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor v, Tensor z, Tensor w, bool symmetric, int64_t wanted) {
  const OnDevice device(v);
  PreparedCauchy p = prepare_cauchy(v, z, w, symmetric, grad, wanted);
  const Cauchy& c = p.arguments;
  const char* error = p.grad_z.numel() > 0 ? gpu::cauchy_slopes(c, device.stream()) : nullptr;
  if (!error && (p.grad_v.numel() > 0 || p.grad_w.numel() > 0)) {
    const int64_t parts = gpu::cauchy_parts(c);
    Tensor sums = new_tensor(v, {parts > 1 ? parts * c.rows * c.poles * 4 : 0}, ScalarType::Double);
    error = gpu::cauchy_poles(c, parts > 1 ? sums.mutable_data_ptr<double>() : nullptr, device.stream());
  }
  STD_TORCH_CHECK(!error, "fastpo::cauchy_backward: ", error);
  return {p.grad_v, p.grad_z, p.grad_w};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(FASTPO_CUDA_LIBRARY, FASTPO_CUDA_KEY, m) {
  m.impl("cauchy", TORCH_BOX(&fastpo::forward));
  m.impl("cauchy_backward", TORCH_BOX(&fastpo::backward));
}
