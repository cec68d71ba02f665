#include "isa/common.h"
#if FASTPO_X86_SETS
#include "isa/avx512.h"
// the kernel, compiled into fastpo::avx512
#include "objective.inc"
// the end of what the set began
#include "isa/end.h"
#endif
