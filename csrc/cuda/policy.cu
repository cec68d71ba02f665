// Launches of the kernels in policy.cuh. No torch here: nvcc compiles it by itself.
#include "launch.cuh"
#include "launch.h"
#include "policy.cuh"

namespace fastpo::gpu {

const char* policy_objective(const PolicyObjective& o, bool reduce, void* loss, double* sums, double* maxima,
                             void* stream) {
  const Int64 blocks = policy_blocks(o.rows);
  const char* error = nullptr;
  if (o.rows > 0)
    error = o.is_double ? FASTPO_LAUNCH(policy_f64, blocks, policy_threads, stream, o)
                        : FASTPO_LAUNCH(policy_f32, blocks, policy_threads, stream, o);
  if (error) return error;
  const PolicySum sum{o.row_loss, o.row_sums, o.row_maxima, o.rows, loss, sums, maxima, o.is_double, reduce};
  return FASTPO_LAUNCH(policy_sum, 1, policy_threads, stream, sum);
}

}  // namespace fastpo::gpu

// sizes of the structs that Python restates
extern "C" __attribute__((visibility("default"))) int fastpo_policy_struct_size(int which) {
  const int sizes[] = {sizeof(fastpo::PolicyObjective), sizeof(fastpo::gpu::PolicySum)};
  return sizes[which];
}
