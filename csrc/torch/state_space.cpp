// fastpo::cauchy, fastpo::vandermonde, their backward and fastpo::vandermonde_moments on the CPU. The schemas are in
// fastpo/kernels/cauchy.py and fastpo/kernels/vandermonde.py.
#include "state_space.h"

namespace fastpo {
namespace {

// terms that are worth a thread of their own
constexpr int64_t least_terms = 1 << 16;

// `items` of every row, of `terms` each
template <class Arguments>
void run(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int64_t items, int64_t terms) {
  const int64_t grain = std::max<int64_t>(1, least_terms / std::max<int64_t>(1, terms));
  if (items > 0)
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

Tensor cauchy(Tensor v, Tensor z, Tensor w, bool symmetric) {
  PreparedCauchy p = prepare_cauchy(v, z, w, symmetric, std::nullopt, 0);
  const Cauchy& c = p.arguments;
  advise_huge_pages(p.out);
  run(kernels().cauchy, c, c.rows * blocks_of(c.nodes, cauchy_nodes),
      c.poles * std::min<int64_t>(c.nodes, cauchy_nodes));
  return p.out;
}

std::tuple<Tensor, Tensor, Tensor> cauchy_backward(Tensor grad, Tensor v, Tensor z, Tensor w, bool symmetric,
                                                   int64_t wanted) {
  PreparedCauchy p = prepare_cauchy(v, z, w, symmetric, grad, wanted);
  const Cauchy& c = p.arguments;
  const Kernels& k = kernels();
  if (c.grad_v || c.grad_w)
    run(k.cauchy_pole_gradients, c, c.rows * blocks_of(c.poles, cauchy_poles),
        c.nodes * std::min<int64_t>(c.poles, cauchy_poles));
  if (c.grad_z)
    run(k.cauchy_node_gradient, c, c.rows * blocks_of(c.nodes, cauchy_nodes),
        c.poles * std::min<int64_t>(c.nodes, cauchy_nodes));
  return {p.grad_v, p.grad_z, p.grad_w};
}

Tensor vandermonde(Tensor v, Tensor x, int64_t length, bool symmetric) {
  PreparedVandermonde p = prepare_vandermonde(v, x, length, symmetric);
  const Vandermonde& a = p.arguments;
  advise_huge_pages(p.out);
  run(kernels().vandermonde, a, a.rows * blocks_of(a.length, vandermonde_chunk),
      a.terms * std::min<int64_t>(a.length, vandermonde_chunk));
  return p.out;
}

std::tuple<Tensor, Tensor> vandermonde_moments(Tensor u, Tensor x, bool with_slope) {
  PreparedVandermonde p = prepare_moments(u, x, with_slope);
  const Vandermonde& a = p.arguments;
  run(kernels().vandermonde_moments, a, a.rows * blocks_of(a.terms, vandermonde_terms),
      a.length * std::min<int64_t>(a.terms, vandermonde_terms));
  return {p.moment, p.slope};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) {
  m.impl("cauchy", TORCH_BOX(&fastpo::cauchy));
  m.impl("cauchy_backward", TORCH_BOX(&fastpo::cauchy_backward));
  m.impl("vandermonde", TORCH_BOX(&fastpo::vandermonde));
  m.impl("vandermonde_moments", TORCH_BOX(&fastpo::vandermonde_moments));
}
