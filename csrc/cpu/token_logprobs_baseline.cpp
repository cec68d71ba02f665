#include "isa/baseline.h"
// the kernel, compiled into fastpo::baseline
#include "token_logprobs.inc"
