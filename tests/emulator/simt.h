// Runs device code of csrc/cuda on the CPU, and checks what a GPU would not report.
//
// A block's threads are fibers that run one after another, each until it meets a barrier or an operation of its
// warp. Found are: barriers and warp operations that not all threads reach, or not at the same line; shared cells
// that are read before they are written, that are outside the array, or that two threads use without a barrier in
// between; global addresses that are outside the tensors of the launch, or not multiples of the access; overflow
// of signed integers (with -fsanitize=signed-integer-overflow). Not modelled: the memory model between blocks,
// time, and warps that need not be in step but are here run in one order.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <vector>

#include "../../csrc/formulas/types.h"

namespace simt {

constexpr int warp_size = 32;

struct Error {
  std::string text;
};

[[noreturn]] void fail(const std::string& text);

enum class Wait { none, block, warp };

struct Thread {
  int index = 0;
  void* stack_pointer = nullptr;
  bool running = false;
  Wait wait = Wait::none;
  const char* site = nullptr;
  // barriers passed: what happened before the last of them is seen by all it joined
  long block_barriers = 0, warp_barriers = 0;
  unsigned char posted[16] = {}, received[16] = {};
  int partner = 0;
  bool vote = false, fences = false;
  unsigned ballot = 0;

  int warp() const { return index / warp_size; }
};

// set by the scheduler for the thread that runs
extern Thread* current;
extern std::int64_t current_block, block_total;
extern int threads_total;

// gives the processor to the others until the wait is over
void wait_for(Wait, const char* site);

// who used a shared cell last
struct Use {
  int thread = -1;
  long block_barriers = 0, warp_barriers = 0;

  bool is_ordered_before(const Thread& t) const {
    return thread < 0 || thread == t.index || block_barriers < t.block_barriers ||
           (thread / warp_size == t.warp() && warp_barriers < t.warp_barriers);
  }
};

struct Cell {
  bool written = false;
  Use writer;
  std::vector<Use> readers;  // since the last write, the last use of each thread

  void check_read(const char* site, int index);
  void check_write(const char* site, int index);
};

struct AnyShared {
  virtual ~AnyShared() = default;
};

template <class T>
class Shared : public AnyShared {
 public:
  Shared(const char* site, int count) : site_(site), values_(count), cells_(count) {
    static_assert(std::is_trivially_copyable_v<T>);
    std::memset(static_cast<void*>(values_.data()), 0xff, values_.size() * sizeof(T));
  }

  class Reference {
   public:
    Reference(Shared& array, int index) : array_(array), index_(index) {}
    operator T() const {
      array_.cells_[index_].check_read(array_.site_, index_);
      return array_.values_[index_];
    }
    T operator=(T value) {
      array_.cells_[index_].check_write(array_.site_, index_);
      return array_.values_[index_] = value;
    }
    Reference(const Reference&) = default;
    // one cell to another: spell the typed local out
    Reference& operator=(const Reference&) = delete;

   private:
    Shared& array_;
    int index_;
  };

  Reference operator[](std::int64_t i) {
    if (i < 0 || i >= static_cast<std::int64_t>(values_.size()))
      fail("index " + std::to_string(i) + " is outside the " + std::to_string(values_.size()) +
           " cells of the shared array at " + site_);
    return Reference(*this, static_cast<int>(i));
  }

 private:
  const char* site_;
  std::vector<T> values_;
  std::vector<Cell> cells_;
};

// the block's arrays by the line that declares them
extern std::map<std::string, std::unique_ptr<AnyShared>> shared_arrays;

template <class T>
Shared<T>& shared(const char* site, int count) {
  // one line of a template may declare arrays of several types
  std::unique_ptr<AnyShared>& array = shared_arrays[std::string(site) + typeid(T).name()];
  if (!array) array = std::make_unique<Shared<T>>(site, count);
  return static_cast<Shared<T>&>(*array);
}

// throws unless the bytes lie in one of the launch's tensors, which nobody checks if none was named
void check_global(const void* p, std::size_t bytes, bool write);

template <class T>
T exchange(const char* site, T value, int partner) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Thread::posted));
  std::memcpy(current->posted, &value, sizeof value);
  current->partner = partner;
  wait_for(Wait::warp, site);
  std::memcpy(&value, current->received, sizeof value);
  return value;
}

inline unsigned ballot(const char* site, bool condition) {
  current->vote = condition;
  current->partner = current->index % warp_size;
  wait_for(Wait::warp, site);
  return current->ballot;
}

inline void warp_barrier(const char* site) {
  current->partner = current->index % warp_size;
  current->fences = true;
  wait_for(Wait::warp, site);
  current->fences = false;
}

// Runs the grid; null, or the first error in words, which stays until the next launch.
const char* launch(const std::function<void()>& kernel, std::int64_t blocks, std::int64_t threads);

}  // namespace simt

#define FASTPO_HOST_DEVICE inline
#define FASTPO_DEVICE inline
#define FASTPO_KERNEL(name, ...) inline void name(__VA_ARGS__)
#define FASTPO_SMALL_KERNEL(name, ...) FASTPO_KERNEL(name, __VA_ARGS__)
#define FASTPO_PRAGMA(text)
#define FASTPO_UNROLL(times)
#define FASTPO_ARGUMENT(type) const type&

#define SIMT_TEXT_(x) #x
#define SIMT_TEXT(x) SIMT_TEXT_(x)
#define SIMT_SITE __FILE__ ":" SIMT_TEXT(__LINE__)

#define FASTPO_SHARED(type, name, count) auto& name = simt::shared<type>(SIMT_SITE, count)
#define FASTPO_BARRIER() simt::wait_for(simt::Wait::block, SIMT_SITE)
#define FASTPO_WARP_BARRIER() simt::warp_barrier(SIMT_SITE)
#define FASTPO_SHUFFLE_XOR(value, lanes) \
  simt::exchange(SIMT_SITE, value, (simt::current->index % simt::warp_size) ^ (lanes))
#define FASTPO_SHUFFLE(value, lane) simt::exchange(SIMT_SITE, value, lane)
#define FASTPO_BALLOT(condition) simt::ballot(SIMT_SITE, condition)
// one thread runs at a time
#define FASTPO_ATOMIC_ADD(pointer, value) simt::atomic_add(pointer, value)

namespace simt {

template <class T>
T atomic_add(T* p, T value) {
  check_global(p, sizeof *p, true);
  const T before = *p;
  *p += value;
  return before;
}

}  // namespace simt

namespace fastpo::gpu {

inline int thread_index() { return simt::current->index; }
inline int block_threads() { return simt::threads_total; }
inline Int64 block_index() { return simt::current_block; }
inline Int64 block_count() { return simt::block_total; }

template <class T>
T load(const T* p) {
  simt::check_global(p, sizeof *p, false);
  return *p;
}
template <class T>
void store(T* p, T value) {
  simt::check_global(p, sizeof *p, true);
  *p = value;
}
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

}  // namespace fastpo::gpu
