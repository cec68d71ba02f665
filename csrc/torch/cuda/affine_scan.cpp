// fastpo::affine_scan, its backward and fastpo::advantages on CUDA devices. The schemas are in
// fastpo/kernels/affine_scan.py.
#include "../affine_scan.h"

#include "../../cuda/launch.h"
#include "device.h"

namespace fastpo {
namespace {

void run(PreparedScan& p, const OnDevice& device) {
  const Scan& s = p.arguments;
  // what no row has and no boundary explains
  for (int i = 0; s.boundaries && i < 2; ++i)
    if (s.out[i]) torch::stable::fill_(p.out[i], std::numeric_limits<double>::quiet_NaN());
  const int64_t tokens = s.total / std::max<int64_t>(1, s.rows);
  const char* error = s.rows > 0 || s.boundaries ? gpu::affine_scan(s, tokens, device.stream()) : nullptr;
  STD_TORCH_CHECK(!error, "fastpo::affine_scan: ", error);
}

std::tuple<Tensor, Tensor> forward(Tensor a, Tensor b, OptionalTensor initial, OptionalTensor mask,
                                   OptionalTensor cu_seqlens, bool reverse, bool keep) {
  const OnDevice device(a);
  PreparedScan p = prepare_affine(a, b, initial, mask, cu_seqlens, reverse, keep);
  run(p, device);
  return {p.out[0], p.out[1]};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor a, Tensor before, OptionalTensor mask,
                                            OptionalTensor cu_seqlens, bool reverse) {
  const OnDevice device(a);
  PreparedScan p = prepare_adjoint(grad, a, before, mask, cu_seqlens, reverse);
  run(p, device);
  return {p.out[0], p.out[1], p.last};
}

std::tuple<Tensor, Tensor> advantages(Tensor rewards, OptionalTensor values, OptionalTensor next_values,
                                      OptionalTensor log_ratios, OptionalTensor terminated, OptionalTensor truncated,
                                      OptionalTensor mask, OptionalTensor cu_seqlens, OptionalTensor bootstrap,
                                      OptionalTensor repeat, double gamma, double lambda, double rho_bar, double c_bar,
                                      bool skip) {
  const OnDevice device(rewards);
  PreparedScan p = prepare_advantages(rewards, values, next_values, log_ratios, terminated, truncated, mask, cu_seqlens,
                                      bootstrap, repeat, gamma, lambda, rho_bar, c_bar, skip);
  run(p, device);
  return {p.out[0], p.out[1]};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(FASTPO_CUDA_LIBRARY, FASTPO_CUDA_KEY, m) {
  m.impl("affine_scan", TORCH_BOX(&fastpo::forward));
  m.impl("affine_scan_backward", TORCH_BOX(&fastpo::backward));
  m.impl("advantages", TORCH_BOX(&fastpo::advantages));
}
