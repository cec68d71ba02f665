// Launches of the kernels in objective.cuh. No torch here: nvcc compiles it by itself.
#include "launch.cuh"
#include "launch.h"
#include "objective.cuh"

namespace fastpo::gpu {

Int64 objective_blocks(Int64 rows, Int64 tokens, int streams) { return objective_shape(rows, tokens, streams).blocks; }

const char* objective(const Objective& o, Int64 tokens, double denominator, void* loss, void* stream) {
  const Shape shape = objective_shape(o.rows, tokens, o.sides * o.models);
  const char* error = o.is_double ? FASTPO_LAUNCH(objective_f64, shape.blocks, shape.threads, stream, o, shape)
                                  : FASTPO_LAUNCH(objective_f32, shape.blocks, shape.threads, stream, o, shape);
  if (error || !loss) return error;
  const LossSum sum{o.block_loss, shape.blocks, denominator, loss, o.is_double};
  return FASTPO_LAUNCH(objective_sum, 1, sum_threads, stream, sum);
}

const char* objective_spread(const Spread* sides, int count, Int64 tokens, void* stream) {
  SpreadSides s{};
  s.sides = count;
  for (int i = 0; i < count; ++i) s.side[i] = sides[i];
  const Shape shape = spread_shape(sides[0].rows * count, tokens);
  return FASTPO_LAUNCH(objective_spread, shape.blocks, shape.threads, stream, s, shape);
}

}  // namespace fastpo::gpu

// for the test that compares them with the launch through CuPy: blocks, threads, team, rows
extern "C" __attribute__((visibility("default"))) void fastpo_objective_shape(long long rows, long long tokens,
                                                                              int streams, long long* out) {
  const fastpo::gpu::Shape s = fastpo::gpu::objective_shape(rows, tokens, streams);
  out[0] = s.blocks, out[1] = s.threads, out[2] = s.team, out[3] = s.rows;
}

extern "C" __attribute__((visibility("default"))) void fastpo_spread_shape(long long items, long long tokens,
                                                                           long long* out) {
  const fastpo::gpu::Shape s = fastpo::gpu::spread_shape(items, tokens);
  out[0] = s.blocks, out[1] = s.threads, out[2] = s.team, out[3] = s.rows;
}

// sizes of the structs that Python restates
extern "C" __attribute__((visibility("default"))) int fastpo_struct_size(int which) {
  using namespace fastpo;
  const int sizes[] = {sizeof(Layout),       sizeof(Stream),     sizeof(Objective),       sizeof(Spread),
                       sizeof(gpu::LossSum), sizeof(gpu::Shape), sizeof(gpu::SpreadSides)};
  return sizes[which];
}
