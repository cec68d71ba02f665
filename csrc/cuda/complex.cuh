// What the products of S4 share: complex numbers, reciprocals without branches, compensated sums, powers, and where the
// rows of broadcast tensors are.
#pragma once

#include "../arguments.h"
#include "dtypes.cuh"
#include "shape.cuh"

namespace FASTPO_NAMESPACE {

// as torch stores them
template <class T>
struct alignas(2 * sizeof(T)) Complex {
  T re, im;
};

template <class T>
FASTPO_DEVICE Complex<T> conjugate(Complex<T> a) {
  return {a.re, -a.im};
}
template <class T>
FASTPO_DEVICE Complex<T> multiply(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
FASTPO_DEVICE Complex<T> multiply(T a, Complex<T> b) {
  return {a * b.re, a * b.im};
}
FASTPO_DEVICE double multiply(double a, double b) { return a * b; }
template <class T>
FASTPO_DEVICE void add(Complex<T>& sum, Complex<T> a) {
  sum.re += a.re;
  sum.im += a.im;
}
// sum += a b, in fused steps
template <class T>
FASTPO_DEVICE void add_product(Complex<T>& sum, Complex<T> a, Complex<T> b) {
  sum.re += a.re * b.re;
  sum.re -= a.im * b.im;
  sum.im += a.re * b.im;
  sum.im += a.im * b.re;
}
template <class T>
FASTPO_DEVICE void add_product(Complex<T>& sum, T a, Complex<T> b) {
  sum.re += a * b.re;
  sum.im += a * b.im;
}
// in another precision
template <class A, class T>
FASTPO_DEVICE Complex<A> convert(Complex<T> a) {
  return {static_cast<A>(a.re), static_cast<A>(a.im)};
}

template <class A>
struct Range;

// Of positive numbers in their highest 32 bits: those of the lowest whose reciprocal is taken without care, and of the
// highest less those. `guess` less the bits of x are those of 1 / x, 1.3e-3 off after a step of Newton's.
template <>
struct Range<float> {
  static constexpr unsigned lowest = 0x03800000u, span = 0x7b800000u - lowest;  // 2^-120, 2^120
  static constexpr Int64 exponent = 0x7f800000, highest_exponent = 0x7e800000;
  static constexpr Int64 guess = 0x7ef33400;
};
template <>
struct Range<double> {
  static constexpr unsigned lowest = 0x03f00000u, span = 0x7bf00000u - lowest;  // 2^-960, 2^960
  static constexpr Int64 exponent = 0x7ff0000000000000, highest_exponent = 0x7fd0000000000000;
  static constexpr Int64 guess = 0x7fde668000000000;
};

FASTPO_DEVICE unsigned high_bits(float x) { return static_cast<unsigned>(to_bits(x)); }
FASTPO_DEVICE unsigned high_bits(double x) { return static_cast<unsigned>(to_bits(x) >> 32); }

// The furthest that a number was outside the range, on a scale of bits where what is inside is at most `span`; NaN,
// inf, 0 and negative numbers are outside.
template <class A>
struct Outside {
  unsigned furthest = 0;

  FASTPO_DEVICE void see(A x) {
    const unsigned bits = high_bits(x) - Range<A>::lowest;
    furthest = bits > furthest ? bits : furthest;
  }
  FASTPO_DEVICE explicit operator bool() const { return furthest > Range<A>::span; }
};

// 1 / x of x inside the range, to 2 units in A's last place where T is A, and to 3e-12 where T is single precision. A
// division has a branch for what is outside, which would keep terms from being computed side by side.
template <class T, class A>
FASTPO_DEVICE A quick_reciprocal(A x) {
  A y = from_bits(static_cast<typename Traits<A>::Int>(Range<A>::guess - to_bits(x)));
  y *= A(2.001279891) - x * y;
  y *= A(2) - x * y;
  if constexpr (sizeof(T) == 8) y *= A(2) - x * y;
  return y + y * (A(1) - x * y);
}

// 1 / d, of d whose square is inside the range
template <class T, class A>
FASTPO_DEVICE Complex<A> quick_reciprocal(Complex<A> d, Outside<A>& outside) {
  const A size = d.re * d.re + d.im * d.im;
  outside.see(size);
  const A r = quick_reciprocal<T>(size);
  return {d.re * r, -d.im * r};
}

// v / d for any d. Where d is 0, inf with the signs of v in the components that v has, and NaN where v is 0 too.
template <class T>
FASTPO_DEVICE Complex<T> quotient(Complex<T> v, Complex<T> d) {
  if (d.re == 0 && d.im == 0) {
    if (v.re == 0 && v.im == 0) return {not_a_number<T>(), not_a_number<T>()};
    return {v.re == 0 ? v.re : v.re * infinity<T>(), v.im == 0 ? v.im : v.im * infinity<T>()};
  }
  using Int = typename Traits<T>::Int;
  const T size = larger_of(abs(d.re), abs(d.im));
  if (size == infinity<T>() && d.re == d.re && d.im == d.im) return multiply(T(0), v);
  // the power of two that brings the larger component near 1
  const Int exponent = to_bits(size) & static_cast<Int>(Range<T>::exponent);
  const Int highest = static_cast<Int>(Range<T>::highest_exponent);
  const Int one = static_cast<Int>(Traits<T>::exponent_bias) << Traits<T>::mantissa_bits;
  const T scale = from_bits(2 * one - (exponent < highest ? exponent : highest));
  const T re = d.re * scale, im = d.im * scale;
  const T r = T(1) / (re * re + im * im);
  const Complex<T> found = multiply(v, Complex<T>{re * r, -im * r});
  return {found.re * scale, found.im * scale};
}

// A sum of numbers in A that will be rounded to T. Where T has no fewer digits, it keeps what its additions round off
// (D. E. Knuth, The Art of Computer Programming, vol. 2, 4.2.2).
template <class T, class A>
struct Sum {
  A total = 0, lost = 0;

  FASTPO_DEVICE void add(A x) {
    const A next = total + x;
    if constexpr (sizeof(T) == sizeof(A)) {
      const A part = next - total;
      lost += (total - (next - part)) + (x - part);
    }
    total = next;
  }
  // what is lost of an infinite sum is NaN
  FASTPO_DEVICE double value() const {
    return total - total == 0 ? static_cast<double>(total) + static_cast<double>(lost) : static_cast<double>(total);
  }
};

template <class T, class A>
struct ComplexSum {
  Sum<T, A> re, im;

  FASTPO_DEVICE void add(Complex<A> x) {
    re.add(x.re);
    im.add(x.im);
  }
  FASTPO_DEVICE Complex<double> value() const { return {re.value(), im.value()}; }
};

FASTPO_DEVICE Complex<double> warp_sum(Complex<double> x) { return {warp_sum(x.re), warp_sum(x.im)}; }

// e^(x l); NaN where the phase is 2^50 or more, and has no digits left
FASTPO_DEVICE Complex<double> power(Complex<double> x, Int64 l) {
  const double steps = static_cast<double>(l);
  const double size = x.re * steps, turned = x.im * steps;
  const double phase = abs(turned) < 1125899906842624.0 ? turned : not_a_number<double>();
  const double size_lost = fused(x.re, steps, -size), phase_lost = fused(x.im, steps, -phase);
  const double grown = exp(size);
  // a product of inf has lost NaN
  const double scale = size_lost - size_lost == 0 ? grown + grown * size_lost : grown;
  // phase = quarters pi / 2 + r, with pi / 2 in three parts
  const double quarters = round_nearest(phase * 0.6366197723675814);
  double r = fused(-quarters, 1.5707963267948966, phase);
  r = fused(-quarters, 6.123233995736766e-17, r);
  r = fused(-quarters, -1.4973849048591698e-33, r) + phase_lost;
  // Taylor's series on |r| <= pi / 4: the first terms left out are below 6e-17 of the sine and 2e-18
  const double z = r * r;
  double sine = -1.0 / 1307674368000.0;
  sine = sine * z + 1.0 / 6227020800.0;
  sine = sine * z - 1.0 / 39916800.0;
  sine = sine * z + 1.0 / 362880.0;
  sine = sine * z - 1.0 / 5040.0;
  sine = sine * z + 1.0 / 120.0;
  sine = sine * z - 1.0 / 6.0;
  sine = sine * z * r + r;
  double cosine = 1.0 / 20922789888000.0;
  cosine = cosine * z - 1.0 / 87178291200.0;
  cosine = cosine * z + 1.0 / 479001600.0;
  cosine = cosine * z - 1.0 / 3628800.0;
  cosine = cosine * z + 1.0 / 40320.0;
  cosine = cosine * z - 1.0 / 720.0;
  cosine = cosine * z + 1.0 / 24.0;
  cosine = cosine * z - 0.5;
  cosine = cosine * z + 1.0;
  const Int64 turn = static_cast<Int64>(quarters) & 3;
  const double along = turn % 2 == 0 ? cosine : sine, across = turn % 2 == 0 ? sine : cosine;
  const double re = turn == 1 || turn == 2 ? -along : along, im = turn >= 2 ? -across : across;
  // of a real base it is real, also where it overflows
  return {scale * re, im == 0 ? im : scale * im};
}

// Where a row of broadcast tensors begins in each of them, in numbers.
template <int count>
struct Begins {
  Int64 at[count];
};

template <class... Operands>
FASTPO_DEVICE Begins<sizeof...(Operands)> begins_of(const Leading& leading, Int64 row, const Operands&... operands) {
  Begins<sizeof...(Operands)> begins = {};
  for (int d = leading.dims - 1; d >= 0; --d) {
    const Int64 next = row / leading.sizes[d], place = row - next * leading.sizes[d];
    int i = 0;
    ((begins.at[i++] += place * operands.strides[d]), ...);
    row = next;
  }
  return begins;
}

// Sums over nodes or steps: a warp takes some of a row's terms over a part of it; of several parts the sums are noted,
// and added up by a launch of their own. fastpo/kernels/cuda/arguments.py restates it.
struct Parts {
  Int64 blocks;
  Int64 parts;   // of a row
  Int64 length;  // of a part
  int threads;
  double* sums;  // (parts, rows, terms, 4), or null where there is but one part
};

constexpr int part_threads = 128;
constexpr int part_warps = part_threads / warp;
constexpr Int64 part_grain = 1024;
// as many fill a device; a number of its own would change the order of the sums with it
constexpr Int64 enough_warps = 4096;

FASTPO_HOST_DEVICE Parts parts_of(Int64 rows, Int64 terms, Int64 length, int per_warp) {
  Parts p{};
  const Int64 groups = rows * ceil_div<Int64>(terms, per_warp);
  const Int64 grains = length > part_grain ? ceil_div(length, part_grain) : 1;
  const Int64 wanted = clamp<Int64>(enough_warps / (groups > 1 ? groups : 1), 1, grains);
  p.length = ceil_div(grains, wanted) * part_grain;
  p.parts = ceil_div(grains, ceil_div(grains, wanted));
  p.blocks = clamp<Int64>(ceil_div<Int64>(groups * p.parts, part_warps), 1, most_blocks);
  p.threads = part_threads;
  return p;
}

// of the launch that adds the parts up, a thread per sum
FASTPO_HOST_DEVICE Int64 part_sum_blocks(Int64 count) {
  return clamp<Int64>(ceil_div<Int64>(count, part_threads), 1, most_blocks);
}

// The part of the sums that a warp takes next.
struct WarpItem {
  Int64 group, row, begin, end;
  Int64 part;
};

FASTPO_DEVICE WarpItem warp_item(Int64 item, const Parts& p, Int64 groups, Int64 length) {
  WarpItem w;
  const Int64 above = item / groups;
  w.group = item - above * groups;
  w.row = above / p.parts;
  w.part = above - w.row * p.parts;
  w.begin = w.part * p.length;
  w.end = w.begin + p.length < length ? w.begin + p.length : length;
  return w;
}

FASTPO_DEVICE void note_sums(double* sums, Int64 place, Complex<double> first, Complex<double> second) {
  store(sums + 4 * place, first.re);
  store(sums + 4 * place + 1, first.im);
  store(sums + 4 * place + 2, second.re);
  store(sums + 4 * place + 3, second.im);
}

// of one place, in the order of the parts
FASTPO_DEVICE void noted_sums(const double* sums, Int64 parts, Int64 count, Int64 place, Complex<double>& first,
                              Complex<double>& second) {
  first = second = {0, 0};
  FASTPO_UNROLL(4)
  for (Int64 part = 0; part < parts; ++part) {
    const double* at = sums + 4 * (part * count + place);
    const double a = load(at), b = load(at + 1), c = load(at + 2), d = load(at + 3);
    first.re += a;
    first.im += b;
    second.re += c;
    second.im += d;
  }
}

}  // namespace FASTPO_NAMESPACE
