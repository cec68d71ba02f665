// What the kernels are told, as plain structs that CPU, GPU and the Python launchers (fastpo/kernels/cuda restates
// them) share.
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

// a contiguous tensor of numbers, or null
struct Numbers {
  const void* data;
  DType dtype;
};

// What is walked: x_t = a x_(t+1) + b over given a and b; its gradient; or returns and advantages, whose a and b are
// made of rewards and values.
enum class ScanKind : int { affine, adjoint, advantage };

constexpr int max_scan_streams = 4;

// Rows of tokens, walked from their end to their beginning, or the other way.
struct Scan {
  // affine: a, b; adjoint: a, the gradient of x, x before each step; advantage: rewards, values, next values,
  // log-ratios
  Numbers stream[max_scan_streams];
  Numbers initial;         // per row: x before the first step; advantage: the value behind the row's last token
  const bool* mask;        // what is masked is passed over, and its outputs are 0
  const bool* terminated;  // per token
  const bool* truncated;
  const bool* repeat;  // per row: the value behind the last token is that token's own
  const int* boundaries;
  Int64 rows;
  Int64 tokens;  // per row, if there are no boundaries
  Int64 total;
  // affine: x, x before each step; adjoint: gradients of a and b; advantage: advantages, returns. Null if not wanted
  void* out[2];
  void* last;  // per row: x after the last step
  double gamma, lambda, rho_bar, c_bar;
  double* composites;  // long rows on the CPU: what each chunk does to x, as a slope and a shift; then x before it
  Int64 chunks;        // per row
  int phase;           // 0: rows in one piece; 1: composites of the chunks; 2: chunks from their x
  ScanKind kind;
  bool reverse;
  bool holes;      // advantage: masked tokens between others are steps without reward and value
  bool is_double;  // type of the outputs
};

// what a member becomes: less the mean; and divided by the standard deviation; less the mean of the others; of the
// best member its lead over the second, and 0 of the others; and that divided by the standard deviation
enum class Normalize : int { center, standardize, leave_one_out, lead, standardized_lead };

// Segments of numbers: rows, or sequences between boundaries, or members in an order between boundaries.
struct Segments {
  Numbers values;
  Numbers weights;  // of the mean that is taken off
  const bool* mask;
  const Int64* order;
  const Int64* boundaries;
  Int64 segments;
  Int64 members;  // per segment, if there are no boundaries
  Int64 total;
  double* statistics;  // (6, segments): count, sum, mean, variance, min, max; or null
  void* normalized;    // per member, or null
  bool* informative;   // per member: it counts, and its segment is not constant; or null
  double eps;
  int ddof;
  Normalize mode;
  bool skip_nan;  // a NaN does not count
  bool raw_singletons;
  bool is_double;  // type of the outputs
  bool* outside;   // becomes true where order has places that are none; CPU
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

constexpr int max_list = 1024;  // items

// Lists of items, each with a score and a target: see formulas/listwise.h. Everything is contiguous.
struct Listwise {
  Numbers policy;
  Numbers other;  // in the policy's layout: what is taken off it; of pro, what it is divided by
  Numbers targets;
  const bool* mask;
  const int* boundaries;
  Int64 lists;
  Int64 items;  // per list, if there are no boundaries
  Int64 total;
  double scale;         // of the scores
  double target_scale;  // of the targets
  double weight;        // of the pairs; of pro, of the best item's log-prob
  double factor;        // 1 / denominator, applied to the slopes
  bool pair_mean;       // over the pairs of a list, else their sum
  bool is_double;       // the accumulator's type, that of slopes and scores
  int kind;
  double* list_loss;  // (lists,)
  void* slopes;       // by the policy's log-probs
  void* scores;
  double* scratch;  // on the GPU: one number per item
};

constexpr int max_leading = 8;

// The leading dimensions of tensors that are broadcast, merged where that is the same: rows are counted over them.
struct Leading {
  int dims;
  Int64 sizes[max_leading];
};

// A tensor (..., K) of which each row is contiguous: complex numbers as pairs, or real ones.
struct Operand {
  const void* data;
  Int64 strides[max_leading];  // in numbers, 0 where it is broadcast
};

// Σ_n v_n / (z_l - w_n), and with `symmetric` the same of the conjugates of v and w; and its gradients. All numbers are
// complex of one type, outputs are contiguous.
struct Cauchy {
  Leading leading;
  Operand v, w;  // (rows, poles)
  Operand z;     // (rows, nodes)
  Operand grad;  // (rows, nodes), of the backward
  Int64 rows, poles, nodes;
  void* out;     // (rows, nodes)
  void* grad_v;  // (rows, poles), null if not wanted, as the others
  void* grad_z;  // (rows, nodes)
  void* grad_w;  // (rows, poles)
  bool symmetric;
  bool is_double;
};

// Σ_n v_n e^(x_n l), or with `real` twice its real part; and the moments Σ_l u_l e^(x_n l), Σ_l l u_l e^(x_n l), where
// `real` means u. All other numbers are complex of the same type, outputs are contiguous.
struct Vandermonde {
  Leading leading;
  Operand v, x;  // (rows, terms)
  Operand u;     // (rows, length), of the moments
  Int64 rows, terms, length;
  void* out;     // (rows, length)
  void* moment;  // (rows, terms)
  void* slope;   // (rows, terms), or null if not wanted
  bool real;
  bool is_double;
};

}  // namespace fastpo
