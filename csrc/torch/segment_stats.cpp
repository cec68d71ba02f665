// fastpo::segment_stats and fastpo::group_members on the CPU. The schemas are in fastpo/kernels/segment_stats.py.
#include "segment_stats.h"

#include <numeric>

namespace fastpo {
namespace {

std::tuple<Tensor, Tensor, Tensor> segment_stats(Tensor values, OptionalTensor weights, OptionalTensor mask,
                                                 OptionalTensor order, OptionalTensor boundaries, int64_t mode,
                                                 int64_t ddof, double eps, bool skip_nan, bool raw_singletons,
                                                 int64_t wanted) {
  PreparedSegments p =
      prepare_segments(values, weights, mask, order, boundaries, mode, ddof, eps, skip_nan, raw_singletons, wanted);
  Segments& s = p.arguments;
  bool outside = false;
  s.outside = &outside;
  if (s.boundaries) {
    // the members of groups are looked at where they are used
    bool ordered = s.order || (s.boundaries[0] == 0 && s.boundaries[s.segments] <= s.total);
    for (int64_t i = 0; !s.order && i < s.segments; ++i) ordered &= s.boundaries[i] <= s.boundaries[i + 1];
    FASTPO_CHECK(ordered, ValueError, "cu_seqlens must rise from 0 to at most ", s.total, ", the number of values");
    // members behind the last segment
    if (s.boundaries[s.segments] < s.total) {
      torch::stable::zero_(p.normalized);
      torch::stable::zero_(p.informative);
    }
  }
  if (s.segments > 0) {
    const Kernels& k = kernels();
    // of groups the empty ones are last: where nothing is wanted of them there is nothing to share out
    int64_t segments = s.segments;
    if (s.order && !s.statistics)
      segments = std::lower_bound(s.boundaries, s.boundaries + segments, s.boundaries[segments]) - s.boundaries;
    const int64_t members = std::max<int64_t>(1, s.total / std::max<int64_t>(1, segments));
    torch::stable::parallel_for(0, segments, std::max<int64_t>(1, 16384 / members),
                                [&](int64_t begin, int64_t end) { k.segments(s, begin, end); });
  }
  STD_TORCH_CHECK(!outside, "fastpo::segment_stats: order is no permutation");
  return {p.statistics, p.normalized, p.informative};
}

// Whether ids are in order, the members of a group adjacent; if so, they are listed.
template <class Id>
bool adjacent_members(const Id* ids, int64_t n, int64_t* order, int64_t* boundaries, int64_t segments) {
  int64_t segment = 0;
  bool falls = false;
  boundaries[0] = 0;
  const auto take = [&](int64_t i) {
    falls |= ids[i] < ids[i - 1];
    // without a branch, which would be mispredicted once a group
    boundaries[segment + 1] = i;
    segment += ids[i] != ids[i - 1];
  };
  int64_t i = 1;
  for (; i + 4 <= n && !falls; i += 4) {
    const Id last = ids[i - 1];
    if (((ids[i] ^ last) | (ids[i + 1] ^ last) | (ids[i + 2] ^ last) | (ids[i + 3] ^ last)) == 0) continue;
    for (int64_t j = i; j < i + 4; ++j) take(j);
  }
  for (; i < n && !falls; ++i) take(i);
  if (falls) return false;
  std::iota(order, order + n, int64_t{0});
  std::fill(boundaries + segment + (n > 0), boundaries + segments + 1, n);
  return true;
}

template <class Id>
void members_of(const Id* ids, int64_t n, int64_t groups, int64_t* order, int64_t* boundaries, int64_t segments) {
  Id lowest = 0, highest = 0;
  if (groups < 0 && n > 0) {
    if (adjacent_members(ids, n, order, boundaries, segments)) return;
    lowest = highest = ids[0];
    for (int64_t i = 1; i < n; ++i) {
      lowest = std::min(lowest, ids[i]);
      highest = std::max(highest, ids[i]);
    }
  }
  const uint64_t range = static_cast<uint64_t>(highest) - static_cast<uint64_t>(lowest);
  if (groups < 0 && range >= static_cast<uint64_t>(4 * n + 1024)) {
    // ids far apart: sorted
    std::iota(order, order + n, int64_t{0});
    std::stable_sort(order, order + n, [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    int64_t segment = 0;
    boundaries[0] = 0;
    for (int64_t j = 1; j < n; ++j)
      if (ids[order[j]] != ids[order[j - 1]]) boundaries[++segment] = j;
    std::fill(boundaries + segment + 1, boundaries + segments + 1, n);
    return;
  }
  // ids close to each other: counted. Ids that nobody has leave no segment where the number of groups is unknown
  const int64_t slots = groups < 0 ? static_cast<int64_t>(range) + 1 : groups;
  std::vector<int64_t> next(static_cast<size_t>(slots), 0);
  for (int64_t i = 0; i < n; ++i) ++next[static_cast<size_t>(ids[i] - lowest)];
  int64_t segment = 0, begin = 0;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t count = next[static_cast<size_t>(slot)];
    next[static_cast<size_t>(slot)] = begin;
    if (count > 0 || groups >= 0) boundaries[segment++] = begin;
    begin += count;
  }
  std::fill(boundaries + segment, boundaries + segments + 1, n);
  for (int64_t i = 0; i < n; ++i) order[next[static_cast<size_t>(ids[i] - lowest)]++] = i;
}

std::tuple<Tensor, Tensor> group_members(Tensor ids, int64_t groups) {
  const Tensor given = as_contiguous(ids);
  const int64_t n = given.numel(), segments = groups < 0 ? n : groups;
  for (int64_t i = 0; groups >= 0 && i < n; ++i) {
    const int64_t id = integer_at(given, i);
    FASTPO_CHECK(id >= 0 && id < groups, IndexError, "group_ids[", i, "] is ", id,
                 ", out of range for num_groups=", groups);
  }
  Tensor order = new_tensor(ids, {n}, ScalarType::Long), boundaries = new_tensor(ids, {segments + 1}, ScalarType::Long);
  int64_t *to = order.mutable_data_ptr<int64_t>(), *of = boundaries.mutable_data_ptr<int64_t>();
  if (is_int64(given))
    members_of(given.const_data_ptr<int64_t>(), n, groups, to, of, segments);
  else
    members_of(given.const_data_ptr<int32_t>(), n, groups, to, of, segments);
  return {order, boundaries};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) {
  m.impl("segment_stats", TORCH_BOX(&fastpo::segment_stats));
  m.impl("group_members", TORCH_BOX(&fastpo::group_members));
}
