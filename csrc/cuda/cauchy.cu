// Launches of the kernels in cauchy.cuh. No torch here: nvcc compiles it by itself.
#include "cauchy.cuh"
#include "launch.cuh"
#include "launch.h"

namespace fastpo::gpu {

const char* cauchy(const Cauchy& a, void* stream) {
  const CauchyShape shape = cauchy_shape(a.rows, a.nodes, a.is_double);
  return a.is_double ? FASTPO_LAUNCH(cauchy_f64, shape.blocks, shape.threads, stream, a, shape)
                     : FASTPO_LAUNCH(cauchy_f32, shape.blocks, shape.threads, stream, a, shape);
}

Int64 cauchy_parts(const Cauchy& a) { return cauchy_pole_parts(a.rows, a.poles, a.nodes, a.is_double).parts; }

const char* cauchy_backward(const Cauchy& a, double* sums, void* stream) {
  if (a.grad_z && a.rows > 0 && a.nodes > 0) {
    const CauchyShape shape = cauchy_shape(a.rows, a.nodes, a.is_double);
    const char* error = a.is_double ? FASTPO_LAUNCH(cauchy_slopes_f64, shape.blocks, shape.threads, stream, a, shape)
                                    : FASTPO_LAUNCH(cauchy_slopes_f32, shape.blocks, shape.threads, stream, a, shape);
    if (error) return error;
  }
  if ((!a.grad_v && !a.grad_w) || a.rows == 0 || a.poles == 0) return nullptr;
  Parts parts = cauchy_pole_parts(a.rows, a.poles, a.nodes, a.is_double);
  parts.sums = sums;
  const char* error = a.is_double ? FASTPO_LAUNCH(cauchy_poles_f64, parts.blocks, parts.threads, stream, a, parts)
                                  : FASTPO_LAUNCH(cauchy_poles_f32, parts.blocks, parts.threads, stream, a, parts);
  if (error || parts.parts == 1) return error;
  const Int64 blocks = part_sum_blocks(a.rows * a.poles);
  return FASTPO_LAUNCH(cauchy_pole_sums, blocks, parts.threads, stream, a, parts);
}

}  // namespace fastpo::gpu

// for the tests that compare them with the launch through CuPy: blocks, tiles, threads, nodes
extern "C" __attribute__((visibility("default"))) void fastpo_cauchy_shape(long long rows, long long nodes,
                                                                           int is_double, long long* out) {
  const fastpo::gpu::CauchyShape s = fastpo::gpu::cauchy_shape(rows, nodes, is_double != 0);
  out[0] = s.blocks, out[1] = s.tiles, out[2] = s.threads, out[3] = s.nodes;
}

// blocks, parts, length, threads
extern "C" __attribute__((visibility("default"))) void fastpo_parts(long long rows, long long terms, long long length,
                                                                    int per_warp, long long* out) {
  const fastpo::gpu::Parts p = fastpo::gpu::parts_of(rows, terms, length, per_warp);
  out[0] = p.blocks, out[1] = p.parts, out[2] = p.length, out[3] = p.threads;
}

// sizes of the structs that Python restates
extern "C" __attribute__((visibility("default"))) int fastpo_cauchy_struct_size(int which) {
  const int sizes[] = {sizeof(fastpo::Cauchy), sizeof(fastpo::gpu::CauchyShape), sizeof(fastpo::gpu::Parts)};
  return sizes[which];
}
