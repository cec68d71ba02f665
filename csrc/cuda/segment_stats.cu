// Launches of the kernel in segment_stats.cuh. No torch here: nvcc compiles it by itself.
#include "launch.cuh"
#include "launch.h"
#include "segment_stats.cuh"

namespace fastpo::gpu {

const char* segment_stats(const Segments& s, Int64 members, void* stream) {
  const Shape shape = team_shape(s.segments, members);
  return FASTPO_LAUNCH(segment_stats, shape.blocks, shape.threads, stream, s, shape);
}

}  // namespace fastpo::gpu

// size of the struct that Python restates
extern "C" __attribute__((visibility("default"))) int fastpo_segments_size() { return sizeof(fastpo::Segments); }
