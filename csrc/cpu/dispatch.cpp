// The choice of the instruction set, made once: the best that the machine has, or the one that
// FASTPO_CPU_CAPABILITY names.
#include <cstdlib>
#include <string>

#include "../version.h"
#include "isa/common.h"

namespace fastpo {

#define FASTPO_DECLARE(set)                                                 \
  namespace set {                                                           \
  void token_logprobs(const TokenLogprobs&, int64_t, int64_t);              \
  void token_logprobs_backward(const TokenLogprobs&, int64_t, int64_t);     \
  void vocab_divergence(const VocabDivergence&, int64_t, int64_t);          \
  void vocab_divergence_backward(const VocabDivergence&, int64_t, int64_t); \
  void fold_tile(const LogitTile&, int64_t, int64_t);                       \
  void dlogits_tile(const LogitTile&, int64_t, int64_t);                    \
  void objective(const Objective&, int64_t, int64_t, int64_t);              \
  void spread(const Spread&, int64_t, int64_t);                             \
  void scan(const Scan&, int64_t, int64_t);                                 \
  void segments(const Segments&, int64_t, int64_t);                         \
  void policy_objective(const PolicyObjective&, int64_t, int64_t);          \
  void listwise(const Listwise&, int64_t, int64_t);                         \
  void cauchy(const Cauchy&, int64_t, int64_t);                             \
  void cauchy_node_gradient(const Cauchy&, int64_t, int64_t);               \
  void cauchy_pole_gradients(const Cauchy&, int64_t, int64_t);              \
  void vandermonde(const Vandermonde&, int64_t, int64_t);                   \
  void vandermonde_moments(const Vandermonde&, int64_t, int64_t);           \
  }
#define FASTPO_TABLE(set)          \
  {set::token_logprobs,            \
   set::token_logprobs_backward,   \
   set::vocab_divergence,          \
   set::vocab_divergence_backward, \
   set::fold_tile,                 \
   set::dlogits_tile,              \
   set::objective,                 \
   set::spread,                    \
   set::scan,                      \
   set::segments,                  \
   set::policy_objective,          \
   set::listwise,                  \
   set::cauchy,                    \
   set::cauchy_node_gradient,      \
   set::cauchy_pole_gradients,     \
   set::vandermonde,               \
   set::vandermonde_moments}

FASTPO_DECLARE(baseline)
#if FASTPO_X86_SETS
FASTPO_DECLARE(avx2)
FASTPO_DECLARE(avx512)
#endif

namespace {

struct InstructionSet {
  const char* name;
  bool supported;
  Kernels kernels;
};

struct Choice {
  const InstructionSet* set = nullptr;
  std::string supported, error;
};

Choice choose() {
  static const InstructionSet sets[] = {
      {"default", true, FASTPO_TABLE(baseline)},
#if FASTPO_X86_SETS
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       FASTPO_TABLE(avx2)},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       FASTPO_TABLE(avx512)},
#endif
  };
  const char* wanted = std::getenv("FASTPO_CPU_CAPABILITY");
  Choice choice;
  for (const InstructionSet& set : sets) {
    if (set.supported) choice.supported += std::string(choice.supported.empty() ? "" : ", ") + set.name;
    const bool named = wanted && std::string(wanted) == set.name;
    if (set.supported && (named || !wanted)) choice.set = &set;
  }
  if (!choice.set)
    choice.error =
        "FASTPO_CPU_CAPABILITY is '" + std::string(wanted) + "'; this build on this machine has: " + choice.supported;
  return choice;
}

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

}  // namespace

const Kernels& kernels() { return choice().set->kernels; }

}  // namespace fastpo

#define FASTPO_EXPORT extern "C" __attribute__((visibility("default")))

// "" if an instruction set was found, else what is wrong with the one that was asked for
FASTPO_EXPORT const char* fastpo_capability_error() { return fastpo::choice().error.c_str(); }

FASTPO_EXPORT const char* fastpo_capability() { return fastpo::choice().set->name; }

// the instruction sets that were compiled in
FASTPO_EXPORT const char* fastpo_built_for() { return FASTPO_X86_SETS ? "default,avx2,avx512" : "default"; }

// of these, the ones that the machine has, the best last
FASTPO_EXPORT const char* fastpo_supported() { return fastpo::choice().supported.c_str(); }

FASTPO_EXPORT const char* fastpo_version() { return FASTPO_SAYS_VERSION; }
