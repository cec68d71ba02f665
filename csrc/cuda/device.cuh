// The whole vocabulary of fastpo's device code: nvcc, NVRTC and the emulator of tests/emulator compile kernels
// that use nothing else. README.md beside this file has the rules.
#pragma once

#define FASTPO_NAMESPACE fastpo::gpu

#include "../formulas/types.h"

#if defined(FASTPO_EMULATOR)
// defines what follows for the CPU, with checks
#include "simt.h"
#else

#define FASTPO_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTPO_DEVICE __device__ __forceinline__
// C names, so that NVRTC's need no mangling. With at most 512 threads in a block, each may have 128 registers; told
// that one block per multiprocessor will do, the assembler does not spill to fit a second.
#define FASTPO_KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(512, 1) name(__VA_ARGS__)
// at most 256 threads, which may have all the registers that a thread can address
#define FASTPO_SMALL_KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(256, 1) name(__VA_ARGS__)

#define FASTPO_PRAGMA(text) _Pragma(#text)
#define FASTPO_UNROLL(times) FASTPO_PRAGMA(unroll times)

// arguments stay in constant memory, also when they are indexed
#define FASTPO_ARGUMENT(type) const __grid_constant__ type

// block-wide array; a cell is read into a typed local before it is used
#define FASTPO_SHARED(type, name, count) __shared__ type name[count]
// all threads of the block
#define FASTPO_BARRIER() __syncthreads()
// all lanes of the warp
#define FASTPO_WARP_BARRIER() __syncwarp()
#define FASTPO_SHUFFLE_XOR(value, lanes) __shfl_xor_sync(0xffffffffu, value, lanes)
#define FASTPO_SHUFFLE(value, lane) __shfl_sync(0xffffffffu, value, lane)
#define FASTPO_BALLOT(condition) __ballot_sync(0xffffffffu, condition)
#define FASTPO_ATOMIC_ADD(pointer, value) atomicAdd(pointer, value)

namespace fastpo::gpu {

FASTPO_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTPO_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FASTPO_DEVICE Int64 block_index() { return blockIdx.x; }
FASTPO_DEVICE Int64 block_count() { return gridDim.x; }

// Global memory, 1 to 16 bytes at an address that is a multiple of their number.
template <class T>
FASTPO_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
FASTPO_DEVICE void store(T* p, T value) {
  *p = value;
}

// a b + c, rounded once
FASTPO_DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

}  // namespace fastpo::gpu
#endif

namespace fastpo::gpu {

constexpr int warp = 32;

// N elements that are loaded or stored by one instruction
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// sum over the lanes of a warp, the same in each
template <class T>
FASTPO_DEVICE T warp_sum(T value) {
  for (int lanes = warp / 2; lanes > 0; lanes /= 2) {
    const T other = FASTPO_SHUFFLE_XOR(value, lanes);
    value += other;
  }
  return value;
}

template <class T>
FASTPO_HOST_DEVICE T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
FASTPO_HOST_DEVICE T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

}  // namespace fastpo::gpu
