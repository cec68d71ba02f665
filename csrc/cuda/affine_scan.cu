// Launches of the kernel in affine_scan.cuh. No torch here: nvcc compiles it by itself.
#include "affine_scan.cuh"
#include "launch.cuh"
#include "launch.h"

namespace fastpo::gpu {

const char* affine_scan(const Scan& s, Int64 tokens, void* stream) {
  const Shape shape = team_shape(s.rows, tokens);
  return FASTPO_LAUNCH(affine_scan, shape.blocks, shape.threads, stream, s, shape);
}

}  // namespace fastpo::gpu

// for the test that compares them with the launch through CuPy: blocks, threads, team, rows
extern "C" __attribute__((visibility("default"))) void fastpo_team_shape(long long rows, long long tokens,
                                                                         long long* out) {
  const fastpo::gpu::Shape s = fastpo::gpu::team_shape(rows, tokens);
  out[0] = s.blocks, out[1] = s.threads, out[2] = s.team, out[3] = s.rows;
}

// size of the struct that Python restates
extern "C" __attribute__((visibility("default"))) int fastpo_scan_size() { return sizeof(fastpo::Scan); }
