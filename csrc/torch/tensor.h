// What the ops need of torch, on the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"

namespace fastpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Checks of values, which Python cannot make without reading the tensor. The tag names the Python error to
// raise; they must not stand inside parallel_for, where torch 2.10 loses the text.
#define FASTPO_CHECK(condition, error, ...) STD_TORCH_CHECK(condition, "[fastpo " #error "] ", __VA_ARGS__)

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "fastpo: a floating point tensor was expected");
  }
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

// Large fresh memory is first touched by the kernel that fills it, and with 4 KiB pages the faults then cost
// several times the arithmetic: 100 MB took 50 ms to copy into, 10 ms with huge pages.
inline void advise_huge_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  // only advice: where the kernel refuses it, nothing is lost
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(static_cast<size_t>(t.dim()));
  for (int64_t d = 0; d < t.dim(); ++d) shape[static_cast<size_t>(d)] = t.size(d);
  return shape;
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptionalTensor as_contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(as_contiguous(*t)) : std::nullopt;
}

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// The rows of a tensor of logits, or of one that is about to be written.
inline Rows rows_of(const Tensor& t, const char* op) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.dim() <= Rows::max_dims + 1, "fastpo::", op, ": logits have ", t.dim(),
                  " dimensions; 1 to ", Rows::max_dims + 1, " are supported");
  Rows rows{};
  rows.data = const_cast<void*>(t.const_data_ptr());
  rows.dims = static_cast<int>(t.dim() - 1);
  rows.columns = t.size(rows.dims);
  rows.stride = t.stride(rows.dims);
  for (int d = 0; d < rows.dims; ++d) {
    rows.sizes[d] = t.size(d);
    rows.strides[d] = t.stride(d);
  }
  return rows;
}

// Temperatures of one per row, in the accumulator's type, or null.
inline void check_temperatures(const void* temperatures, DType dtype, int64_t rows) {
  const auto valid = [](double t) { return t > 0 && t <= 1.7976931348623157e308; };
  for (int64_t r = 0; temperatures && r < rows; ++r) {
    const double t =
        dtype == DType::f64 ? static_cast<const double*>(temperatures)[r] : static_cast<const float*>(temperatures)[r];
    FASTPO_CHECK(valid(t), ValueError, "temperature must be positive and finite for every token; row ", r, " has ", t);
  }
}

inline bool is_int64(const Tensor& t) { return t.scalar_type() == ScalarType::Long; }

inline int64_t integer_at(const Tensor& t, int64_t i) {
  return is_int64(t) ? t.const_data_ptr<int64_t>()[i] : t.const_data_ptr<int32_t>()[i];
}

}  // namespace fastpo
