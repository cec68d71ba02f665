// The kernels of csrc/cuda by name, for launches from Python: a line for each.
#include <string>

#include "../../csrc/cuda/affine_scan.cuh"
#include "../../csrc/cuda/cauchy.cuh"
#include "../../csrc/cuda/listwise.cuh"
#include "../../csrc/cuda/objective.cuh"
#include "../../csrc/cuda/policy.cuh"
#include "../../csrc/cuda/segment_stats.cuh"
#include "../../csrc/cuda/vandermonde.cuh"

namespace {

template <class T>
const T& argument(void** arguments, int i) {
  return *static_cast<const T*>(arguments[i]);
}

}  // namespace

#define KERNEL1(name, A) \
  if (kernel == #name) return simt::launch([&] { fastpo::gpu::name(argument<A>(arguments, 0)); }, blocks, threads)
#define KERNEL2(name, A, B) \
  if (kernel == #name)      \
  return simt::launch([&] { fastpo::gpu::name(argument<A>(arguments, 0), argument<B>(arguments, 1)); }, blocks, threads)

extern "C" __attribute__((visibility("default")))
const char* simt_run(const char* name, std::int64_t blocks, std::int64_t threads, void** arguments) {
  using namespace fastpo;
  using namespace fastpo::gpu;
  const std::string kernel = name;
  KERNEL2(objective_f32, Objective, Shape);
  KERNEL2(objective_f64, Objective, Shape);
  KERNEL1(objective_sum, LossSum);
  KERNEL2(objective_spread, SpreadSides, Shape);
  KERNEL2(affine_scan, Scan, Shape);
  KERNEL2(segment_stats, Segments, Shape);
  KERNEL1(policy_f32, PolicyObjective);
  KERNEL1(policy_f64, PolicyObjective);
  KERNEL1(policy_sum, PolicySum);
  KERNEL2(listwise_f32, Listwise, Shape);
  KERNEL2(listwise_f64, Listwise, Shape);
  KERNEL1(listwise_sum, ListSum);
  KERNEL2(cauchy_f32, Cauchy, CauchyShape);
  KERNEL2(cauchy_f32_in_f64, Cauchy, CauchyShape);
  KERNEL2(cauchy_f64, Cauchy, CauchyShape);
  KERNEL2(cauchy_slopes_f32, Cauchy, CauchyShape);
  KERNEL2(cauchy_slopes_f32_in_f64, Cauchy, CauchyShape);
  KERNEL2(cauchy_slopes_f64, Cauchy, CauchyShape);
  KERNEL2(cauchy_poles_f32, Cauchy, Parts);
  KERNEL2(cauchy_poles_f32_in_f64, Cauchy, Parts);
  KERNEL2(cauchy_poles_f64, Cauchy, Parts);
  KERNEL2(cauchy_pole_sums, Cauchy, Parts);
  KERNEL2(vandermonde, Vandermonde, VandermondeShape);
  KERNEL2(vandermonde_moments, Vandermonde, Parts);
  KERNEL2(vandermonde_moment_sums, Vandermonde, Parts);
  return "there is no such kernel";
}
