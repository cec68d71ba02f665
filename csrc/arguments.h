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
// models whose log-probs a side has: policy, reference, previous iterate
constexpr int max_models = 3;
constexpr int max_streams = max_sides * max_models;
constexpr int max_given = 4;  // columns
constexpr int max_hyper = 64;

// what an objective does with lengths, as bits
constexpr int average = 1;          // log-probs are averages over the tokens
constexpr int average_rewards = 2;  // so are the rewards
constexpr int count = 4;            // the formula sees the lengths

struct Objective {
  Layout layouts[max_sides];
  Stream stream[max_streams];  // of every model in turn, one per side
  Stream column[max_given];    // one number per row
  double hyper[max_hyper];
  double scale;         // 1 / denominator, applied to the slopes
  double reward_scale;  // beta
  Int64 rows;
  void* loss;          // (rows,), or null if only the sum is wanted
  double* block_loss;  // sum of the losses of each block, for a sum whose order no thread count changes
  void* slopes;        // (sides, rows)
  void* rewards;       // (sides, rows)
  int formula;         // its place among those of as many sides
  int sides;
  int models;
  int columns;
  int use_lengths;
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

constexpr int max_policy_numbers = 32;
constexpr int max_policy_choices = 16;

// An objective on the tokens of sampled completions: see formulas/policy.h. Streams that are absent have no data.
struct PolicyObjective {
  Layout layout;
  const bool* selected;  // in the mask's layout, or null
  Stream logprobs, old, reference, rollout, entropy;
  Stream advantages;  // per token, or one per row
  bool advantage_per_row;
  bool use_threshold;
  bool is_double;  // the accumulator's type, that of loss and slopes
  int formula;
  double numbers[max_policy_numbers];
  int choices[max_policy_choices];
  Int64 rows;
  double* row_loss;      // (rows,)
  double* row_sums;      // (rows, sums)
  double* row_maxima;    // (rows, maxima)
  void* slopes;          // as the log-probs, contiguous
  void* entropy_slopes;  // the same, or null if not wanted
};

}  // namespace fastpo
