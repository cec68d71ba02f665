#include "isa/baseline.h"
// the kernel, compiled into fastpo::baseline
#include "cauchy.inc"
