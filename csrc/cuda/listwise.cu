// Launches of the kernels in listwise.cuh. No torch here: nvcc compiles it by itself.
#include "launch.cuh"
#include "launch.h"
#include "listwise.cuh"

namespace fastpo::gpu {

const char* listwise(const Listwise& o, Int64 items, bool reduce, double denominator, void* loss, void* stream) {
  const Shape shape = list_shape(o.lists, items);
  const char* error = nullptr;
  if (o.lists > 0)
    error = o.is_double ? FASTPO_LAUNCH(listwise_f64, shape.blocks, shape.threads, stream, o, shape)
                        : FASTPO_LAUNCH(listwise_f32, shape.blocks, shape.threads, stream, o, shape);
  if (error) return error;
  const ListSum sum{o.list_loss, o.lists, denominator, loss, o.is_double, reduce};
  return FASTPO_LAUNCH(listwise_sum, 1, shape.threads, stream, sum);
}

}  // namespace fastpo::gpu

// sizes of the structs that Python restates
extern "C" __attribute__((visibility("default"))) int fastpo_listwise_struct_size(int which) {
  const int sizes[] = {sizeof(fastpo::Listwise), sizeof(fastpo::gpu::ListSum)};
  return sizes[which];
}
