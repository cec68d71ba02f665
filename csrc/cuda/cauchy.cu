// Launches of the kernels in cauchy.cuh. No torch here: nvcc compiles it by itself.
#include "cauchy.cuh"
#include "launch.cuh"
#include "launch.h"

namespace fastpo::gpu {

namespace {

bool in_double(const Cauchy& a) { return a.is_double || has_fast_double(); }

}  // namespace

const char* cauchy(const Cauchy& a, void* stream) {
  const CauchyShape s = cauchy_shape(a.rows, a.nodes, in_double(a));
  if (a.is_double) return FASTPO_LAUNCH(cauchy_f64, s.blocks, s.threads, stream, a, s);
  return in_double(a) ? FASTPO_LAUNCH(cauchy_f32_in_f64, s.blocks, s.threads, stream, a, s)
                      : FASTPO_LAUNCH(cauchy_f32, s.blocks, s.threads, stream, a, s);
}

const char* cauchy_slopes(const Cauchy& a, void* stream) {
  const CauchyShape s = cauchy_shape(a.rows, a.nodes, in_double(a));
  if (a.is_double) return FASTPO_LAUNCH(cauchy_slopes_f64, s.blocks, s.threads, stream, a, s);
  return in_double(a) ? FASTPO_LAUNCH(cauchy_slopes_f32_in_f64, s.blocks, s.threads, stream, a, s)
                      : FASTPO_LAUNCH(cauchy_slopes_f32, s.blocks, s.threads, stream, a, s);
}

Int64 cauchy_parts(const Cauchy& a) { return cauchy_pole_parts(a.rows, a.poles, a.nodes, in_double(a)).parts; }

const char* cauchy_poles(const Cauchy& a, double* sums, void* stream) {
  Parts p = cauchy_pole_parts(a.rows, a.poles, a.nodes, in_double(a));
  p.sums = sums;
  const char* error = nullptr;
  if (a.is_double)
    error = FASTPO_LAUNCH(cauchy_poles_f64, p.blocks, p.threads, stream, a, p);
  else if (in_double(a))
    error = FASTPO_LAUNCH(cauchy_poles_f32_in_f64, p.blocks, p.threads, stream, a, p);
  else
    error = FASTPO_LAUNCH(cauchy_poles_f32, p.blocks, p.threads, stream, a, p);
  if (error || p.parts == 1) return error;
  return FASTPO_LAUNCH(cauchy_pole_sums, part_sum_blocks(a.rows * a.poles), p.threads, stream, a, p);
}

}  // namespace fastpo::gpu

// for the tests that compare them with the launch through CuPy: blocks, tiles, threads
extern "C" __attribute__((visibility("default"))) void fastpo_cauchy_shape(long long rows, long long nodes,
                                                                           int in_double, long long* out) {
  const fastpo::gpu::CauchyShape s = fastpo::gpu::cauchy_shape(rows, nodes, in_double != 0);
  out[0] = s.blocks, out[1] = s.tiles, out[2] = s.threads;
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
