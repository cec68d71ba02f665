// cauchy and its gradients on the GPU. See fastpo/kernels/cauchy.py.
//
// Values and the gradient by the nodes: a block takes nodes of a row, a thread some of them, and all poles pass through
// shared memory. Gradients by the poles: a warp takes poles of a row, its lanes go over the nodes. Both add up few
// terms at a time by quick reciprocals, and again by full quotients where one was out of their range: at a pole, or far
// off.
#pragma once

#include "complex.cuh"

namespace FASTPO_NAMESPACE {

constexpr int cauchy_threads = 128;
// poles in shared memory, and terms that are added up before the sum is compensated
constexpr int cauchy_tile = 64, cauchy_group = 8;
// nodes of a thread, and poles of a warp
template <class T>
constexpr int cauchy_width = sizeof(T) == 4 ? 4 : 2;

// Blocks by row, then by nodes. fastpo/kernels/cuda/cauchy.py restates it for the launch through CuPy.
struct CauchyShape {
  Int64 blocks;
  Int64 tiles;  // of a row
  int threads;
  int nodes;  // per thread
};

FASTPO_HOST_DEVICE CauchyShape cauchy_shape(Int64 rows, Int64 nodes, bool is_double) {
  CauchyShape s;
  s.threads = cauchy_threads;
  const int most = is_double ? cauchy_width<double> : cauchy_width<float>;
  // one node for each thread where more would leave multiprocessors without a block
  s.nodes = rows * ceil_div<Int64>(nodes, cauchy_threads * most) < 256 ? 1 : most;
  s.tiles = ceil_div<Int64>(nodes, cauchy_threads * s.nodes);
  s.blocks = clamp<Int64>(rows * s.tiles, 1, most_blocks);
  return s;
}

// gradients by the poles
FASTPO_HOST_DEVICE Parts cauchy_pole_parts(Int64 rows, Int64 poles, Int64 nodes, bool is_double) {
  return parts_of(rows, poles, nodes, is_double ? cauchy_width<double> : cauchy_width<float>);
}

// a pole and its residue, loaded by instructions of 16 bytes
template <class T>
struct alignas(16) Pole {
  T v_re, v_im, w_re, w_im;
};

// v / (z - w), or with `slope` v / (z - w)^2, and with `symmetric` the same of the conjugates
template <bool symmetric, bool slope, class T>
FASTPO_DEVICE void add_quick_term(Complex<T>& sum, const Pole<T>& pole, Complex<T> z, Outside<T>& outside) {
  const Complex<T> v{pole.v_re, pole.v_im}, w{pole.w_re, pole.w_im};
  const Complex<T> d{z.re - w.re, z.im - w.im};
  if constexpr (symmetric && !slope) {
    // both terms over the product of their denominators, which are differences still
    const Complex<T> product{d.re * d.re - d.im * (z.im + w.im), d.re * (z.im + z.im)};
    const Complex<T> numerator{T(2) * v.re * d.re - T(2) * v.im * w.im, T(2) * v.re * z.im};
    add_product(sum, numerator, quick_reciprocal(product, outside));
  } else {
    const Complex<T> r = quick_reciprocal(d, outside);
    if constexpr (!slope) {
      add_product(sum, v, r);
    } else {
      add_product(sum, multiply(v, r), r);
      if constexpr (symmetric) {
        const Complex<T> s = quick_reciprocal<T>({d.re, z.im + w.im}, outside);
        add_product(sum, multiply(conjugate(v), s), s);
      }
    }
  }
}

template <bool symmetric, bool slope, class T>
FASTPO_DEVICE void add_term(Complex<T>& sum, const Pole<T>& pole, Complex<T> z) {
  Complex<T> v{pole.v_re, pole.v_im};
  const Complex<T> d{z.re - pole.w_re, z.im - pole.w_im}, e{d.re, z.im + pole.w_im};
  // a real pole and its conjugate are one, of twice the real part
  const bool doubled = symmetric && pole.w_im == 0 && d.re == 0 && d.im == 0;
  if (doubled) v = {T(2) * v.re, T(0)};
  const Complex<T> one = quotient(v, d);
  add(sum, slope ? quotient(one, d) : one);
  if (symmetric && !doubled) {
    const Complex<T> other = quotient(conjugate(v), e);
    add(sum, slope ? quotient(other, e) : other);
  }
}

// The sums over all poles at the nodes of a tile; all threads take part.
template <class T, bool symmetric, bool slope, int width, class Cells>
FASTPO_DEVICE void cauchy_nodes(const Cauchy& a, Int64 row, Int64 first, Cells& poles) {
  const int thread = thread_index();
  const Begins<4> begins = begins_of(a.leading, row, a.v, a.w, a.z, a.grad);
  const auto* v = static_cast<const Complex<T>*>(a.v.data) + begins.at[0];
  const auto* w = static_cast<const Complex<T>*>(a.w.data) + begins.at[1];
  const auto* nodes = static_cast<const Complex<T>*>(a.z.data) + begins.at[2];
  Complex<T> z[width];
  ComplexSum<T> sum[width];
  for (int k = 0; k < width; ++k) {
    const Int64 l = first + k * cauchy_threads + thread;
    z[k] = load(nodes + (l < a.nodes ? l : a.nodes - 1));
  }
  for (Int64 begin = 0; begin < a.poles; begin += cauchy_tile) {
    const int count = static_cast<int>(a.poles - begin < cauchy_tile ? a.poles - begin : cauchy_tile);
    FASTPO_BARRIER();
    for (int n = thread; n < count; n += cauchy_threads) {
      const Complex<T> of_v = load(v + begin + n), of_w = load(w + begin + n);
      poles[n] = Pole<T>{of_v.re, of_v.im, of_w.re, of_w.im};
    }
    FASTPO_BARRIER();
    for (int group = 0; group < count; group += cauchy_group) {
      const int end = group + cauchy_group < count ? group + cauchy_group : count;
      Complex<T> part[width] = {};
      Outside<T> outside;
      for (int n = group; n < end; ++n) {
        const Pole<T> pole = poles[n];
        for (int k = 0; k < width; ++k) add_quick_term<symmetric, slope>(part[k], pole, z[k], outside);
      }
      if (outside) {
        for (int k = 0; k < width; ++k) part[k] = {0, 0};
        FASTPO_UNROLL(1)
        for (int n = group; n < end; ++n) {
          const Pole<T> pole = poles[n];
          for (int k = 0; k < width; ++k) add_term<symmetric, slope>(part[k], pole, z[k]);
        }
      }
      for (int k = 0; k < width; ++k) sum[k].add(part[k]);
    }
  }
  for (int k = 0; k < width; ++k) {
    const Int64 l = first + k * cauchy_threads + thread;
    if (l >= a.nodes) continue;
    const Complex<T> found = narrow<T>(sum[k].value());
    if constexpr (slope) {
      const Complex<T> grad = load(static_cast<const Complex<T>*>(a.grad.data) + begins.at[3] + l);
      const Complex<T> by_z = multiply(grad, conjugate(found));
      store(static_cast<Complex<T>*>(a.grad_z) + row * a.nodes + l, Complex<T>{-by_z.re, -by_z.im});
    } else {
      store(static_cast<Complex<T>*>(a.out) + row * a.nodes + l, found);
    }
  }
}

template <class T, bool slope, int width, class Cells>
FASTPO_DEVICE void cauchy_tiles(const Cauchy& a, const CauchyShape& s, Cells& poles) {
  for (Int64 tile = block_index(); tile < a.rows * s.tiles; tile += block_count()) {
    const Int64 row = tile / s.tiles, first = (tile - row * s.tiles) * cauchy_threads * width;
    if (a.symmetric)
      cauchy_nodes<T, true, slope, width>(a, row, first, poles);
    else
      cauchy_nodes<T, false, slope, width>(a, row, first, poles);
  }
}

template <class T, bool slope>
FASTPO_DEVICE void cauchy_grid(const Cauchy& a, const CauchyShape& s) {
  FASTPO_SHARED(Pole<T>, poles, cauchy_tile);
  if (s.nodes == 1)
    cauchy_tiles<T, slope, 1>(a, s, poles);
  else
    cauchy_tiles<T, slope, cauchy_width<T>>(a, s, poles);
}

FASTPO_KERNEL(cauchy_f32, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(CauchyShape) s) {
  cauchy_grid<float, false>(a, s);
}
FASTPO_SMALL_KERNEL(cauchy_f64, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(CauchyShape) s) {
  cauchy_grid<double, false>(a, s);
}
FASTPO_KERNEL(cauchy_slopes_f32, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(CauchyShape) s) {
  cauchy_grid<float, true>(a, s);
}
FASTPO_SMALL_KERNEL(cauchy_slopes_f64, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(CauchyShape) s) {
  cauchy_grid<double, true>(a, s);
}

// Σ d conj(r) and Σ d conj(r)^2 with r = 1 / (z - w), and with `symmetric` the same of the conjugate poles, where the
// conjugates of both are added: those are gradients by v, and by w but for a factor of conj(v).
template <class T>
struct PoleSums {
  Complex<T> by_v, by_w;
};

template <bool symmetric, class T>
FASTPO_DEVICE void add_quick_slopes(PoleSums<T>& sums, Complex<T> w, Complex<T> z, Complex<T> d, Outside<T>& outside) {
  const Complex<T> below{z.re - w.re, z.im - w.im};
  const T size = below.re * below.re + below.im * below.im;
  T inverse, other_inverse = 0;
  if constexpr (symmetric) {
    // both by one reciprocal, of the product of the squares
    const T above = z.im + w.im, other_size = below.re * below.re + above * above, both = size * other_size;
    outside.see(both);
    const T of_both = quick_reciprocal(both);
    inverse = other_size * of_both;
    other_inverse = size * of_both;
  } else {
    outside.see(size);
    inverse = quick_reciprocal(size);
  }
  const Complex<T> r{below.re * inverse, below.im * inverse};
  const Complex<T> once = multiply(d, r);
  add(sums.by_v, once);
  add_product(sums.by_w, once, r);
  if constexpr (symmetric) {
    const Complex<T> s{below.re * other_inverse, -(z.im + w.im) * other_inverse};
    const Complex<T> other = multiply(conjugate(d), s);
    add(sums.by_v, other);
    add_product(sums.by_w, other, s);
  }
}

template <bool symmetric, class T>
FASTPO_DEVICE void add_slopes(PoleSums<T>& sums, Complex<T> w, Complex<T> z, Complex<T> d) {
  const Complex<T> below{z.re - w.re, w.im - z.im}, above{z.re - w.re, z.im + w.im};
  const Complex<T> once = quotient(d, below);
  add(sums.by_v, once);
  add(sums.by_w, quotient(once, below));
  if constexpr (symmetric) {
    const Complex<T> other = quotient(conjugate(d), above);
    add(sums.by_v, other);
    add(sums.by_w, quotient(other, above));
  }
}

template <class T>
FASTPO_DEVICE void put_slopes(const Cauchy& a, Int64 row, Int64 n, Complex<double> by_v, Complex<double> by_w) {
  const Int64 place = row * a.poles + n;
  if (a.grad_v) store(static_cast<Complex<T>*>(a.grad_v) + place, narrow<T>(by_v));
  if (!a.grad_w) return;
  const Int64 residues = begins_of(a.leading, row, a.v).at[0];
  const Complex<double> v = widen(load(static_cast<const Complex<T>*>(a.v.data) + residues + n));
  store(static_cast<Complex<T>*>(a.grad_w) + place, narrow<T>(multiply(conjugate(v), by_w)));
}

// The sums of some poles over a part of the nodes, as far as the lane goes over them.
template <bool symmetric, class T, int width>
FASTPO_DEVICE void sum_slopes(const Complex<T>* nodes, const Complex<T>* grad, const WarpItem& item,
                              const Complex<T> (&w)[width], ComplexSum<T> (&by_v)[width],
                              ComplexSum<T> (&by_w)[width]) {
  for (Int64 begin = item.begin + thread_index() % warp; begin < item.end; begin += warp * cauchy_group) {
    const Int64 end = begin + warp * cauchy_group < item.end ? begin + warp * cauchy_group : item.end;
    PoleSums<T> part[width] = {};
    Outside<T> outside;
    for (Int64 l = begin; l < end; l += warp) {
      const Complex<T> z = load(nodes + l), d = load(grad + l);
      for (int k = 0; k < width; ++k) add_quick_slopes<symmetric>(part[k], w[k], z, d, outside);
    }
    if (outside) {
      for (int k = 0; k < width; ++k) part[k] = {};
      FASTPO_UNROLL(1)
      for (Int64 l = begin; l < end; l += warp) {
        const Complex<T> z = load(nodes + l), d = load(grad + l);
        for (int k = 0; k < width; ++k) add_slopes<symmetric>(part[k], w[k], z, d);
      }
    }
    for (int k = 0; k < width; ++k) {
      by_v[k].add(part[k].by_v);
      by_w[k].add(part[k].by_w);
    }
  }
}

// All lanes of a warp take part in an item.
template <class T>
FASTPO_DEVICE void cauchy_pole_items(const Cauchy& a, const Parts& p) {
  constexpr int width = cauchy_width<T>;
  const Int64 groups = ceil_div<Int64>(a.poles, width);
  const Int64 own = block_index() * part_warps + thread_index() / warp;
  for (Int64 i = own; i < a.rows * p.parts * groups; i += block_count() * part_warps) {
    const WarpItem item = warp_item(i, p, groups, a.nodes);
    const Begins<3> begins = begins_of(a.leading, item.row, a.w, a.z, a.grad);
    const auto* poles = static_cast<const Complex<T>*>(a.w.data) + begins.at[0];
    const auto* nodes = static_cast<const Complex<T>*>(a.z.data) + begins.at[1];
    const auto* grad = static_cast<const Complex<T>*>(a.grad.data) + begins.at[2];
    const Int64 first = item.group * width;
    Complex<T> w[width];
    ComplexSum<T> by_v[width], by_w[width];
    for (int k = 0; k < width; ++k) w[k] = load(poles + (first + k < a.poles ? first + k : a.poles - 1));
    if (a.symmetric)
      sum_slopes<true>(nodes, grad, item, w, by_v, by_w);
    else
      sum_slopes<false>(nodes, grad, item, w, by_v, by_w);
    FASTPO_UNROLL(4)
    for (int k = 0; k < width; ++k) {
      const Complex<double> of_v = warp_sum(by_v[k].value()), of_w = warp_sum(by_w[k].value());
      if (thread_index() % warp != 0 || first + k >= a.poles) continue;
      if (p.sums)
        note_sums(p.sums, (item.part * a.rows + item.row) * a.poles + first + k, of_v, of_w);
      else
        put_slopes<T>(a, item.row, first + k, of_v, of_w);
    }
  }
}

FASTPO_KERNEL(cauchy_poles_f32, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(Parts) p) { cauchy_pole_items<float>(a, p); }
FASTPO_KERNEL(cauchy_poles_f64, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(Parts) p) {
  cauchy_pole_items<double>(a, p);
}

// adds up the parts, a thread per pole of a row
FASTPO_KERNEL(cauchy_pole_sums, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(Parts) p) {
  const Int64 count = a.rows * a.poles;
  for (Int64 i = block_index() * part_threads + thread_index(); i < count; i += block_count() * part_threads) {
    Complex<double> by_v, by_w;
    noted_sums(p.sums, p.parts, count, i, by_v, by_w);
    if (a.is_double)
      put_slopes<double>(a, i / a.poles, i % a.poles, by_v, by_w);
    else
      put_slopes<float>(a, i / a.poles, i % a.poles, by_v, by_w);
  }
}

}  // namespace FASTPO_NAMESPACE
