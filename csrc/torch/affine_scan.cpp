// fastpo::affine_scan, its backward and fastpo::advantages on the CPU. The schemas are in
// fastpo/kernels/affine_scan.py.
#include "affine_scan.h"

namespace fastpo {
namespace {

// tokens of a chunk: a row is cut where there are more threads than rows
constexpr int64_t chunk_tokens = 16384;

// x before the first step of each row; behind returns without values stands their bootstrap
std::vector<double> first_states(const PreparedScan& p) {
  const Scan& s = p.arguments;
  std::vector<double> states(static_cast<size_t>(s.rows));
  const bool given = s.kind == ScanKind::affine || (s.kind == ScanKind::advantage && !s.stream[1].data);
  if (!given || !s.initial.data) return states;
  const Tensor wide = torch::stable::to(p.initial, ScalarType::Double);
  std::copy_n(wide.const_data_ptr<double>(), s.rows, states.begin());
  return states;
}

void run(PreparedScan& p) {
  Scan& s = p.arguments;
  if (s.boundaries) {
    bool ordered = s.boundaries[0] == 0 && s.boundaries[s.rows] <= s.total;
    for (int64_t i = 0; ordered && i < s.rows; ++i) ordered = s.boundaries[i] <= s.boundaries[i + 1];
    FASTPO_CHECK(ordered, ValueError, "cu_seqlens must rise from 0 to at most ", s.total, ", the number of tokens");
  }
  for (int i = 0; i < 2; ++i) {
    if (!s.out[i]) continue;
    advise_huge_pages(p.out[i]);
    // tokens behind the last sequence
    if (s.boundaries && s.boundaries[s.rows] < s.total) torch::stable::zero_(p.out[i]);
  }
  if (s.rows == 0) return;
  const int64_t tokens = std::max<int64_t>(1, s.total / s.rows);
  const Kernels& k = kernels();
  const auto chunks = [&](int64_t grain) {
    torch::stable::parallel_for(0, s.rows * s.chunks, grain,
                                [&](int64_t begin, int64_t end) { k.scan(s, begin, end); });
  };
  if (s.rows < static_cast<int64_t>(torch::stable::get_num_threads()))
    s.chunks = std::max<int64_t>(1, tokens / chunk_tokens);
  if (s.chunks == 1) return chunks(std::max<int64_t>(1, 8192 / tokens));
  std::vector<double> composites(static_cast<size_t>(2 * s.rows * s.chunks)), states = first_states(p);
  s.composites = composites.data();
  s.phase = 1;
  chunks(1);
  for (int64_t row = 0; row < s.rows; ++row) {
    double x = states[static_cast<size_t>(row)];
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
      double* composite = &composites[static_cast<size_t>(2 * (row * s.chunks + chunk))];
      const double slope = composite[0], shift = composite[1];
      composite[0] = x;
      x = slope == 0 ? shift : slope * x + shift;
    }
  }
  s.phase = 2;
  chunks(1);
}

std::tuple<Tensor, Tensor> forward(Tensor a, Tensor b, OptionalTensor initial, OptionalTensor mask,
                                   OptionalTensor cu_seqlens, bool reverse, bool keep) {
  PreparedScan p = prepare_affine(a, b, initial, mask, cu_seqlens, reverse, keep);
  run(p);
  return {p.out[0], p.out[1]};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor a, Tensor before, OptionalTensor mask,
                                            OptionalTensor cu_seqlens, bool reverse) {
  PreparedScan p = prepare_adjoint(grad, a, before, mask, cu_seqlens, reverse);
  run(p);
  return {p.out[0], p.out[1], p.last};
}

std::tuple<Tensor, Tensor> advantages(Tensor rewards, OptionalTensor values, OptionalTensor next_values,
                                      OptionalTensor log_ratios, OptionalTensor terminated, OptionalTensor truncated,
                                      OptionalTensor mask, OptionalTensor cu_seqlens, OptionalTensor bootstrap,
                                      OptionalTensor repeat, double gamma, double lambda, double rho_bar, double c_bar,
                                      bool skip) {
  PreparedScan p = prepare_advantages(rewards, values, next_values, log_ratios, terminated, truncated, mask, cu_seqlens,
                                      bootstrap, repeat, gamma, lambda, rho_bar, c_bar, skip);
  run(p);
  return {p.out[0], p.out[1]};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) {
  m.impl("affine_scan", TORCH_BOX(&fastpo::forward));
  m.impl("affine_scan_backward", TORCH_BOX(&fastpo::backward));
  m.impl("advantages", TORCH_BOX(&fastpo::advantages));
}
