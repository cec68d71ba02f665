#include "isa/baseline.h"
// the kernel, compiled into fastpo::baseline
#include "vocab_divergence.inc"
