// fastpo::segment_stats on CUDA devices. The schema is in fastpo/kernels/segment_stats.py.
#include "../segment_stats.h"

#include "../../cuda/launch.h"
#include "device.h"

namespace fastpo {
namespace {

std::tuple<Tensor, Tensor, Tensor> segment_stats(Tensor values, OptionalTensor weights, OptionalTensor mask,
                                                 OptionalTensor order, OptionalTensor boundaries, int64_t mode,
                                                 int64_t ddof, double eps, bool skip_nan, bool raw_singletons,
                                                 int64_t wanted) {
  const OnDevice device(values);
  PreparedSegments p =
      prepare_segments(values, weights, mask, order, boundaries, mode, ddof, eps, skip_nan, raw_singletons, wanted);
  const Segments& s = p.arguments;
  if (s.boundaries) {
    // what no segment has and no boundary explains
    torch::stable::fill_(p.normalized, std::numeric_limits<double>::quiet_NaN());
    torch::stable::zero_(p.informative);
  }
  const int64_t members = s.total / std::max<int64_t>(1, s.segments);
  const char* error = s.segments > 0 || s.boundaries ? gpu::segment_stats(s, members, device.stream()) : nullptr;
  STD_TORCH_CHECK(!error, "fastpo::segment_stats: ", error);
  return {p.statistics, p.normalized, p.informative};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(FASTPO_CUDA_LIBRARY, FASTPO_CUDA_KEY, m) {
  m.impl("segment_stats", TORCH_BOX(&fastpo::segment_stats));
}
