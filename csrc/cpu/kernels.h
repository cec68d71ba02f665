// The CPU kernels as the torch side sees them: plain structs and function pointers, one table per instruction
// set.
#pragma once

#include <cstdint>

#include "../arguments.h"

// what Python asks a library by name
#if defined(_WIN32)
#define FASTPO_EXPORT extern "C" __declspec(dllexport)
#else
#define FASTPO_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace fastpo {

// Rows of a strided tensor (..., n): where row r starts, and the stride inside it.
struct Rows {
  static constexpr int max_dims = 16;
  void* data;
  int64_t columns;
  int64_t stride;  // between columns, in elements
  int dims;        // leading dimensions
  int64_t sizes[max_dims];
  int64_t strides[max_dims];

  int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return dims > 0 ? at + row * strides[0] : 0;
  }

  int64_t count() const {
    int64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }
};

// Outputs and gradients are in the accumulator's type: double for f64 logits, else float. All are contiguous.
struct TokenLogprobs {
  Rows logits;
  DType dtype;
  int64_t rows;
  int64_t ids;  // targets per row
  const void* targets;
  bool targets_are_int64;
  int64_t ignore_index;
  const void* temperatures;  // per row, in the accumulator's type, or null
  double temperature;
  const uint32_t* allowed;  // bit c % 32 of word c / 32 where column c takes part, or null: all do
  int64_t allowed_stride;   // words from row to row: 0 for a set that all share
  void* row_max;
  void* row_sum;
  // forward: outputs, null if not wanted
  void* logprobs;
  void* entropy;
  void* logsumexp;
  void* log_sum_p2;
  int64_t* top1;
  // backward: upstream gradients, null if absent; `entropy` is then the forward's
  const void* grad_logprobs;
  const void* grad_entropy;
  const void* grad_logsumexp;
  Rows gradient;  // may be the logits themselves

  int64_t target(int64_t i) const {
    return targets_are_int64 ? static_cast<const int64_t*>(targets)[i] : static_cast<const int32_t*>(targets)[i];
  }
};

// Of p from q. The order is that of fastpo/kernels/vocab_divergence.py, and grows at its end only.
enum class Divergence : int { kl, jsd, skew_kl, total_variation, alpha, count };

// Rows of two streams of logits, of the reference's p = softmax(reference / T) and the policy's q = softmax(logits /
// T). Everything but them is contiguous; outputs are in the accumulator's type, gradients in that of the logits.
struct VocabDivergence {
  Rows logits, reference;
  DType dtype;
  int64_t rows;
  const bool* mask;          // per row, or null
  const void* temperatures;  // per row, in the accumulator's type, or null
  double temperature;
  Divergence kind;
  double parameter;  // β of jsd, λ of skew_kl, α of alpha
  void* divergence;  // (rows,)
  void* state;  // (numbers(), rows): both largest logits, Σ e^((a - max) / T) of the reference, log of its ratio to
                // q's; KL(p || m) and KL(q || m) of jsd, E of skew_kl; P of total_variation
  // backward
  const void* grad;
  void* grad_logits;  // null if not wanted
  void* grad_reference;

  int numbers() const {
    switch (kind) {
      case Divergence::jsd:
        return 6;
      case Divergence::skew_kl:
      case Divergence::total_variation:
        return 5;
      default:
        return 4;
    }
  }
};

// Rows of logits for some columns of a vocabulary, between two matrix products. All per-row numbers are double.
struct LogitTile {
  void* data;
  DType dtype;
  int64_t rows, columns, row_stride;
  int64_t first;  // number of the first column in the vocabulary
  int64_t ids;
  const int64_t* targets;   // (rows, ids); what is in no column is passed over
  const double* inverse;    // what turns a number under the softmax into its exponent: 1 / T, scaled if there is no cap
  double logit_scale, cap;  // with cap > 0 the softmax is of cap tanh(logit_scale x / cap) / T
  double* state;            // (4, rows): the largest so far, and the sums of softmax.h
  const uint32_t* allowed;  // as in TokenLogprobs, for the tile's columns; a target that is here is allowed
  int64_t allowed_stride;
  // fold: null if not wanted
  bool weighted, squared;
  double* taken;  // (rows, ids), the numbers at the targets
  int64_t* top1;
  double* total;  // sum over the columns
  // dlogits: the gradient of column x is 2^t (at + slope t), plus grads at the targets
  const double* at;
  const double* slope;
  const double* grads;
};

// tokens that are brought into one type before a policy objective runs over them
constexpr int policy_chunk = 1024;

// the most rows whose sums are held while the formula of an objective runs over them, and of how many any number of
// rows is a multiple: whole vectors of every instruction set
constexpr int objective_block = 256, objective_lanes = 16;

// what one item of the work of cauchy and vandermonde is: nodes or poles, steps or terms of a row
constexpr int cauchy_nodes = 512, cauchy_poles = 16, vandermonde_chunk = 4096, vandermonde_terms = 16;

struct Kernels {
  void (*token_logprobs)(const TokenLogprobs&, int64_t begin, int64_t end);
  void (*token_logprobs_backward)(const TokenLogprobs&, int64_t begin, int64_t end);
  void (*vocab_divergence)(const VocabDivergence&, int64_t begin, int64_t end);
  void (*vocab_divergence_backward)(const VocabDivergence&, int64_t begin, int64_t end);
  void (*fold_tile)(const LogitTile&, int64_t begin, int64_t end);
  void (*dlogits_tile)(const LogitTile&, int64_t begin, int64_t end);
  void (*objective)(const Objective&, int64_t block_rows, int64_t first_block, int64_t last_block);
  void (*spread)(const Spread&, int64_t begin, int64_t end);
  void (*scan)(const Scan&, int64_t begin, int64_t end);
  void (*segments)(const Segments&, int64_t begin, int64_t end);
  void (*policy_objective)(const PolicyObjective&, int64_t begin, int64_t end);
  void (*listwise)(const Listwise&, int64_t begin, int64_t end);
  void (*cauchy)(const Cauchy&, int64_t begin, int64_t end);
  void (*cauchy_node_gradient)(const Cauchy&, int64_t begin, int64_t end);
  void (*cauchy_pole_gradients)(const Cauchy&, int64_t begin, int64_t end);
  void (*vandermonde)(const Vandermonde&, int64_t begin, int64_t end);
  void (*vandermonde_moments)(const Vandermonde&, int64_t begin, int64_t end);
};

// the table of the instruction set in force
const Kernels& kernels();

}  // namespace fastpo
