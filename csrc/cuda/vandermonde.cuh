// vandermonde and its moments on the GPU, in double. See fastpo/kernels/vandermonde.py.
//
// A power e^(x l) is a product of two, a near and a far one, so that there are few exponentials. Values: a block takes
// 2048 steps of a row, and the powers of 16 terms at a time stand in shared memory, far ones times v. Moments: a warp
// takes terms of a row, its lanes are the near steps, whose power is applied last.
#pragma once

#include "complex.cuh"

namespace FASTPO_NAMESPACE {

constexpr int vandermonde_threads = 256;
constexpr int near_steps = 64;
constexpr int far_groups = vandermonde_threads / near_steps;
constexpr int far_width = 8;  // far steps of a thread
constexpr int far_steps = far_groups * far_width;
constexpr int vandermonde_tile = near_steps * far_steps;
constexpr int vandermonde_terms = 16;  // in shared memory
constexpr int moment_width = 4;        // terms of a warp

// fastpo/kernels/cuda/vandermonde.py restates it for the launch through CuPy.
struct VandermondeShape {
  Int64 blocks;
  Int64 tiles;  // of a row
  int threads;
};

FASTPO_HOST_DEVICE VandermondeShape vandermonde_shape(Int64 rows, Int64 length) {
  VandermondeShape s;
  s.threads = vandermonde_threads;
  s.tiles = ceil_div<Int64>(length, vandermonde_tile);
  s.blocks = clamp<Int64>(rows * s.tiles, 1, most_blocks);
  return s;
}

FASTPO_HOST_DEVICE Parts moment_parts(Int64 rows, Int64 terms, Int64 length) {
  return parts_of(rows, terms, length, moment_width);
}

// complex numbers of the tensors' dtype, from and to double
FASTPO_DEVICE Complex<double> complex_at(const Operand& t, Int64 i, bool is_double) {
  return is_double ? load(static_cast<const Complex<double>*>(t.data) + i)
                   : convert<double>(load(static_cast<const Complex<float>*>(t.data) + i));
}

FASTPO_DEVICE void put_complex(void* out, Int64 i, Complex<double> value, bool is_double) {
  if (is_double)
    store(static_cast<Complex<double>*>(out) + i, value);
  else
    store(static_cast<Complex<float>*>(out) + i, convert<float>(value));
}

template <bool real>
FASTPO_DEVICE void add_power(Complex<double>& sum, Complex<double> near, Complex<double> far) {
  if constexpr (real) {
    sum.re += far.re * near.re;
    sum.re -= far.im * near.im;
  } else {
    add_product(sum, far, near);
  }
}

// The powers of `count` terms for the tile from step `first` on; all threads take part.
template <class Near, class Far>
FASTPO_DEVICE void fill_powers(const Vandermonde& a, const Begins<2>& begins, Int64 begin, int count, Int64 first,
                               Near& near, Far& far) {
  // powers in a row are made of the first, by the next's rounding where the result is single
  const int run = a.is_double ? 1 : 8, runs = (near_steps + far_steps) / run;
  for (int i = thread_index(); i < count * runs; i += vandermonde_threads) {
    const int term = i / runs, place = i % runs * run;
    const Complex<double> x = complex_at(a.x, begins.at[1] + begin + term, a.is_double);
    const bool is_far = place >= near_steps;
    const int from = is_far ? place - near_steps : place;
    Complex<double> e = power(x, is_far ? first + near_steps * from : from);
    if (is_far) e = multiply(complex_at(a.v, begins.at[0] + begin + term, a.is_double), e);
    const Complex<double> next = run == 1 ? e : power(x, is_far ? near_steps : 1);
    FASTPO_UNROLL(1)
    for (int j = 0; j < run; ++j) {
      if (is_far)
        far[term * far_steps + from + j] = e;
      else
        near[term * near_steps + from + j] = e;
      e = multiply(e, next);
    }
  }
}

template <bool real, class Near, class Far>
FASTPO_DEVICE void add_powers(int count, Complex<double> (&sum)[far_width], Near& near, Far& far) {
  const int step = thread_index() % near_steps, own_far = thread_index() / near_steps * far_width;
  FASTPO_UNROLL(1)
  for (int n = 0; n < count; ++n) {
    const Complex<double> own = near[n * near_steps + step];
    for (int k = 0; k < far_width; ++k) {
      const Complex<double> of_v = far[n * far_steps + own_far + k];
      add_power<real>(sum[k], own, of_v);
    }
  }
}

FASTPO_KERNEL(vandermonde, FASTPO_ARGUMENT(Vandermonde) a, FASTPO_ARGUMENT(VandermondeShape) s) {
  FASTPO_SHARED(Complex<double>, near, vandermonde_terms * near_steps);
  FASTPO_SHARED(Complex<double>, far, vandermonde_terms * far_steps);
  for (Int64 tile = block_index(); tile < a.rows * s.tiles; tile += block_count()) {
    const Int64 row = tile / s.tiles, first = (tile - row * s.tiles) * vandermonde_tile;
    const Begins<2> begins = begins_of(a.leading, row, a.v, a.x);
    Complex<double> sum[far_width] = {};
    for (Int64 begin = 0; begin < a.terms; begin += vandermonde_terms) {
      const int count = static_cast<int>(a.terms - begin < vandermonde_terms ? a.terms - begin : vandermonde_terms);
      FASTPO_BARRIER();
      fill_powers(a, begins, begin, count, first, near, far);
      FASTPO_BARRIER();
      if (a.real)
        add_powers<true>(count, sum, near, far);
      else
        add_powers<false>(count, sum, near, far);
    }
    const int step = thread_index() % near_steps, own_far = thread_index() / near_steps * far_width;
    FASTPO_UNROLL(8)
    for (int k = 0; k < far_width; ++k) {
      const Int64 l = first + (own_far + k) * near_steps + step, place = row * a.length + l;
      if (l >= a.length) continue;
      if (!a.real)
        put_complex(a.out, place, sum[k], a.is_double);
      else if (a.is_double)
        store(static_cast<double*>(a.out) + place, 2 * sum[k].re);
      else
        store(static_cast<float*>(a.out) + place, static_cast<float>(2 * sum[k].re));
    }
  }
}

FASTPO_DEVICE void put_moments(const Vandermonde& a, Int64 place, Complex<double> moment, Complex<double> slope) {
  put_complex(a.moment, place, moment, a.is_double);
  if (a.slope) put_complex(a.slope, place, slope, a.is_double);
}

// the number of u at a step, which is real or complex
template <bool real>
FASTPO_DEVICE auto input_at(const Vandermonde& a, Int64 place) {
  if constexpr (real)
    return a.is_double ? load(static_cast<const double*>(a.u.data) + place)
                       : static_cast<double>(load(static_cast<const float*>(a.u.data) + place));
  else
    return a.is_double ? load(static_cast<const Complex<double>*>(a.u.data) + place)
                       : convert<double>(load(static_cast<const Complex<float>*>(a.u.data) + place));
}

// The moments of some terms over a part of the steps, as far as the lane goes over them, without its near power; all
// lanes of the warp take part.
template <bool real, bool with_slope, class Cells, class Exponent>
FASTPO_DEVICE void sum_moments(const Vandermonde& a, const WarpItem& item, Int64 inputs, const Exponent& exponent,
                               Cells& far, Complex<double> (&moment)[moment_width],
                               Complex<double> (&slope)[moment_width]) {
  const int lane = thread_index() % warp, own = thread_index() / warp * moment_width * warp;
  for (Int64 begin = item.begin; begin < item.end; begin += warp * warp) {
    FASTPO_WARP_BARRIER();
    FASTPO_UNROLL(1)
    for (int k = 0; k < moment_width; ++k) far[own + k * warp + lane] = power(exponent(k), begin + warp * lane);
    FASTPO_WARP_BARRIER();
    Complex<double> part[moment_width] = {}, far_slope[moment_width] = {};
    for (int h = 0; h < warp && begin + warp * h + lane < item.end; ++h) {
      const auto u = input_at<real>(a, inputs + begin + warp * h + lane);
      const auto times_h = multiply(static_cast<double>(h), u);
      for (int k = 0; k < moment_width; ++k) {
        const Complex<double> e = far[own + k * warp + h];
        add_product(part[k], u, e);
        if constexpr (with_slope) add_product(far_slope[k], times_h, e);
      }
    }
    const double from = static_cast<double>(begin);
    for (int k = 0; k < moment_width; ++k) {
      add(moment[k], part[k]);
      if constexpr (!with_slope) continue;
      add_product(slope[k], from, part[k]);
      add_product(slope[k], static_cast<double>(warp), far_slope[k]);
    }
  }
}

// All lanes of a warp take part in an item.
FASTPO_KERNEL(vandermonde_moments, FASTPO_ARGUMENT(Vandermonde) a, FASTPO_ARGUMENT(Parts) p) {
  FASTPO_SHARED(Complex<double>, far, part_warps * moment_width * warp);
  const Int64 groups = ceil_div<Int64>(a.terms, moment_width);
  const Int64 own = block_index() * part_warps + thread_index() / warp;
  const int lane = thread_index() % warp;
  for (Int64 i = own; i < a.rows * p.parts * groups; i += block_count() * part_warps) {
    const WarpItem item = warp_item(i, p, groups, a.length);
    const Int64 first = item.group * moment_width;
    const Begins<2> begins = begins_of(a.leading, item.row, a.x, a.u);
    const auto exponent = [&](int k) {
      return complex_at(a.x, begins.at[0] + (first + k < a.terms ? first + k : a.terms - 1), a.is_double);
    };
    Complex<double> moment[moment_width] = {}, slope[moment_width] = {};
    if (a.real && a.slope)
      sum_moments<true, true>(a, item, begins.at[1], exponent, far, moment, slope);
    else if (a.real)
      sum_moments<true, false>(a, item, begins.at[1], exponent, far, moment, slope);
    else if (a.slope)
      sum_moments<false, true>(a, item, begins.at[1], exponent, far, moment, slope);
    else
      sum_moments<false, false>(a, item, begins.at[1], exponent, far, moment, slope);
    FASTPO_UNROLL(4)
    for (int k = 0; k < moment_width; ++k) {
      // a lane without steps would multiply 0 by a power that may overflow
      const Complex<double> e = item.begin + lane < item.end ? power(exponent(k), lane) : Complex<double>{0, 0};
      add_product(slope[k], static_cast<double>(lane), moment[k]);
      const Complex<double> of_moment = warp_sum(multiply(moment[k], e)), of_slope = warp_sum(multiply(slope[k], e));
      if (lane != 0 || first + k >= a.terms) continue;
      const Int64 place = item.row * a.terms + first + k;
      if (p.sums)
        note_sums(p.sums, item.part * a.rows * a.terms + place, of_moment, of_slope);
      else
        put_moments(a, place, of_moment, of_slope);
    }
  }
}

// adds up the parts, a thread per term of a row
FASTPO_KERNEL(vandermonde_moment_sums, FASTPO_ARGUMENT(Vandermonde) a, FASTPO_ARGUMENT(Parts) p) {
  const Int64 count = a.rows * a.terms;
  for (Int64 i = block_index() * part_threads + thread_index(); i < count; i += block_count() * part_threads) {
    Complex<double> moment, slope;
    noted_sums(p.sums, p.parts, count, i, moment, slope);
    put_moments(a, i, moment, slope);
  }
}

}  // namespace FASTPO_NAMESPACE
