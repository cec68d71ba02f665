// Launches of the kernels in vandermonde.cuh. No torch here: nvcc compiles it by itself.
#include "launch.cuh"
#include "launch.h"
#include "vandermonde.cuh"

namespace fastpo::gpu {

const char* vandermonde(const Vandermonde& a, void* stream) {
  const VandermondeShape shape = vandermonde_shape(a.rows, a.length);
  return FASTPO_LAUNCH(vandermonde, shape.blocks, shape.threads, stream, a, shape);
}

Int64 vandermonde_moment_parts(const Vandermonde& a) { return moment_parts(a.rows, a.terms, a.length).parts; }

const char* vandermonde_moments(const Vandermonde& a, double* sums, void* stream) {
  Parts parts = moment_parts(a.rows, a.terms, a.length);
  parts.sums = sums;
  const char* error = FASTPO_LAUNCH(vandermonde_moments, parts.blocks, parts.threads, stream, a, parts);
  if (error || parts.parts == 1) return error;
  const Int64 blocks = part_sum_blocks(a.rows * a.terms);
  return FASTPO_LAUNCH(vandermonde_moment_sums, blocks, parts.threads, stream, a, parts);
}

}  // namespace fastpo::gpu

// for the test that compares it with the launch through CuPy: blocks, tiles, threads
extern "C" __attribute__((visibility("default"))) void fastpo_vandermonde_shape(long long rows, long long length,
                                                                                long long* out) {
  const fastpo::gpu::VandermondeShape s = fastpo::gpu::vandermonde_shape(rows, length);
  out[0] = s.blocks, out[1] = s.tiles, out[2] = s.threads;
}

// sizes of the structs that Python restates
extern "C" __attribute__((visibility("default"))) int fastpo_vandermonde_struct_size(int which) {
  const int sizes[] = {sizeof(fastpo::Vandermonde), sizeof(fastpo::gpu::VandermondeShape)};
  return sizes[which];
}
