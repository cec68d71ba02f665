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

#if FASTPO_X86_SETS
struct Leaf {
  unsigned a, b, c, d;
};

Leaf cpuid(unsigned leaf) {
  Leaf r;
  asm volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(0));
  return r;
}

// Whether this machine has avx2 and avx512 as they are compiled for: the instructions, and registers that the system
// saves. __builtin_cpu_supports needs a library that clang-cl does not link, and clang knows fewer names than g++.
struct Features {
  bool avx2 = false, avx512 = false;

  Features() {
    constexpr unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    constexpr unsigned first = fma | osxsave | avx | f16c, second = 1u << 5;
    constexpr unsigned avx512f = 1u << 16, avx512dq = 1u << 17, avx512bw = 1u << 30, avx512vl = 1u << 31;
    constexpr unsigned all = avx512f | avx512dq | avx512bw | avx512vl;
    // both halves of 16 registers; the masks, the upper quarters and the other 16
    constexpr unsigned saved_avx = 0x06, saved_avx512 = 0xe0;
    if (cpuid(0).a < 7 || (cpuid(1).c & first) != first) return;
    unsigned saved, above;
    asm volatile("xgetbv" : "=a"(saved), "=d"(above) : "c"(0));
    const unsigned has = cpuid(7).b;
    avx2 = (has & second) && (saved & saved_avx) == saved_avx;
    avx512 = avx2 && (has & all) == all && (saved & saved_avx512) == saved_avx512;
  }
};
#endif

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
#if FASTPO_X86_SETS
  const Features features;
#endif
  static const InstructionSet sets[] = {
      {"default", true, FASTPO_TABLE(baseline)},
#if FASTPO_X86_SETS
      {"avx2", features.avx2, FASTPO_TABLE(avx2)},
      {"avx512", features.avx512, FASTPO_TABLE(avx512)},
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

// "" if an instruction set was found, else what is wrong with the one that was asked for
FASTPO_EXPORT const char* fastpo_capability_error() { return fastpo::choice().error.c_str(); }

FASTPO_EXPORT const char* fastpo_capability() { return fastpo::choice().set->name; }

// the instruction sets that were compiled in
FASTPO_EXPORT const char* fastpo_built_for() { return FASTPO_X86_SETS ? "default,avx2,avx512" : "default"; }

// of these, the ones that the machine has, the best last
FASTPO_EXPORT const char* fastpo_supported() { return fastpo::choice().supported.c_str(); }

FASTPO_EXPORT const char* fastpo_version() { return FASTPO_SAYS_VERSION; }
