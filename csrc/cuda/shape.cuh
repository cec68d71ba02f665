// How kernels over rows are launched.
#pragma once

#include "device.cuh"

namespace FASTPO_NAMESPACE {

// fastpo/kernels/cuda/arguments.py restates it for the launch through CuPy.
struct Shape {
  Int64 blocks;
  int threads;  // per block
  int team;     // threads per row
  int rows;     // per block
};

constexpr int short_row = 1024;  // tokens that one warp takes
constexpr Int64 most_blocks = 16384;

// teams of a warp, or of a whole block for long rows
FASTPO_HOST_DEVICE Shape team_shape(Int64 rows, Int64 tokens) {
  Shape s;
  s.threads = 256;
  s.team = tokens <= short_row ? warp : s.threads;
  s.rows = s.threads / s.team;
  s.blocks = clamp<Int64>(ceil_div<Int64>(rows, s.rows), 1, most_blocks);
  return s;
}

constexpr int team_warps = 8;  // at most

// the highest bit that is set, of a number that is not 0
FASTPO_DEVICE int highest_bit(unsigned x) {
  int place = 0;
  for (int half = 16; half > 0; half /= 2)
    if (x >> half) {
      x >>= half;
      place += half;
    }
  return place;
}

}  // namespace FASTPO_NAMESPACE
