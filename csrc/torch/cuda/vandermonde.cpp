// fastpo::vandermonde and its moments on CUDA devices. The schemas are in fastpo/kernels/vandermonde.py.
#include "../../cuda/launch.h"
#include "../state_space.h"
#include "device.h"

namespace fastpo {
namespace {

Tensor forward(Tensor v, Tensor x, int64_t length, bool symmetric) {
  const OnDevice device(v);
  PreparedVandermonde p = prepare_vandermonde(v, x, length, symmetric);
  const char* error = p.out.numel() > 0 ? gpu::vandermonde(p.arguments, device.stream()) : nullptr;
  STD_TORCH_CHECK(!error, "fastpo::vandermonde: ", error);
  return p.out;
}

std::tuple<Tensor, Tensor> moments(Tensor u, Tensor x, bool with_slope) {
  const OnDevice device(x);
  PreparedVandermonde p = prepare_moments(u, x, with_slope);
  const Vandermonde& a = p.arguments;
  const int64_t parts = gpu::vandermonde_moment_parts(a);
  Tensor sums = new_tensor(x, {parts > 1 ? parts * p.moment.numel() * 4 : 0}, ScalarType::Double);
  double* noted = parts > 1 ? sums.mutable_data_ptr<double>() : nullptr;
  const char* error = p.moment.numel() > 0 ? gpu::vandermonde_moments(a, noted, device.stream()) : nullptr;
  STD_TORCH_CHECK(!error, "fastpo::vandermonde_moments: ", error);
  return {p.moment, p.slope};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(FASTPO_CUDA_LIBRARY, FASTPO_CUDA_KEY, m) {
  m.impl("vandermonde", TORCH_BOX(&fastpo::forward));
  m.impl("vandermonde_moments", TORCH_BOX(&fastpo::moments));
}
