// fastpo::listwise on the CPU. The schema is in fastpo/kernels/listwise.py.
#include "listwise.h"

namespace fastpo {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(int64_t kind, Tensor policy, OptionalTensor other, Tensor targets,
                                           OptionalTensor mask, OptionalTensor cu_seqlens, std::vector<double> numbers,
                                           bool pair_mean, bool reduce, std::optional<double> denominator) {
  PreparedLists p =
      prepare_lists(kind, policy, other, targets, mask, cu_seqlens, numbers, pair_mean, reduce, denominator);
  Listwise& o = p.arguments;
  if (const int* b = o.boundaries) {
    bool ordered = b[0] == 0 && b[o.lists] <= o.total;
    int longest = 0;
    for (int64_t i = 0; ordered && i < o.lists; ++i) {
      ordered = b[i] <= b[i + 1];
      longest = std::max(longest, b[i + 1] - b[i]);
    }
    FASTPO_CHECK(ordered, ValueError, "cu_seqlens must rise from 0 to at most ", o.total, ", the number of items");
    FASTPO_CHECK(longest <= max_list, ValueError, "cu_seqlens has a list of ", longest, " items; at most ", max_list,
                 " are supported");
    // items behind the last list
    if (b[o.lists] < o.total) {
      torch::stable::zero_(p.slopes);
      torch::stable::zero_(p.scores);
    }
  }
  advise_huge_pages(p.slopes);
  advise_huge_pages(p.scores);
  std::vector<double> list_loss(static_cast<size_t>(o.lists));
  o.list_loss = list_loss.data();
  // a thread is worth waking for about 8k items that are only read once, and for fewer that meet each other
  const int64_t items = std::max<int64_t>(1, o.total / std::max<int64_t>(1, o.lists));
  const int64_t grain = std::max<int64_t>(1, 8192 / (items * (1 + items / 16)));
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, o.lists, grain, [&](int64_t begin, int64_t end) { k.listwise(o, begin, end); });
  const auto put = [&](int64_t i, double value) {
    if (o.is_double)
      static_cast<double*>(p.loss.mutable_data_ptr())[i] = value;
    else
      static_cast<float*>(p.loss.mutable_data_ptr())[i] = static_cast<float>(value);
  };
  double total = 0;
  for (int64_t i = 0; i < o.lists; ++i) total += list_loss[static_cast<size_t>(i)];
  for (int64_t i = 0; !reduce && i < o.lists; ++i) put(i, list_loss[static_cast<size_t>(i)]);
  if (reduce) put(0, total / p.denominator);
  return {p.loss, p.slopes, p.scores};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) { m.impl("listwise", TORCH_BOX(&fastpo::forward)); }

#define FASTPO_NAME(name) "," #name

// names of the objectives, in the order of their places
FASTPO_EXPORT const char* fastpo_list_kinds() { return &(FASTPO_LIST_KINDS(FASTPO_NAME))[1]; }
