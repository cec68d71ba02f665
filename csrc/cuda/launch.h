// The launches of csrc/cuda as the torch side sees them; nothing here needs CUDA.
#pragma once

#include "../arguments.h"

namespace fastpo::gpu {

// Each returns null, or what went wrong in words. `stream` is a cudaStream_t of the current device.
// `block_loss` has objective_blocks() doubles; `loss` is the scalar of a reduced loss, or null.
const char* objective(const Objective&, Int64 tokens, double denominator, void* loss, void* stream);
const char* objective_spread(const Spread* sides, int count, Int64 tokens, void* stream);

// `tokens` per row, `members` per segment, on average
const char* affine_scan(const Scan&, Int64 tokens, void* stream);
const char* segment_stats(const Segments&, Int64 members, void* stream);

// The rows' numbers of `PolicyObjective` are on the device; sums and maxima are those of all rows.
const char* policy_objective(const PolicyObjective&, bool reduce, void* loss, double* sums, double* maxima,
                             void* stream);

// The lists' losses and the scratch of `Listwise` are on the device; `items` per list, on average.
const char* listwise(const Listwise&, Int64 items, bool reduce, double denominator, void* loss, void* stream);

const char* cauchy(const Cauchy&, void* stream);
// the gradient by the nodes
const char* cauchy_slopes(const Cauchy&, void* stream);
// The gradients by poles and residues. `sums` has 4 doubles for each of cauchy_parts() of each pole of each row, and is
// null where there is but one part.
const char* cauchy_poles(const Cauchy&, double* sums, void* stream);
Int64 cauchy_parts(const Cauchy&);

const char* vandermonde(const Vandermonde&, void* stream);
// `sums` likewise, for each term
const char* vandermonde_moments(const Vandermonde&, double* sums, void* stream);
Int64 vandermonde_moment_parts(const Vandermonde&);

Int64 objective_blocks(Int64 rows, Int64 tokens, int streams);

}  // namespace fastpo::gpu
