// cauchy and its gradients on the GPU. See fastpo/kernels/cauchy.py.
//
// Values and the gradient by the nodes: a block takes nodes of a row, a thread some of them, and all poles pass through
// shared memory. Gradients by the poles: a warp takes poles of a row, its lanes go over the nodes. Both add up few
// terms at a time by quick reciprocals, and again by full quotients where one was out of their range: at a pole, or far
// off.
//
// T is the precision of the tensors, A that of the arithmetic: double where the device has it at half the rate, as
// there a sum is then off by its own rounding alone. Others have a 32nd or a 64th of it, and compute single precision
// in itself: each term to 4 ulp, and their sum compensated.
#pragma once

#include "complex.cuh"

namespace FASTPO_NAMESPACE {

constexpr int cauchy_threads = 128;
// poles in shared memory, and terms that are added up before they are added to a compensated sum
constexpr int cauchy_tile = 64, cauchy_group = 8;
// nodes of a thread, and poles of a warp
template <class A>
constexpr int cauchy_width = sizeof(A) == 4 ? 4 : 2;

// Blocks by row, then by nodes. fastpo/kernels/cuda/cauchy.py restates it for the launch through CuPy.
struct CauchyShape {
  Int64 blocks;
  Int64 tiles;  // of a row
  int threads;
};

FASTPO_HOST_DEVICE CauchyShape cauchy_shape(Int64 rows, Int64 nodes, bool in_double) {
  CauchyShape s;
  s.threads = cauchy_threads;
  s.tiles = ceil_div<Int64>(nodes, cauchy_threads * (in_double ? cauchy_width<double> : cauchy_width<float>));
  s.blocks = clamp<Int64>(rows * s.tiles, 1, most_blocks);
  return s;
}

// gradients by the poles
FASTPO_HOST_DEVICE Parts cauchy_pole_parts(Int64 rows, Int64 poles, Int64 nodes, bool in_double) {
  return parts_of(rows, poles, nodes, in_double ? cauchy_width<double> : cauchy_width<float>);
}

// a pole and its residue, loaded by instructions of 16 bytes
template <class A>
struct alignas(16) Pole {
  A v_re, v_im, w_re, w_im;
};

// v / (z - w), or with `slope` v / (z - w)^2, and with `symmetric` the same of the conjugates
template <class T, bool symmetric, bool slope, class A>
FASTPO_DEVICE void add_quick_term(Complex<A>& sum, const Pole<A>& pole, Complex<A> z, Outside<A>& outside) {
  const Complex<A> v{pole.v_re, pole.v_im}, w{pole.w_re, pole.w_im};
  const Complex<A> d{z.re - w.re, z.im - w.im};
  if constexpr (symmetric && !slope) {
    // both terms over the product of their denominators, which are differences still
    const Complex<A> product{d.re * d.re - d.im * (z.im + w.im), d.re * (z.im + z.im)};
    const Complex<A> numerator{A(2) * v.re * d.re - A(2) * v.im * w.im, A(2) * v.re * z.im};
    add_product(sum, numerator, quick_reciprocal<T>(product, outside));
  } else {
    const Complex<A> r = quick_reciprocal<T>(d, outside);
    if constexpr (!slope) {
      add_product(sum, v, r);
    } else {
      add_product(sum, multiply(v, r), r);
      if constexpr (symmetric) {
        const Complex<A> s = quick_reciprocal<T>(Complex<A>{d.re, z.im + w.im}, outside);
        add_product(sum, multiply(conjugate(v), s), s);
      }
    }
  }
}

template <bool symmetric, bool slope, class A>
FASTPO_DEVICE void add_term(Complex<A>& sum, const Pole<A>& pole, Complex<A> z) {
  Complex<A> v{pole.v_re, pole.v_im};
  const Complex<A> d{z.re - pole.w_re, z.im - pole.w_im}, e{d.re, z.im + pole.w_im};
  // a real pole and its conjugate are one, of twice the real part
  const bool doubled = symmetric && pole.w_im == 0 && d.re == 0 && d.im == 0;
  if (doubled) v = {A(2) * v.re, A(0)};
  const Complex<A> one = quotient(v, d);
  add(sum, slope ? quotient(one, d) : one);
  if (symmetric && !doubled) {
    const Complex<A> other = quotient(conjugate(v), e);
    add(sum, slope ? quotient(other, e) : other);
  }
}

// The sums over all poles at the nodes of a tile; all threads take part.
template <class T, class A, bool symmetric, bool slope, class Cells>
FASTPO_DEVICE void cauchy_nodes(const Cauchy& a, Int64 row, Int64 first, Cells& poles) {
  constexpr int width = cauchy_width<A>;
  const int thread = thread_index();
  const Begins<4> begins = begins_of(a.leading, row, a.v, a.w, a.z, a.grad);
  const auto* v = static_cast<const Complex<T>*>(a.v.data) + begins.at[0];
  const auto* w = static_cast<const Complex<T>*>(a.w.data) + begins.at[1];
  const auto* nodes = static_cast<const Complex<T>*>(a.z.data) + begins.at[2];
  Complex<A> z[width];
  ComplexSum<T, A> sum[width];
  for (int k = 0; k < width; ++k) {
    const Int64 l = first + k * cauchy_threads + thread;
    z[k] = convert<A>(load(nodes + (l < a.nodes ? l : a.nodes - 1)));
  }
  for (Int64 begin = 0; begin < a.poles; begin += cauchy_tile) {
    const int count = static_cast<int>(a.poles - begin < cauchy_tile ? a.poles - begin : cauchy_tile);
    FASTPO_BARRIER();
    for (int n = thread; n < count; n += cauchy_threads) {
      const Complex<A> of_v = convert<A>(load(v + begin + n)), of_w = convert<A>(load(w + begin + n));
      poles[n] = Pole<A>{of_v.re, of_v.im, of_w.re, of_w.im};
    }
    FASTPO_BARRIER();
    for (int group = 0; group < count; group += cauchy_group) {
      const int end = group + cauchy_group < count ? group + cauchy_group : count;
      Complex<A> part[width] = {};
      Outside<A> outside[width];
      for (int n = group; n < end; ++n) {
        const Pole<A> pole = poles[n];
        for (int k = 0; k < width; ++k) add_quick_term<T, symmetric, slope>(part[k], pole, z[k], outside[k]);
      }
      for (int k = 0; k < width; ++k) {
        if (outside[k]) {
          part[k] = {0, 0};
          FASTPO_UNROLL(1)
          for (int n = group; n < end; ++n) {
            const Pole<A> pole = poles[n];
            add_term<symmetric, slope>(part[k], pole, z[k]);
          }
        }
        sum[k].add(part[k]);
      }
    }
  }
  for (int k = 0; k < width; ++k) {
    const Int64 l = first + k * cauchy_threads + thread;
    if (l >= a.nodes) continue;
    const Complex<double> found = sum[k].value();
    if constexpr (slope) {
      const auto* grad = static_cast<const Complex<T>*>(a.grad.data) + begins.at[3];
      const Complex<double> by_z = multiply(convert<double>(load(grad + l)), conjugate(found));
      store(static_cast<Complex<T>*>(a.grad_z) + row * a.nodes + l, convert<T>(multiply(-1.0, by_z)));
    } else {
      store(static_cast<Complex<T>*>(a.out) + row * a.nodes + l, convert<T>(found));
    }
  }
}

template <class T, class A, bool slope>
FASTPO_DEVICE void cauchy_grid(const Cauchy& a, const CauchyShape& s) {
  FASTPO_SHARED(Pole<A>, poles, cauchy_tile);
  for (Int64 tile = block_index(); tile < a.rows * s.tiles; tile += block_count()) {
    const Int64 row = tile / s.tiles, first = (tile - row * s.tiles) * cauchy_threads * cauchy_width<A>;
    if (a.symmetric)
      cauchy_nodes<T, A, true, slope>(a, row, first, poles);
    else
      cauchy_nodes<T, A, false, slope>(a, row, first, poles);
  }
}

// Σ d conj(r) and Σ d conj(r)^2 with r = 1 / (z - w), and with `symmetric` the same of the conjugate poles, where the
// conjugates of both are added: those are gradients by v, and by w but for a factor of conj(v).
template <class A>
struct PoleSums {
  Complex<A> by_v, by_w;
};

template <class T, bool symmetric, class A>
FASTPO_DEVICE void add_quick_slopes(PoleSums<A>& sums, Complex<A> w, Complex<A> z, Complex<A> d, Outside<A>& outside) {
  const Complex<A> below{z.re - w.re, z.im - w.im};
  const A size = below.re * below.re + below.im * below.im;
  A inverse, other_inverse = 0;
  if constexpr (symmetric) {
    // both by one reciprocal, of the product of the squares
    const A above = z.im + w.im, other_size = below.re * below.re + above * above, both = size * other_size;
    outside.see(both);
    const A of_both = quick_reciprocal<T>(both);
    inverse = other_size * of_both;
    other_inverse = size * of_both;
  } else {
    outside.see(size);
    inverse = quick_reciprocal<T>(size);
  }
  const Complex<A> r{below.re * inverse, below.im * inverse};
  const Complex<A> once = multiply(d, r);
  add(sums.by_v, once);
  add_product(sums.by_w, once, r);
  if constexpr (symmetric) {
    const Complex<A> s{below.re * other_inverse, -(z.im + w.im) * other_inverse};
    const Complex<A> other = multiply(conjugate(d), s);
    add(sums.by_v, other);
    add_product(sums.by_w, other, s);
  }
}

template <bool symmetric, class A>
FASTPO_DEVICE void add_slopes(PoleSums<A>& sums, Complex<A> w, Complex<A> z, Complex<A> d) {
  const Complex<A> below{z.re - w.re, w.im - z.im}, above{z.re - w.re, z.im + w.im};
  const Complex<A> once = quotient(d, below);
  add(sums.by_v, once);
  add(sums.by_w, quotient(once, below));
  if constexpr (symmetric) {
    const Complex<A> other = quotient(conjugate(d), above);
    add(sums.by_v, other);
    add(sums.by_w, quotient(other, above));
  }
}

template <class T>
FASTPO_DEVICE void put_slopes(const Cauchy& a, Int64 row, Int64 n, Complex<double> by_v, Complex<double> by_w) {
  const Int64 place = row * a.poles + n;
  if (a.grad_v) store(static_cast<Complex<T>*>(a.grad_v) + place, convert<T>(by_v));
  if (!a.grad_w) return;
  const Int64 residues = begins_of(a.leading, row, a.v).at[0];
  const auto v = convert<double>(load(static_cast<const Complex<T>*>(a.v.data) + residues + n));
  store(static_cast<Complex<T>*>(a.grad_w) + place, convert<T>(multiply(conjugate(v), by_w)));
}

// The sums of some poles over a part of the nodes, as far as the lane goes over them.
template <bool symmetric, class T, class A, int width>
FASTPO_DEVICE void sum_slopes(const Complex<T>* nodes, const Complex<T>* grad, const WarpItem& item,
                              const Complex<A> (&w)[width], ComplexSum<T, A> (&by_v)[width],
                              ComplexSum<T, A> (&by_w)[width]) {
  for (Int64 begin = item.begin + thread_index() % warp; begin < item.end; begin += warp * cauchy_group) {
    const Int64 end = begin + warp * cauchy_group < item.end ? begin + warp * cauchy_group : item.end;
    PoleSums<A> part[width] = {};
    Outside<A> outside[width];
    for (Int64 l = begin; l < end; l += warp) {
      const Complex<A> z = convert<A>(load(nodes + l)), d = convert<A>(load(grad + l));
      for (int k = 0; k < width; ++k) add_quick_slopes<T, symmetric>(part[k], w[k], z, d, outside[k]);
    }
    for (int k = 0; k < width; ++k) {
      if (outside[k]) {
        part[k] = {};
        FASTPO_UNROLL(1)
        for (Int64 l = begin; l < end; l += warp)
          add_slopes<symmetric>(part[k], w[k], convert<A>(load(nodes + l)), convert<A>(load(grad + l)));
      }
      by_v[k].add(part[k].by_v);
      by_w[k].add(part[k].by_w);
    }
  }
}

// All lanes of a warp take part in an item.
template <class T, class A>
FASTPO_DEVICE void cauchy_pole_items(const Cauchy& a, const Parts& p) {
  constexpr int width = cauchy_width<A>;
  const Int64 groups = ceil_div<Int64>(a.poles, width);
  const Int64 own = block_index() * part_warps + thread_index() / warp;
  for (Int64 i = own; i < a.rows * p.parts * groups; i += block_count() * part_warps) {
    const WarpItem item = warp_item(i, p, groups, a.nodes);
    const Begins<3> begins = begins_of(a.leading, item.row, a.w, a.z, a.grad);
    const auto* poles = static_cast<const Complex<T>*>(a.w.data) + begins.at[0];
    const auto* nodes = static_cast<const Complex<T>*>(a.z.data) + begins.at[1];
    const auto* grad = static_cast<const Complex<T>*>(a.grad.data) + begins.at[2];
    const Int64 first = item.group * width;
    Complex<A> w[width];
    ComplexSum<T, A> by_v[width], by_w[width];
    for (int k = 0; k < width; ++k) w[k] = convert<A>(load(poles + (first + k < a.poles ? first + k : a.poles - 1)));
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

// of tensors in single precision by arithmetic in single and in double precision, and of tensors in double
FASTPO_KERNEL(cauchy_f32, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(CauchyShape) s) {
  cauchy_grid<float, float, false>(a, s);
}
FASTPO_KERNEL(cauchy_f32_in_f64, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(CauchyShape) s) {
  cauchy_grid<float, double, false>(a, s);
}
FASTPO_SMALL_KERNEL(cauchy_f64, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(CauchyShape) s) {
  cauchy_grid<double, double, false>(a, s);
}

// the gradient by the nodes
FASTPO_KERNEL(cauchy_slopes_f32, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(CauchyShape) s) {
  cauchy_grid<float, float, true>(a, s);
}
FASTPO_KERNEL(cauchy_slopes_f32_in_f64, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(CauchyShape) s) {
  cauchy_grid<float, double, true>(a, s);
}
FASTPO_SMALL_KERNEL(cauchy_slopes_f64, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(CauchyShape) s) {
  cauchy_grid<double, double, true>(a, s);
}

// the gradients by poles and residues
FASTPO_KERNEL(cauchy_poles_f32, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(Parts) p) {
  cauchy_pole_items<float, float>(a, p);
}
FASTPO_KERNEL(cauchy_poles_f32_in_f64, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(Parts) p) {
  cauchy_pole_items<float, double>(a, p);
}
FASTPO_KERNEL(cauchy_poles_f64, FASTPO_ARGUMENT(Cauchy) a, FASTPO_ARGUMENT(Parts) p) {
  cauchy_pole_items<double, double>(a, p);
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
