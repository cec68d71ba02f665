// Vectors as wide as the instruction set's registers (a vector that is wider is emulated, at a tenth of the
// speed), and the primitives of scalar.h for them. Included after the target pragma.
#pragma once

#include "../formulas/scalar.h"

namespace FASTPO_NAMESPACE {

using VecF = float __attribute__((vector_size(FASTPO_VECTOR_BYTES)));
using VecI = int __attribute__((vector_size(FASTPO_VECTOR_BYTES)));
using VecD = double __attribute__((vector_size(FASTPO_VECTOR_BYTES)));
using VecL = Int64 __attribute__((vector_size(FASTPO_VECTOR_BYTES)));
using HalfBits = unsigned short __attribute__((vector_size(FASTPO_VECTOR_BYTES / 2)));
using VecU = unsigned __attribute__((vector_size(FASTPO_VECTOR_BYTES)));
// as many floats as a VecD has doubles
using HalfF = float __attribute__((vector_size(FASTPO_VECTOR_BYTES / 2)));

template <>
struct Traits<VecF> : Traits<float> {
  using Int = VecI;
};
template <>
struct Traits<VecD> : Traits<double> {
  using Int = VecL;
};

template <class S>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = VecF;
};
template <>
struct VectorOf<double> {
  using type = VecD;
};
template <class S>
using Vec = typename VectorOf<S>::type;
template <class S>
constexpr int lanes = FASTPO_VECTOR_BYTES / sizeof(S);

FASTPO_FN VecF select(VecI condition, VecF a, VecF b) { return condition ? a : b; }
FASTPO_FN VecD select(VecL condition, VecD a, VecD b) { return condition ? a : b; }
FASTPO_FN VecI to_bits(VecF x) { return (VecI)x; }
FASTPO_FN VecL to_bits(VecD x) { return (VecL)x; }
FASTPO_FN VecF from_bits(VecI x) { return (VecF)x; }
FASTPO_FN VecD from_bits(VecL x) { return (VecD)x; }
FASTPO_FN VecF to_float(VecI x) { return __builtin_convertvector(x, VecF); }
FASTPO_FN VecD to_float(VecL x) { return __builtin_convertvector(x, VecD); }

// one instruction each, which gcc does not find where a number is a constant
FASTPO_FN VecF larger_of(VecF a, VecF b) {
#if FASTPO_AVX512
  return (VecF)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);
#elif FASTPO_AVX2
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
FASTPO_FN VecD larger_of(VecD a, VecD b) {
#if FASTPO_AVX512
  return (VecD)_mm512_maskz_max_pd(-1, (__m512d)a, (__m512d)b);
#elif FASTPO_AVX2
  return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return select(a > b, a, b);
#endif
}
FASTPO_FN VecF smaller_of(VecF a, VecF b) {
#if FASTPO_AVX512
  return (VecF)_mm512_maskz_min_ps(-1, (__m512)a, (__m512)b);
#elif FASTPO_AVX2
  return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}
FASTPO_FN VecD smaller_of(VecD a, VecD b) {
#if FASTPO_AVX512
  return (VecD)_mm512_maskz_min_pd(-1, (__m512d)a, (__m512d)b);
#elif FASTPO_AVX2
  return (VecD)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return select(a < b, a, b);
#endif
}

// Lane l of the result is lane from(l) of a and b side by side. g++ has the first builtin from version 12 on only.
template <int (*from)(int), size_t... l>
FASTPO_FN VecD shuffled(VecD a, VecD b, std::index_sequence<l...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from(l)...);
#else
  return __builtin_shuffle(a, b, VecL{from(l)...});
#endif
}
template <int (*from)(int)>
FASTPO_FN VecD shuffled(VecD a, VecD b) {
  return shuffled<from>(a, b, std::make_index_sequence<lanes<double>>());
}

template <class V>
FASTPO_FN Scalar<V> sum_lanes(V v) {
  Scalar<V> s = 0;
  for (int i = 0; i < lanes<Scalar<V>>; ++i) s += v[i];
  return s;
}

template <class V>
FASTPO_FN Scalar<V> max_lanes(V v) {
  Scalar<V> m = v[0];
  for (int i = 1; i < lanes<Scalar<V>>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

}  // namespace FASTPO_NAMESPACE

// only here: its templates would not find overloads for built-in types that are declared after them
#include "../formulas/math.h"

namespace FASTPO_NAMESPACE {

// How an element type is read and written. A is the type in which it is computed with.
template <DType dtype>
struct Element;

template <>
struct Element<DType::f32> {
  using A = float;
  using Storage = float;
  static FASTPO_FN VecF load(const float* p) {
    VecF v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static FASTPO_FN void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof v); }
};

template <>
struct Element<DType::f64> {
  using A = double;
  using Storage = double;
  static FASTPO_FN VecD load(const double* p) {
    VecD v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static FASTPO_FN void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof v); }
};

template <>
struct Element<DType::bf16> {
  using A = float;
  using Storage = uint16_t;
  static FASTPO_FN VecF load(const uint16_t* p) {
    HalfBits h;
    __builtin_memcpy(&h, p, sizeof h);
    return (VecF)(__builtin_convertvector(h, VecU) << 16);
  }
  static FASTPO_FN void store(uint16_t* p, VecF v) {
    // round to nearest even; a NaN stays one although rounding would carry out of its mantissa
    const VecU bits = (VecU)v;
    const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VecU quiet = (bits >> 16) | 0x40u;
    const HalfBits h = __builtin_convertvector((VecU)(v == v ? (VecI)rounded : (VecI)quiet), HalfBits);
    __builtin_memcpy(p, &h, sizeof h);
  }
};

template <>
struct Element<DType::f16> {
  using A = float;
  using Storage = uint16_t;
  static FASTPO_FN VecF load(const uint16_t* p) {
#if FASTPO_AVX512
    return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FASTPO_AVX2
    return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
    return (VecF)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    HalfBits h;
    __builtin_memcpy(&h, p, sizeof h);
    const VecU wide = __builtin_convertvector(h, VecU);
    // the exponent is moved by a multiplication, which also makes subnormals normal; inf and NaN are put
    // right
    const VecF magnitude = (VecF)((wide & 0x7fffu) << 13) * 0x1p112f;
    const VecI special = (wide & 0x7c00u) == 0x7c00u;
    const VecU bits = ((VecU)magnitude | ((VecU)special & 0x7f800000u)) | ((wide & 0x8000u) << 16);
    return (VecF)bits;
#endif
  }
  static FASTPO_FN void store(uint16_t* p, VecF v) {
#if FASTPO_AVX512
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif FASTPO_AVX2
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
    const VecU bits = (VecU)v;
    const VecU sign = (bits >> 16) & 0x8000u;
    const VecU magnitude = bits & 0x7fffffffu;
    // normal result: round the mantissa to nearest even and move the exponent
    const VecU normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // subnormal result: adding 0.5 lets the hardware round at 2^-24, the last bit of 0.5's mantissa
    const VecU subnormal = (VecU)((VecF)magnitude + 0.5f) - 0x3f000000u;
    VecU half = (VecU)((VecI)(magnitude < (113u << 23)) ? (VecI)subnormal : (VecI)normal);
    half = (VecU)((VecI)(magnitude >= 0x477ff000u) ? (VecI)(VecU{} + 0x7c00u) : (VecI)half);
    half = (VecU)((VecI)(magnitude > 0x7f800000u) ? (VecI)(VecU{} + 0x7e00u) : (VecI)half);
    const HalfBits h = __builtin_convertvector(half | sign, HalfBits);
    __builtin_memcpy(p, &h, sizeof h);
#endif
  }
};

// The first n < lanes elements at p, the others filled with `fill`.
template <DType dtype>
FASTPO_FN auto load_some(const typename Element<dtype>::Storage* p, int64_t stride, int64_t n,
                         typename Element<dtype>::A fill) {
  using E = Element<dtype>;
  constexpr int width = lanes<typename E::A>;
  typename E::Storage buffer[width] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * stride];
  auto v = E::load(buffer);
  for (int64_t i = n; i < width; ++i) v[i] = fill;
  return v;
}

template <DType dtype, class V>
FASTPO_FN void store_some(typename Element<dtype>::Storage* p, int64_t stride, int64_t n, V v) {
  using E = Element<dtype>;
  typename E::Storage buffer[lanes<typename E::A>];
  E::store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i * stride] = buffer[i];
}

template <DType dtype>
using Storage = typename Element<dtype>::Storage;
template <DType dtype>
using Acc = typename Element<dtype>::A;

template <DType dtype>
FASTPO_FN Acc<dtype> load_one(const Storage<dtype>* p) {
  if constexpr (dtype == DType::f32 || dtype == DType::f64)
    return *p;
  else if constexpr (dtype == DType::bf16)
    return from_bits(static_cast<int>(static_cast<unsigned>(*p) << 16));
  else
    return load_some<dtype>(p, 1, 1, 0)[0];
}

// a vector at p, which need not be aligned
template <class A>
FASTPO_FN Vec<A> at(const A* p) {
  Vec<A> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
FASTPO_FN void put(A* p, Vec<A> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// one number of a tensor (Numbers or Stream), whatever its dtype
template <class Tensor>
FASTPO_FN double number_at(const Tensor& tensor, int64_t i) {
  switch (tensor.dtype) {
    case DType::f32:
      return load_one<DType::f32>(static_cast<const float*>(tensor.data) + i);
    case DType::f64:
      return load_one<DType::f64>(static_cast<const double*>(tensor.data) + i);
    case DType::bf16:
      return load_one<DType::bf16>(static_cast<const uint16_t*>(tensor.data) + i);
    default:
      return load_one<DType::f16>(static_cast<const uint16_t*>(tensor.data) + i);
  }
}

template <DType dtype, class A>
void widen(const Storage<dtype>* from, int64_t n, A* out) {
  A* __restrict to = out;
  int64_t i = 0;
  if constexpr (sizeof(A) == sizeof(Acc<dtype>))
    for (; i + lanes<A> <= n; i += lanes<A>) put(to + i, Element<dtype>::load(from + i));
  for (; i < n; ++i) to[i] = static_cast<A>(load_one<dtype>(from + i));
}

// n numbers from `first` on of such a tensor
template <class A, class Tensor>
void widen(const Tensor& tensor, int64_t first, int64_t n, A* to) {
  switch (tensor.dtype) {
    case DType::f32:
      return widen<DType::f32>(static_cast<const float*>(tensor.data) + first, n, to);
    case DType::f64:
      return widen<DType::f64>(static_cast<const double*>(tensor.data) + first, n, to);
    case DType::bf16:
      return widen<DType::bf16>(static_cast<const uint16_t*>(tensor.data) + first, n, to);
    case DType::f16:
      return widen<DType::f16>(static_cast<const uint16_t*>(tensor.data) + first, n, to);
  }
}

// gcc takes __builtin_convertvector apart where there is one instruction
FASTPO_FN VecD widened(HalfF v) {
#if FASTPO_AVX512
  return (VecD)_mm512_cvtps_pd((__m256)v);
#elif FASTPO_AVX2
  return (VecD)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, VecD);
#endif
}
FASTPO_FN HalfF narrowed(VecD v) {
#if FASTPO_AVX512
  return (HalfF)_mm512_cvtpd_ps((__m512d)v);
#elif FASTPO_AVX2
  return (HalfF)_mm256_cvtpd_ps((__m256d)v);
#else
  return __builtin_convertvector(v, HalfF);
#endif
}

// Sum in double of a vector's lanes and of what v holds already.
FASTPO_FN void add_wide(VecD (&sums)[2], VecD v) { sums[0] += v; }
FASTPO_FN void add_wide(VecD (&sums)[2], VecF v) {
  HalfF halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  sums[0] += widened(halves[0]);
  sums[1] += widened(halves[1]);
}

// A vector's worth of a mask, as wide as the numbers it is for: not 0 where the byte is true.
FASTPO_FN VecI wide_mask(const bool* mask, VecF) {
#if FASTPO_AVX512
  return (VecI)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(mask)));
#elif FASTPO_AVX2
  return (VecI)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask)));
#else
  using Bytes = signed char __attribute__((vector_size(FASTPO_VECTOR_BYTES / 4)));
  Bytes b;
  __builtin_memcpy(&b, mask, sizeof b);
  return __builtin_convertvector(b, VecI);
#endif
}
FASTPO_FN VecL wide_mask(const bool* mask, VecD) {
#if FASTPO_AVX512
  return (VecL)_mm512_cvtepi8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask)));
#elif FASTPO_AVX2
  int b;
  __builtin_memcpy(&b, mask, sizeof b);
  return (VecL)_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(b));
#else
  using Bytes = signed char __attribute__((vector_size(FASTPO_VECTOR_BYTES / 8)));
  Bytes b;
  __builtin_memcpy(&b, mask, sizeof b);
  return __builtin_convertvector(b, VecL);
#endif
}

// x where the bit of its column is set, else `out`. Column c has bit c % 32 of word c / 32; `column`, that of the first
// lane, is a multiple of the number of lanes, so that one word has all their bits.
FASTPO_FN VecF where_bit(const uint32_t* words, int64_t column, VecF x, float out) {
  const uint32_t bits = words[column >> 5] >> (column & 31);
#if FASTPO_AVX512
  return (VecF)_mm512_mask_blend_ps(static_cast<__mmask16>(bits), _mm512_set1_ps(out), (__m512)x);
#else
  VecI lane;
  for (int i = 0; i < lanes<float>; ++i) lane[i] = 1 << i;
  return select((lane & static_cast<int>(bits)) != 0, x, constant<VecF>(out));
#endif
}
FASTPO_FN VecD where_bit(const uint32_t* words, int64_t column, VecD x, double out) {
  const uint32_t bits = words[column >> 5] >> (column & 31);
#if FASTPO_AVX512
  return (VecD)_mm512_mask_blend_pd(static_cast<__mmask8>(bits), _mm512_set1_pd(out), (__m512d)x);
#else
  VecL lane;
  for (int i = 0; i < lanes<double>; ++i) lane[i] = Int64{1} << i;
  return select((lane & static_cast<Int64>(bits)) != 0, x, constant<VecD>(out));
#endif
}

// bytes of a mask that are true, which are 1
FASTPO_FN int64_t count_true(const bool* mask, int64_t n) {
  constexpr uint64_t ones = 0x0101010101010101u;
  constexpr int64_t bytes = sizeof(VecL);
  int64_t count = 0, i = 0;
  // a byte of the sum of 31 vectors is at most 31, and the total of a word's bytes fits into the uppermost
  while (i + bytes <= n) {
    VecL sum{};
    for (int k = 0; k < 31 && i + bytes <= n; ++k, i += bytes) {
      VecL words;
      __builtin_memcpy(&words, mask + i, sizeof words);
      sum += words;
    }
    for (int l = 0; l < lanes<double>; ++l) count += static_cast<int64_t>(static_cast<uint64_t>(sum[l]) * ones >> 56);
  }
  for (; i < n; ++i) count += mask[i];
  return count;
}

// how many of n tokens there are up to the last that counts
FASTPO_FN int64_t counted_until(const bool* mask, int64_t n) {
  uint64_t words[8];
  for (; n >= 64; n -= 64) {
    __builtin_memcpy(words, mask + n - 64, sizeof words);
    uint64_t any = 0;
    for (uint64_t word : words) any |= word;
    if (any) break;
  }
  while (n > 0 && !mask[n - 1]) --n;
  return n;
}

// v where the bytes at `mask` are true, else 0; what a masked lane holds is never computed with
template <class V>
FASTPO_FN V where(const bool* mask, V v) {
  return select(wide_mask(mask, v) != 0, v, V{});
}

}  // namespace FASTPO_NAMESPACE
