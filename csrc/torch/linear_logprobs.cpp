// fastpo::fold_tile and fastpo::dlogits_tile on the CPU. The schemas are in fastpo/kernels/linear_logprobs.py.
#include "tensor.h"

namespace fastpo {
namespace {

// `t` as `count` numbers of the kernel's type
template <class T>
T* numbers(const Tensor& t, ScalarType dtype, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == count && t.is_contiguous(),
                  "fastpo::linear_logprobs: ", name, " has the wrong dtype, size or strides");
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

double* doubles(const Tensor& t, int64_t count, const char* name) {
  return numbers<double>(t, ScalarType::Double, count, name);
}

LogitTile tile_of(const Tensor& tile, int64_t first, const Tensor& targets, const Tensor& inverse, double logit_scale,
                  double cap, const Tensor& state, const OptionalTensor& allowed) {
  STD_TORCH_CHECK(tile.dim() == 2 && targets.dim() == 2 && tile.stride(1) == 1, "fastpo::linear_logprobs: wrong tile");
  LogitTile t{};
  t.dtype = dtype_of(tile);
  t.rows = tile.size(0);
  t.columns = tile.size(1);
  t.row_stride = tile.stride(0);
  t.first = first;
  t.ids = targets.size(1);
  t.data = const_cast<void*>(tile.const_data_ptr());
  t.targets = numbers<int64_t>(targets, ScalarType::Long, t.rows * t.ids, "targets");
  t.inverse = doubles(inverse, t.rows, "inverse");
  t.logit_scale = logit_scale;
  t.cap = cap;
  t.state = doubles(state, 4 * t.rows, "state");
  if (allowed) {
    STD_TORCH_CHECK(allowed->scalar_type() == ScalarType::Int && allowed->dim() == 2 &&
                        (allowed->size(0) == 1 || allowed->size(0) == t.rows) &&
                        allowed->size(1) == (t.columns + 31) / 32 && (allowed->stride(1) == 1 || allowed->size(1) <= 1),
                    "fastpo::linear_logprobs: allowed has the wrong dtype, size or strides");
    t.allowed = static_cast<const uint32_t*>(allowed->const_data_ptr());
    t.allowed_stride = allowed->size(0) == 1 ? 0 : allowed->stride(0);
  }
  return t;
}

// a thread is worth waking for about 20 microseconds of work
int64_t grain(const LogitTile& t) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, t.columns)); }

void fold_tile(Tensor tile, int64_t first, Tensor targets, Tensor inverse, double logit_scale, double cap, Tensor state,
               Tensor taken, OptionalTensor top1, OptionalTensor total, bool weighted, bool squared,
               OptionalTensor allowed) {
  LogitTile t = tile_of(tile, first, targets, inverse, logit_scale, cap, state, allowed);
  t.taken = doubles(taken, t.rows * t.ids, "taken");
  if (top1) t.top1 = numbers<int64_t>(*top1, ScalarType::Long, t.rows, "top1");
  if (total) t.total = doubles(*total, t.rows, "total");
  t.weighted = weighted;
  t.squared = squared;
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, t.rows, grain(t), [&](int64_t begin, int64_t end) { k.fold_tile(t, begin, end); });
}

void dlogits_tile(Tensor tile, int64_t first, Tensor targets, Tensor inverse, double logit_scale, double cap,
                  Tensor state, Tensor at, OptionalTensor slope, Tensor grads, OptionalTensor out,
                  OptionalTensor allowed) {
  STD_TORCH_CHECK(!out, "fastpo::dlogits_tile: on the CPU in place only");
  LogitTile t = tile_of(tile, first, targets, inverse, logit_scale, cap, state, allowed);
  t.at = doubles(at, t.rows, "at");
  if (slope) t.slope = doubles(*slope, t.rows, "slope");
  t.grads = doubles(grads, t.rows * t.ids, "grads");
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, t.rows, grain(t), [&](int64_t begin, int64_t end) { k.dlogits_tile(t, begin, end); });
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) {
  m.impl("fold_tile", TORCH_BOX(&fastpo::fold_tile));
  m.impl("dlogits_tile", TORCH_BOX(&fastpo::dlogits_tile));
}
