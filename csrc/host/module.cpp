// fastpo._host: structures that live on the host and are walked item by item. No torch headers.
// The arguments are checked, in words, in fastpo/kernels/packing.py; what is checked here only protects memory.
// The twins in Python are in fastpo/reference/packing.py and give the same result, index for index.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../version.h"

namespace {

using Lengths = std::vector<int64_t>;
using Groups = std::vector<std::vector<int64_t>>;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// longest first, the lower index of equals
std::vector<int64_t> by_decreasing_length(const Lengths& lengths) {
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  return order;
}

// First-fit decreasing. A tree over the bins holds the largest free space below each node; bins that are not
// open yet count as empty, so that the first bin with room is found in one descent.
Groups pack(const Lengths& lengths, int64_t budget) {
  for (const int64_t length : lengths) require(0 <= length && length <= budget, "pack: a length outside [0, budget]");
  int64_t leaves = 1;
  while (leaves < static_cast<int64_t>(lengths.size())) leaves *= 2;
  std::vector<int64_t> room(static_cast<size_t>(2 * leaves), budget);
  Groups bins;
  for (const int64_t item : by_decreasing_length(lengths)) {
    int64_t node = 1;
    while (node < leaves) node = room[2 * node] >= lengths[item] ? 2 * node : 2 * node + 1;
    const int64_t bin = node - leaves;
    if (bin == static_cast<int64_t>(bins.size())) bins.emplace_back();
    bins[bin].push_back(item);
    room[node] -= lengths[item];
    for (node /= 2; node > 0; node /= 2) room[node] = std::max(room[2 * node], room[2 * node + 1]);
  }
  return bins;
}

// A part that holds items: their total, the lowest of them, and all of them as a linked list.
struct Part {
  int64_t total, lowest, head, tail;
};

bool comes_first(const Part& a, const Part& b) { return a.total != b.total ? a.total > b.total : a.lowest < b.lowest; }

// A partition of some of the items, heaviest part first. Empty parts come last and are not stored, so that all
// partial partitions together never hold more parts than there are items.
struct Partial {
  int64_t spread;  // heaviest total less lightest
  int64_t number;  // of creation
  std::vector<Part> parts;

  Partial(int64_t number, std::vector<Part> sorted, int64_t count) : number(number), parts(std::move(sorted)) {
    const bool full = static_cast<int64_t>(parts.size()) == count;
    spread = parts.front().total - (full ? parts.back().total : 0);
  }
};

// for a heap with the widest on top, the older of equals
bool comes_later(const Partial& a, const Partial& b) {
  return a.spread != b.spread ? a.spread < b.spread : a.number > b.number;
}

// Largest differencing: the two partial partitions of the largest spread are merged, the i-th heaviest part of
// one with the i-th lightest of the other, until one is left.
Groups balance(const Lengths& lengths, int64_t count, bool equal_size) {
  const int64_t n = static_cast<int64_t>(lengths.size());
  require(count > 0, "balance: parts below 1");
  require(!equal_size || n % count == 0, "balance: equal_size needs a multiple of parts lengths");
  const std::vector<int64_t> order = by_decreasing_length(lengths);
  std::vector<int64_t> next(lengths.size(), -1);
  std::vector<Partial> heap;
  int64_t number = 0;
  // with equal sizes each partial partition starts with one item in every part
  const int64_t step = equal_size ? count : 1;
  for (int64_t first = 0; first < n; first += step) {
    std::vector<Part> parts;
    for (int64_t i = first; i < first + step; ++i) parts.push_back({lengths[order[i]], order[i], order[i], order[i]});
    heap.emplace_back(number++, std::move(parts), count);
  }
  std::make_heap(heap.begin(), heap.end(), comes_later);
  const auto take_widest = [&heap] {
    std::pop_heap(heap.begin(), heap.end(), comes_later);
    std::vector<Part> parts = std::move(heap.back().parts);
    heap.pop_back();
    return parts;
  };
  while (heap.size() > 1) {
    std::vector<Part> parts = take_widest();
    const std::vector<Part> others = take_widest();
    const int64_t filled = static_cast<int64_t>(parts.size());
    int64_t partner = count;
    for (const Part& from : others) {
      if (--partner >= filled) {
        parts.push_back(from);
        continue;
      }
      Part& into = parts[partner];
      next[into.tail] = from.head;
      into = {into.total + from.total, std::min(into.lowest, from.lowest), into.head, from.tail};
    }
    std::sort(parts.begin(), parts.end(), comes_first);
    heap.emplace_back(number++, std::move(parts), count);
    std::push_heap(heap.begin(), heap.end(), comes_later);
  }
  Groups groups(static_cast<size_t>(count));
  if (n == 0) return groups;
  auto group = groups.begin();
  for (const Part& part : heap.front().parts) {
    for (int64_t i = part.head; i >= 0; i = next[i]) group->push_back(i);
    std::sort(group->begin(), group->end());
    ++group;
  }
  return groups;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  namespace py = pybind11;
  m.doc() = "Structures that live on the host, " FASTPO_SAYS_VERSION;
  m.def("pack", &pack, py::arg("lengths"), py::arg("budget"), py::call_guard<py::gil_scoped_release>());
  m.def("balance", &balance, py::arg("lengths"), py::arg("parts"), py::arg("equal_size") = false,
        py::call_guard<py::gil_scoped_release>());
}
