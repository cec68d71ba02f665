// The scheduler of the emulator: fibers, barriers, and the checks that simt.h promises.
#include "simt.h"

#include <algorithm>
#include <exception>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches fibers in x86-64 assembly for the System V calling convention"
#endif

// Saves the registers that a call preserves on the old stack, takes those of the new one: 14 ns, where ucontext's
// system call takes 456.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {

Thread* current = nullptr;
std::int64_t current_block = 0, block_total = 0;
int threads_total = 0;
std::map<std::string, std::unique_ptr<AnyShared>> shared_arrays;

namespace {

struct Range {
  std::uintptr_t begin, end;
  bool writable;
};

struct Settings {
  bool reversed = false;
  std::vector<Range> ranges;
  std::vector<std::int64_t> blocks;  // only these are run, if any are named
};
Settings settings;

constexpr std::size_t stack_bytes = 128 << 10;
constexpr std::uint64_t canary = 0x5ca1ab1e0ddba11;

void* scheduler = nullptr;
const std::function<void()>* body = nullptr;
std::string error;

std::string where(const Thread& t) {
  return "thread " + std::to_string(t.index) + " of block " + std::to_string(current_block);
}

void run_thread() {
  try {
    (*body)();
  } catch (const Error& e) {
    if (error.empty()) error = e.text;
  } catch (const std::exception& e) {
    if (error.empty()) error = e.what();
  }
  current->running = false;
  simt_switch(&current->stack_pointer, scheduler);
}

class Stacks {
 public:
  char* at(int thread) {
    while (static_cast<int>(stacks_.size()) <= thread)
      stacks_.push_back(std::unique_ptr<char[]>(new char[stack_bytes]));
    return stacks_[static_cast<std::size_t>(thread)].get();
  }

 private:
  std::vector<std::unique_ptr<char[]>> stacks_;
};
Stacks stacks;

void start(Thread& t, int index) {
  t = Thread{};
  t.index = index;
  t.running = true;
  char* stack = stacks.at(index);
  std::memcpy(stack, &canary, sizeof canary);
  // as if simt_switch had been called by a function that returns to run_thread, whose stack is aligned as after a call
  auto* top = reinterpret_cast<void**>((reinterpret_cast<std::uintptr_t>(stack) + stack_bytes) & ~std::uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.stack_pointer = top;
}

// All lanes of a warp wait: exchange their values. False if nothing can be done yet.
bool release_warp(Thread* lanes) {
  int waiting = 0, ended = 0, at_block = 0;
  for (int i = 0; i < warp_size; ++i) {
    waiting += lanes[i].running && lanes[i].wait == Wait::warp;
    at_block += lanes[i].running && lanes[i].wait == Wait::block;
    ended += !lanes[i].running;
  }
  if (waiting == 0 || waiting + ended + at_block < warp_size) return false;
  const Thread& first = *std::find_if(lanes, lanes + warp_size, [](const Thread& t) { return t.wait == Wait::warp; });
  for (int i = 0; i < warp_size; ++i) {
    if (!lanes[i].running) fail(where(lanes[i]) + " has ended, but its warp waits for it at " + first.site);
    if (lanes[i].wait != Wait::warp || std::strcmp(lanes[i].site, first.site) != 0)
      fail("divergent warp operation: " + where(first) + " waits at " + first.site + ", " + where(lanes[i]) + " at " +
           lanes[i].site);
  }
  unsigned votes = 0;
  for (int i = 0; i < warp_size; ++i) votes |= static_cast<unsigned>(lanes[i].vote) << i;
  for (int i = 0; i < warp_size; ++i) {
    Thread& t = lanes[i];
    if (t.partner < 0 || t.partner >= warp_size)
      fail(where(t) + " asks for lane " + std::to_string(t.partner) + " at " + t.site);
    std::memcpy(t.received, lanes[t.partner].posted, sizeof t.received);
    t.ballot = votes;
  }
  for (int i = 0; i < warp_size; ++i) {
    lanes[i].wait = Wait::none;
    lanes[i].vote = false;
    // shuffles and votes exchange values, they do not order accesses to memory
    lanes[i].warp_barriers += lanes[i].fences;
  }
  return true;
}

bool release_block(std::vector<Thread>& threads) {
  const Thread* first = nullptr;
  const Thread* ended = nullptr;
  for (const Thread& t : threads) {
    if (!t.running)
      ended = &t;
    else if (t.wait != Wait::block)
      return false;
    else if (!first)
      first = &t;
  }
  if (!first) return false;
  if (ended) fail("barrier after early exit: " + where(*ended) + " has ended, but the block waits at " + first->site);
  for (const Thread& t : threads)
    if (std::strcmp(t.site, first->site) != 0)
      fail("divergent barrier: " + where(*first) + " waits at " + first->site + ", " + where(t) + " at " + t.site);
  for (Thread& t : threads) {
    t.wait = Wait::none;
    ++t.block_barriers;
  }
  return true;
}

void run_block(std::vector<Thread>& threads) {
  shared_arrays.clear();
  const int n = static_cast<int>(threads.size());
  for (int i = 0; i < n; ++i) start(threads[static_cast<std::size_t>(i)], i);
  for (int alive = n; alive > 0;) {
    bool progress = false;
    for (int i = 0; i < n; ++i) {
      Thread& t = threads[static_cast<std::size_t>(settings.reversed ? n - 1 - i : i)];
      if (!t.running || t.wait != Wait::none) continue;
      progress = true;
      current = &t;
      simt_switch(&scheduler, t.stack_pointer);
      if (std::memcmp(stacks.at(t.index), &canary, sizeof canary) != 0)
        fail("the stack of " + where(t) + " overflowed");
      if (!error.empty()) return;
      alive -= !t.running;
    }
    for (int w = 0; w < n / warp_size; ++w)
      progress = release_warp(&threads[static_cast<std::size_t>(w * warp_size)]) || progress;
    progress = release_block(threads) || progress;
    if (!progress && alive > 0) {
      const auto stuck = std::find_if(threads.begin(), threads.end(), [](const Thread& t) { return t.running; });
      fail("deadlock: " + where(*stuck) + " waits at " + stuck->site);
    }
  }
}

}  // namespace

void fail(const std::string& text) { throw Error{text}; }

void wait_for(Wait wait, const char* site) {
  current->wait = wait;
  current->site = site;
  simt_switch(&current->stack_pointer, scheduler);
}

void Cell::check_read(const char* site, int index) {
  const Thread& t = *current;
  const std::string cell = "cell " + std::to_string(index) + " of the shared array at " + site;
  if (!written) fail(cell + " is read by " + where(t) + " before anyone wrote it");
  if (!writer.is_ordered_before(t))
    fail(cell + " is read by " + where(t) + " with no barrier after thread " + std::to_string(writer.thread) +
         " wrote it");
  const auto mine = std::find_if(readers.begin(), readers.end(), [&](const Use& u) { return u.thread == t.index; });
  const Use use{t.index, t.block_barriers, t.warp_barriers};
  if (mine == readers.end())
    readers.push_back(use);
  else
    *mine = use;
}

void Cell::check_write(const char* site, int index) {
  const Thread& t = *current;
  const std::string cell = "cell " + std::to_string(index) + " of the shared array at " + site;
  if (!writer.is_ordered_before(t))
    fail(cell + " is written by " + where(t) + " with no barrier after thread " + std::to_string(writer.thread) +
         " wrote it");
  for (const Use& reader : readers)
    if (!reader.is_ordered_before(t))
      fail(cell + " is written by " + where(t) + " with no barrier after thread " + std::to_string(reader.thread) +
           " read it");
  written = true;
  readers.clear();
  writer = {t.index, t.block_barriers, t.warp_barriers};
}

void check_global(const void* p, std::size_t bytes, bool write) {
  const auto begin = reinterpret_cast<std::uintptr_t>(p);
  // the largest power of two that divides the size, 16 at most
  const std::size_t alignment = std::min<std::size_t>(bytes & ~(bytes - 1), 16);
  if (begin % alignment != 0)
    fail(where(*current) + (write ? " writes " : " reads ") + std::to_string(bytes) +
         " bytes at an address that is no multiple of " + std::to_string(alignment));
  if (settings.ranges.empty()) return;
  for (const Range& r : settings.ranges)
    if (r.begin <= begin && begin + bytes <= r.end && (r.writable || !write)) return;
  std::string nearest;
  std::uintptr_t least = ~std::uintptr_t{0};
  for (std::size_t i = 0; i < settings.ranges.size(); ++i) {
    const Range& r = settings.ranges[i];
    const std::uintptr_t distance = begin < r.begin ? r.begin - begin : begin >= r.end ? begin - r.end : 0;
    if (distance >= least) continue;
    least = distance;
    nearest = "tensor " + std::to_string(i) +
              (begin < r.begin         ? " (in front of it)"
               : begin + bytes > r.end ? " (behind it)"
                                       : " (read only)");
  }
  fail(where(*current) + (write ? " writes " : " reads ") + std::to_string(bytes) + " bytes outside all tensors, " +
       std::to_string(least) + " bytes from " + nearest);
}

const char* launch(const std::function<void()>& kernel, std::int64_t blocks, std::int64_t threads) {
  error.clear();
  body = &kernel;
  block_total = blocks;
  threads_total = static_cast<int>(threads);
  try {
    if (blocks < 1 || blocks > 0x7fffffff) fail("a grid of " + std::to_string(blocks) + " blocks");
    if (threads < warp_size || threads > 1024 || threads % warp_size != 0)
      fail("a block of " + std::to_string(threads) + " threads: whole warps, at most 1024 threads expected");
    std::vector<Thread> all(static_cast<std::size_t>(threads));
    std::vector<std::int64_t> order = settings.blocks;
    for (std::int64_t b = 0; settings.blocks.empty() && b < blocks; ++b) order.push_back(b);
    if (settings.reversed) std::reverse(order.begin(), order.end());
    for (const std::int64_t block : order) {
      current_block = block;
      run_block(all);
      if (!error.empty()) break;
    }
  } catch (const Error& e) {
    error = e.text;
  }
  shared_arrays.clear();
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace simt

// What -fsanitize=signed-integer-overflow calls: the overflow becomes an error of the kernel's.
namespace {

struct Overflow {
  const char* file;
  std::uint32_t line, column;
};

[[noreturn]] void overflow(const void* data) {
  Overflow at;
  std::memcpy(&at, data, sizeof at);
  simt::fail("a signed integer overflows at " + std::string(at.file) + ":" + std::to_string(at.line));
}

}  // namespace

extern "C" {
void __ubsan_handle_add_overflow(void* data, std::uintptr_t, std::uintptr_t) { overflow(data); }
void __ubsan_handle_sub_overflow(void* data, std::uintptr_t, std::uintptr_t) { overflow(data); }
void __ubsan_handle_mul_overflow(void* data, std::uintptr_t, std::uintptr_t) { overflow(data); }
void __ubsan_handle_negate_overflow(void* data, std::uintptr_t) { overflow(data); }
void __ubsan_handle_divrem_overflow(void* data, std::uintptr_t, std::uintptr_t) { overflow(data); }

#define SIMT_EXPORT __attribute__((visibility("default")))

// How the next launches are run: thread and block order, the memory they may touch (begin, end, writable), and
// the blocks to run, all if none are named.
SIMT_EXPORT void simt_configure(int reversed, int ranges, const std::int64_t* range, int blocks,
                                const std::int64_t* block) {
  simt::settings = {};
  simt::settings.reversed = reversed != 0;
  for (int i = 0; i < ranges; ++i)
    simt::settings.ranges.push_back({static_cast<std::uintptr_t>(range[3 * i]),
                                     static_cast<std::uintptr_t>(range[3 * i + 1]), range[3 * i + 2] != 0});
  simt::settings.blocks.assign(block, block + blocks);
}
}
