#include "isa/common.h"
#if FASTPO_X86_SETS
#include "isa/avx2.h"
// the kernel, compiled into fastpo::avx2
#include "vandermonde.inc"
// the end of what the set began
#include "isa/end.h"
#endif
