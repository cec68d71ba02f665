// What the ops of cauchy and vandermonde do on every device before their kernels run: checks, broadcasting, outputs.
#pragma once

#include "tensor.h"

namespace fastpo {

inline ScalarType complex_of(bool is_double) {
  return is_double ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
}

inline bool is_complex_double(const Tensor& t, const char* op) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble, "fastpo::", op,
                  ": complex64 or complex128 expected");
  return dtype == ScalarType::ComplexDouble;
}

// Operands that are broadcast against each other; it keeps their storage alive.
struct Broadcast {
  const char* op;
  std::vector<Tensor> tensors;
  std::vector<Operand*> operands;

  void add(const Tensor& given, ScalarType dtype, int64_t columns, Operand& operand) {
    STD_TORCH_CHECK(given.dim() >= 1 && given.scalar_type() == dtype, "fastpo::", op, ": a tensor has another dtype");
    STD_TORCH_CHECK(given.size(given.dim() - 1) == columns, "fastpo::", op, ": a tensor has the wrong size");
    const bool adjacent = columns < 2 || given.stride(given.dim() - 1) == 1;
    tensors.push_back(adjacent ? given : as_contiguous(given));
    operands.push_back(&operand);
  }

  // The leading dimensions of them all, which are returned; adjacent ones are merged into one where they may.
  std::vector<int64_t> align(Leading& leading, Int64& rows) {
    int64_t dims = 0;
    for (const Tensor& t : tensors) dims = std::max(dims, t.dim() - 1);
    std::vector<int64_t> shape(static_cast<size_t>(dims), 1);
    const auto size_at = [&](const Tensor& t, int64_t d) {
      const int64_t own = d - (dims - (t.dim() - 1));
      return own < 0 ? int64_t{1} : t.size(own);
    };
    const auto stride_at = [&](const Tensor& t, int64_t d) {
      return size_at(t, d) == 1 ? int64_t{0} : t.stride(d - (dims - (t.dim() - 1)));
    };
    rows = 1;
    leading.dims = 0;
    for (int64_t d = 0; d < dims; ++d) {
      int64_t& size = shape[static_cast<size_t>(d)];
      for (const Tensor& t : tensors) {
        const int64_t n = size_at(t, d);
        STD_TORCH_CHECK(n == size || n == 1 || size == 1, "fastpo::", op, ": leading dimensions do not broadcast");
        if (n != 1) size = n;
      }
      rows *= size;
      if (size == 1) continue;
      bool merges = leading.dims > 0;
      for (size_t i = 0; i < tensors.size(); ++i)
        merges = merges && operands[i]->strides[leading.dims - 1] == size * stride_at(tensors[i], d);
      STD_TORCH_CHECK(merges || leading.dims < max_leading, "fastpo::", op, ": more than ", max_leading,
                      " leading dimensions");
      if (!merges) leading.sizes[leading.dims++] = 1;
      leading.sizes[leading.dims - 1] *= size;
      for (size_t i = 0; i < tensors.size(); ++i) operands[i]->strides[leading.dims - 1] = stride_at(tensors[i], d);
    }
    for (size_t i = 0; i < tensors.size(); ++i) operands[i]->data = tensors[i].const_data_ptr();
    return shape;
  }
};

inline std::vector<int64_t> with_columns(std::vector<int64_t> shape, int64_t columns) {
  shape.push_back(columns);
  return shape;
}

struct PreparedCauchy {
  Cauchy arguments{};
  Tensor out, grad_v, grad_z, grad_w;
  std::vector<Tensor> inputs;  // keep the storage alive
};

// `grad` is of the backward; `wanted` says of which inputs, as bits: v, z, w
inline PreparedCauchy prepare_cauchy(const Tensor& v, const Tensor& z, const Tensor& w, bool symmetric,
                                     const OptionalTensor& grad, int64_t wanted) {
  PreparedCauchy p;
  Cauchy& c = p.arguments;
  c.symmetric = symmetric;
  c.is_double = is_complex_double(v, "cauchy");
  const ScalarType dtype = complex_of(c.is_double);
  STD_TORCH_CHECK(v.dim() >= 1 && z.dim() >= 1, "fastpo::cauchy: (..., N), (..., L), (..., N) expected");
  c.poles = v.size(v.dim() - 1);
  c.nodes = z.size(z.dim() - 1);
  Broadcast inputs{"cauchy", {}, {}};
  inputs.add(v, dtype, c.poles, c.v);
  inputs.add(z, dtype, c.nodes, c.z);
  inputs.add(w, dtype, c.poles, c.w);
  if (grad) inputs.add(*grad, dtype, c.nodes, c.grad);
  const std::vector<int64_t> leading = inputs.align(c.leading, c.rows);
  p.inputs = inputs.tensors;
  const auto output = [&](bool make, int64_t columns, void** pointer) {
    const Tensor t = new_tensor(v, make ? with_columns(leading, columns) : std::vector<int64_t>{0}, dtype);
    *pointer = make ? t.mutable_data_ptr() : nullptr;
    return t;
  };
  if (!grad) {
    p.out = output(true, c.nodes, &c.out);
    return p;
  }
  p.grad_v = output(wanted & 1, c.poles, &c.grad_v);
  p.grad_z = output(wanted & 2, c.nodes, &c.grad_z);
  p.grad_w = output(wanted & 4, c.poles, &c.grad_w);
  return p;
}

struct PreparedVandermonde {
  Vandermonde arguments{};
  Tensor out, moment, slope;
  std::vector<Tensor> inputs;  // keep the storage alive
};

inline PreparedVandermonde prepare_vandermonde(const Tensor& v, const Tensor& x, int64_t length, bool real) {
  PreparedVandermonde p;
  Vandermonde& a = p.arguments;
  a.real = real;
  a.is_double = is_complex_double(x, "vandermonde");
  const ScalarType dtype = complex_of(a.is_double);
  STD_TORCH_CHECK(x.dim() >= 1 && length >= 0, "fastpo::vandermonde: (..., N) and a length expected");
  a.terms = x.size(x.dim() - 1);
  a.length = length;
  Broadcast inputs{"vandermonde", {}, {}};
  inputs.add(v, dtype, a.terms, a.v);
  inputs.add(x, dtype, a.terms, a.x);
  const std::vector<int64_t> leading = inputs.align(a.leading, a.rows);
  p.inputs = inputs.tensors;
  const ScalarType real_dtype = a.is_double ? ScalarType::Double : ScalarType::Float;
  p.out = new_tensor(x, with_columns(leading, length), real ? real_dtype : dtype);
  a.out = p.out.mutable_data_ptr();
  return p;
}

inline PreparedVandermonde prepare_moments(const Tensor& u, const Tensor& x, bool with_slope) {
  PreparedVandermonde p;
  Vandermonde& a = p.arguments;
  a.is_double = is_complex_double(x, "vandermonde_moments");
  const ScalarType dtype = complex_of(a.is_double);
  const ScalarType real_dtype = a.is_double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(x.dim() >= 1 && u.dim() >= 1, "fastpo::vandermonde_moments: (..., L) and (..., N) expected");
  a.real = u.scalar_type() == real_dtype;
  a.terms = x.size(x.dim() - 1);
  a.length = u.size(u.dim() - 1);
  Broadcast inputs{"vandermonde_moments", {}, {}};
  inputs.add(u, a.real ? real_dtype : dtype, a.length, a.u);
  inputs.add(x, dtype, a.terms, a.x);
  const std::vector<int64_t> leading = inputs.align(a.leading, a.rows);
  p.inputs = inputs.tensors;
  p.moment = new_tensor(x, with_columns(leading, a.terms), dtype);
  a.moment = p.moment.mutable_data_ptr();
  p.slope = new_tensor(x, with_slope ? with_columns(leading, a.terms) : std::vector<int64_t>{0}, dtype);
  a.slope = with_slope ? p.slope.mutable_data_ptr() : nullptr;
  return p;
}

}  // namespace fastpo
