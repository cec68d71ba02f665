// Ends what an instruction set's header began, at the end of a file: clang wants it said.
#if defined(__clang__)
#pragma clang attribute pop
#endif
