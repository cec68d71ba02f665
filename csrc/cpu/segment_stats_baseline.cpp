#include "isa/baseline.h"
// the kernel, compiled into fastpo::baseline
#include "segment_stats.inc"
