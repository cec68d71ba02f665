// fastpo._host: structures that live on the host and are walked item by item. No torch headers.
// Checks of the arguments are in fastpo/kernels/packing.py; the twins in Python are in
// fastpo/reference/packing.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <queue>
#include <vector>

namespace {

using Lengths = std::vector<int64_t>;
using Groups = std::vector<std::vector<int64_t>>;

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

// A part of a partial partition: its total, its items as a linked list, and its lowest item (or n if it is
// empty).
struct Part {
  int64_t total, lowest, head, tail;
};

bool comes_first(const Part& a, const Part& b) { return a.total != b.total ? a.total > b.total : a.lowest < b.lowest; }

struct Partial {
  int64_t number;  // of creation: the older one of equals goes first
  std::vector<Part> parts;

  int64_t spread() const { return parts.front().total - parts.back().total; }
};

struct Later {
  bool operator()(const Partial& a, const Partial& b) const {
    return a.spread() != b.spread() ? a.spread() < b.spread() : a.number > b.number;
  }
};

// Largest differencing: the two partial partitions of the largest spread are merged, heavy parts with light
// ones.
Groups balance(const Lengths& lengths, int64_t count, bool equal_size) {
  const int64_t n = static_cast<int64_t>(lengths.size());
  const std::vector<int64_t> order = by_decreasing_length(lengths);
  std::vector<int64_t> next(lengths.size(), -1);
  std::priority_queue<Partial, std::vector<Partial>, Later> heap;
  int64_t number = 0;
  // with equal sizes each partial partition starts with one item in every part
  const int64_t step = equal_size ? count : 1;
  for (int64_t first = 0; first < n; first += step) {
    Partial partial{number++, {}};
    for (int64_t i = first; i < first + step; ++i)
      partial.parts.push_back({lengths[order[i]], order[i], order[i], order[i]});
    partial.parts.resize(static_cast<size_t>(count), Part{0, n, -1, -1});
    heap.push(std::move(partial));
  }
  if (n == 0) return Groups(static_cast<size_t>(count));
  while (heap.size() > 1) {
    Partial a = heap.top();
    heap.pop();
    const Partial b = heap.top();
    heap.pop();
    for (int64_t i = 0; i < count; ++i) {
      Part& into = a.parts[i];
      const Part& from = b.parts[count - 1 - i];
      if (from.head < 0) continue;
      if (into.head < 0)
        into.head = from.head;
      else
        next[into.tail] = from.head;
      into.tail = from.tail;
      into.total += from.total;
      into.lowest = std::min(into.lowest, from.lowest);
    }
    std::stable_sort(a.parts.begin(), a.parts.end(), comes_first);
    a.number = number++;
    heap.push(std::move(a));
  }
  Groups groups;
  for (const Part& part : heap.top().parts) {
    groups.emplace_back();
    for (int64_t i = part.head; i >= 0; i = next[i]) groups.back().push_back(i);
    std::sort(groups.back().begin(), groups.back().end());
  }
  return groups;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  namespace py = pybind11;
  m.def("pack", &pack, py::arg("lengths"), py::arg("budget"), py::call_guard<py::gil_scoped_release>());
  m.def("balance", &balance, py::arg("lengths"), py::arg("parts"), py::arg("equal_size"),
        py::call_guard<py::gil_scoped_release>());
}
