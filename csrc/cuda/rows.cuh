// What the kernels on rows of tokens share: where the tokens are, sums over a block.
#pragma once

#include "../arguments.h"
#include "dtypes.cuh"
#include "shape.cuh"

namespace FASTPO_NAMESPACE {

struct Tokens {
  Int64 first, count;
};

// Boundaries are read on the device and cannot be refused there: what is not inside the stream has count -1.
FASTPO_DEVICE Tokens tokens_of(const Layout& layout, Int64 row, Int64 row_stride) {
  if (!layout.boundaries) return {row * row_stride, layout.tokens};
  const Int64 begin = load(layout.boundaries + row), end = load(layout.boundaries + row + 1);
  const bool inside = (row > 0 ? 0 <= begin : 0 == begin) && begin <= end && end <= layout.total;
  return {inside ? begin : 0, inside ? end - begin : -1};
}

FASTPO_DEVICE const bool* mask_of(const Layout& layout, Int64 row) {
  return layout.mask ? layout.mask + tokens_of(layout, row, layout.mask_stride).first : nullptr;
}

// Sum over the block, of use to its first thread only; all threads take part. `sums` has a cell per warp.
template <class Cells>
FASTPO_DEVICE double block_sum(Cells& sums, double value) {
  const int thread = thread_index(), warps = ceil_div(block_threads(), warp);
  const double of_warp = warp_sum(value);
  if (thread % warp == 0) sums[thread / warp] = of_warp;
  FASTPO_BARRIER();
  double total = 0;
  if (thread == 0)
    for (int i = 0; i < warps; ++i) {
      const double part = sums[i];
      total += part;
    }
  return total;
}

}  // namespace FASTPO_NAMESPACE
