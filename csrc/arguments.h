// What the objective kernels are told, as plain structs that CPU, GPU and the Python launcher
// (fastpo/kernels/cuda/objective.py restates them) share.
#pragma once

#include "formulas/types.h"

namespace fastpo {

// One side of the rows of an objective: where its tokens are. Without mask and boundaries, and with tokens =
// 1, the stream is summed already.
struct Layout {
  const bool* mask;  // same layout as the streams
  Int64 mask_stride;
  const int* boundaries;
  Int64 tokens;         // per row, if there are no boundaries
  Int64 total;          // tokens of a packed stream
  const void* lengths;  // given lengths of summed streams
  bool lengths_are_int64;
};

struct Stream {
  const void* data;
  Int64 row_stride;  // in elements; the tokens of a row are adjacent
  DType dtype;
};

constexpr int max_sides = 2;
constexpr int max_streams = 4;
constexpr int max_hyper = 64;

struct Objective {
  Layout layouts[max_sides];
  Stream stream[max_streams];
  double hyper[max_hyper];
  double scale;         // 1 / denominator, applied to the slopes
  double reward_scale;  // beta
  Int64 rows;
  void* loss;          // (rows,), or null if only the sum is wanted
  double* block_loss;  // sum of the losses of each block, for a sum whose order no thread count changes
  void* slopes;        // (sides, rows)
  void* rewards;       // (sides, rows)
  int formula;
  int streams;
  bool length_norm;
  bool is_double;  // the accumulator's type, that of all outputs
};

// gradient of one token stream: grad * slope where the token counts, else 0
struct Spread {
  Layout layout;
  Int64 rows;
  const void* grad;
  const void* slopes;
  void* gradient;  // contiguous
  DType dtype;
  bool is_double;  // type of grad and slopes
  bool grad_per_row;
};

}  // namespace fastpo
