// Kernels with a planted bug each, and beside it the same kernel without: `fixed` chooses. Every bug is one that
// thread order alone need not show.
#include <string>

#include "../../csrc/cuda/device.cuh"

using namespace fastpo::gpu;

namespace {

struct Arguments {
  int fixed;
  fastpo::Int64 n;
  const float* in;
  float* out;
};

// the cells are used for a second value while slow threads may still read the first
void missing_barrier(const Arguments& a) {
  FASTPO_SHARED(float, cells, 32);
  const int thread = thread_index(), lane = thread % 32, of_warp = thread / 32;
  for (int round = 0; round < 2; ++round) {
    const float sum = warp_sum(load(a.in + thread));
    if (lane == 0) cells[of_warp] = sum;
    FASTPO_BARRIER();
    float total = 0;
    for (int i = 0; i < block_threads() / 32; ++i) {
      const float part = cells[i];
      total += part;
    }
    store(a.out + thread, total);
    if (a.fixed) FASTPO_BARRIER();
  }
}

// lanes of one warp hand values on through shared memory, which takes a warp barrier
void missing_warp_barrier(const Arguments& a) {
  FASTPO_SHARED(float, cells, 64);
  const int thread = thread_index();
  cells[thread] = load(a.in + thread);
  FASTPO_WARP_BARRIER();
  const float next = cells[thread ^ 1];
  if (a.fixed) FASTPO_WARP_BARRIER();
  cells[thread] = next;
  store(a.out + thread, next);
}

// a shuffle brings the lanes together, and orders nothing in memory
void shuffle_as_fence(const Arguments& a) {
  FASTPO_SHARED(float, cells, 64);
  const int thread = thread_index();
  cells[thread] = load(a.in + thread);
  const float sum = warp_sum(load(a.in + thread));
  if (a.fixed) FASTPO_WARP_BARRIER();
  const float next = cells[thread ^ 1];
  store(a.out + thread, next + sum);
}

void shared_out_of_bounds(const Arguments& a) {
  FASTPO_SHARED(float, cells, 32);
  const int thread = thread_index(), cell = a.fixed ? thread % 32 : thread % 33;
  if (thread < 33 - a.fixed) cells[cell] = 1.0f;
  FASTPO_BARRIER();
  store(a.out + thread, 1.0f);
}

void uninitialised(const Arguments& a) {
  FASTPO_SHARED(float, cells, 64);
  const int thread = thread_index();
  if (a.fixed || thread != 7) cells[thread] = 1.0f;
  FASTPO_BARRIER();
  const float other = cells[63 - thread];
  store(a.out + thread, other);
}

void divergent_barrier(const Arguments& a) {
  const int thread = thread_index();
  if (a.fixed || thread % 2 == 0)
    FASTPO_BARRIER();
  else
    FASTPO_BARRIER();
  store(a.out + thread, 1.0f);
}

void barrier_after_exit(const Arguments& a) {
  const int thread = thread_index();
  if (!a.fixed && thread == 63) return;
  FASTPO_BARRIER();
  store(a.out + thread, 1.0f);
}

void half_warp_shuffle(const Arguments& a) {
  const int thread = thread_index();
  float value = load(a.in + thread);
  if (a.fixed || thread % 32 < 16) value = FASTPO_SHUFFLE_XOR(value, 8);
  store(a.out + thread, value);
}

void divergent_shuffle(const Arguments& a) {
  const int thread = thread_index();
  float value = load(a.in + thread);
  if (a.fixed || thread % 2 == 0)
    value = FASTPO_SHUFFLE_XOR(value, 1);
  else
    value = FASTPO_SHUFFLE_XOR(value, 1);
  store(a.out + thread, value);
}

void read_behind(const Arguments& a) {
  const int thread = thread_index();
  const float value = load(a.in + thread + (a.fixed ? 0 : 1));
  store(a.out + thread, value);
}

void write_input(const Arguments& a) {
  const int thread = thread_index();
  store(a.fixed ? a.out + thread : const_cast<float*>(a.in) + thread, 1.0f);
}

void misaligned_vector(const Arguments& a) {
  if (thread_index() >= 15) return;
  const auto* p = reinterpret_cast<const Vector<float, 4>*>(a.in + (a.fixed ? 0 : 1)) + thread_index();
  const Vector<float, 4> x = load(p);
  store(a.out + thread_index(), x.at[0]);
}

// no bug: the operations that no kernel uses yet
void operations(const Arguments& a) {
  FASTPO_SHARED(int, cells, 1);
  const int thread = thread_index();
  const unsigned odd = FASTPO_BALLOT(thread % 2 == 1);
  const float of_lane = FASTPO_SHUFFLE(load(a.in + thread), thread % 32 / 4);
  if (thread == 0) cells[0] = static_cast<int>(odd == 0xaaaaaaaau);
  FASTPO_BARRIER();
  const int right = cells[0];
  store(a.out + thread, right ? of_lane : -1.0f);
  if (thread == 0) store(a.out + 64, 0.0f);
  FASTPO_BARRIER();
  FASTPO_ATOMIC_ADD(a.out + 64, 2.0f);
}

// 32 bits do not hold an offset into a large tensor
void int_overflow(const Arguments& a) {
  const int thread = thread_index(), n = static_cast<int>(a.n);
  const fastpo::Int64 wide = static_cast<fastpo::Int64>(thread) * a.n;
  const fastpo::Int64 offset = a.fixed ? wide : thread * n;
  store(a.out + thread, offset > 0 ? 1.0f : 0.0f);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* bug_run(const char* name, void* arguments) {
  const Arguments& a = *static_cast<const Arguments*>(arguments);
  const std::string kernel = name;
#define BUG(name) \
  if (kernel == #name) return simt::launch([&] { name(a); }, 1, 64)
  BUG(missing_barrier);
  BUG(missing_warp_barrier);
  BUG(shuffle_as_fence);
  BUG(shared_out_of_bounds);
  BUG(uninitialised);
  BUG(divergent_barrier);
  BUG(barrier_after_exit);
  BUG(half_warp_shuffle);
  BUG(divergent_shuffle);
  BUG(read_behind);
  BUG(write_input);
  BUG(misaligned_vector);
  BUG(operations);
  BUG(int_overflow);
  return "there is no such kernel";
}
