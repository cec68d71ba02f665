// fastpo::listwise on CUDA devices. The schema is in fastpo/kernels/listwise.py.
#include "../listwise.h"

#include "../../cuda/launch.h"
#include "device.h"

namespace fastpo {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(int64_t kind, Tensor policy, OptionalTensor other, Tensor targets,
                                           OptionalTensor mask, OptionalTensor cu_seqlens, std::vector<double> numbers,
                                           bool pair_mean, bool reduce, std::optional<double> denominator) {
  const OnDevice device(policy);
  PreparedLists p =
      prepare_lists(kind, policy, other, targets, mask, cu_seqlens, numbers, pair_mean, reduce, denominator);
  Listwise& o = p.arguments;
  if (cu_seqlens) {
    // items that no list has
    torch::stable::zero_(p.slopes);
    torch::stable::zero_(p.scores);
  }
  Tensor scratch = new_tensor(policy, {o.lists + o.total}, ScalarType::Double);
  o.list_loss = scratch.mutable_data_ptr<double>();
  o.scratch = o.list_loss + o.lists;
  const char* error = gpu::listwise(o, o.total / std::max<int64_t>(1, o.lists), reduce, p.denominator,
                                    p.loss.mutable_data_ptr(), device.stream());
  STD_TORCH_CHECK(!error, "fastpo::listwise: ", error);
  return {p.loss, p.slopes, p.scores};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(FASTPO_CUDA_LIBRARY, FASTPO_CUDA_KEY, m) { m.impl("listwise", TORCH_BOX(&fastpo::forward)); }
