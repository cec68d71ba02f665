// Storage types of tensors on the device. bf16 and fp16 are converted by their bits: NVRTC has no cuda_bf16.h
// without an include directory.
#pragma once

#include "device.cuh"
// after device.cuh, which defines the namespace
#include "../formulas/math.h"

namespace FASTPO_NAMESPACE {

template <DType dtype>
struct Element;

template <>
struct Element<DType::f32> {
  using Storage = float;
  static FASTPO_DEVICE float widen(float x) { return x; }
  static FASTPO_DEVICE float narrow(double x) { return static_cast<float>(x); }
};

template <>
struct Element<DType::f64> {
  using Storage = double;
  static FASTPO_DEVICE double widen(double x) { return x; }
  static FASTPO_DEVICE double narrow(double x) { return x; }
};

template <>
struct Element<DType::bf16> {
  using Storage = unsigned short;
  static FASTPO_DEVICE float widen(Storage x) { return from_bits(static_cast<int>(unsigned{x} << 16)); }
  static FASTPO_DEVICE Storage narrow(double wide) {
    const float x = static_cast<float>(wide);
    if (x != x) return 0x7fc0;
    const unsigned bits = static_cast<unsigned>(to_bits(x));
    // to nearest, ties to even
    return static_cast<Storage>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
};

template <>
struct Element<DType::f16> {
  using Storage = unsigned short;
  static FASTPO_DEVICE float widen(Storage x) {
    // the exponent's bias is 112 less; the product is exact, for subnormals too
    const float magnitude = from_bits((x & 0x7fff) << 13) * 5.192296858534827628530496329220096e33f;
    const int bits = to_bits(magnitude) | (magnitude >= 65536.0f ? 0x7f800000 : 0);
    return from_bits(static_cast<int>(static_cast<unsigned>(bits) | (x & 0x8000u) << 16));
  }
  static FASTPO_DEVICE Storage narrow(double wide) {
    const float x = static_cast<float>(wide);
    const unsigned bits = static_cast<unsigned>(to_bits(x));
    const unsigned sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<Storage>(sign | 0x7e00u);
    // from 65520 on the nearest is infinity
    if (magnitude >= 0x477ff000u) return static_cast<Storage>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
      // subnormal: adding 1/2 leaves multiples of 2^-24 in the low bits, rounded to nearest even
      const float shifted = from_bits(static_cast<int>(magnitude)) + 0.5f;
      return static_cast<Storage>(sign | (static_cast<unsigned>(to_bits(shifted)) - 0x3f000000u));
    }
    const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<Storage>(sign | ((rounded - 0x38000000u) >> 13));
  }
};

template <DType dtype>
using Storage = typename Element<dtype>::Storage;

// one number of a tensor (Numbers or Stream), whatever its dtype
template <class Tensor>
FASTPO_DEVICE double number_at(const Tensor& tensor, Int64 i) {
  switch (tensor.dtype) {
    case DType::f32:
      return Element<DType::f32>::widen(load(static_cast<const Storage<DType::f32>*>(tensor.data) + i));
    case DType::f64:
      return Element<DType::f64>::widen(load(static_cast<const Storage<DType::f64>*>(tensor.data) + i));
    case DType::bf16:
      return Element<DType::bf16>::widen(load(static_cast<const Storage<DType::bf16>*>(tensor.data) + i));
    default:
      return Element<DType::f16>::widen(load(static_cast<const Storage<DType::f16>*>(tensor.data) + i));
  }
}

// elements of 16 bytes
template <DType dtype>
constexpr int vector_width = 16 / static_cast<int>(sizeof(Storage<dtype>));

// Number of elements in front of the first address that is a multiple of 16 bytes.
template <class T>
FASTPO_DEVICE Int64 unaligned_head(const T* p) {
  const unsigned long long misfit = reinterpret_cast<unsigned long long>(p) % 16;
  return static_cast<Int64>((16 - misfit) % 16 / sizeof(T));
}

}  // namespace FASTPO_NAMESPACE
