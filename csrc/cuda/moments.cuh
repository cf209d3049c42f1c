// Moments of pooled planes: every block writes down what it has found of its part of a plane, and
// parts are then put together in a fixed order. Deviations are those from a first value or from
// given shifts: squares of values that vary little around a large mean would leave nothing of that.
#pragma once

#include "lanes.cuh"

namespace metapool::cuda {

constexpr int kMomentThreads = 256;

// Of values how many there are, their mean, and the sum of squared deviations from it; or the sum
// of another map and that of its products.
struct Found {
  double count, first, second;
};

// From sums of deviations from a shift, and of their squares.
METAPOOL_INLINE Found found_of(double count, double shift, double sum, double squares) {
  const double deviations = squares - sum * sum / count;
  return {count, shift + sum / count, deviations < 0 ? 0.0 : deviations};
}

// What is near a value: itself, where it is a number.
template <typename A>
METAPOOL_INLINE A near(A value) {
  return value - value == 0 ? value : A(0);
}

template <Outcome kOutcome>
METAPOOL_INLINE void add_found(Found& to, const Found& more) {
  if (kOutcome == Outcome::kProducts) {
    to.first += more.first;
    to.second += more.second;
  } else if (more.count > 0) {
    const double apart = more.first - to.first, share = more.count / (to.count + more.count);
    to.second += more.second + apart * apart * (to.count * share);
    to.first += apart * share;
    to.count += more.count;
  }
}

// Puts (planes, parts, K) together: moments have shape (planes, K, 2).
template <Outcome kOutcome>
__global__ void __launch_bounds__(kMomentThreads)
    moments_kernel(const Found* found, double* moments, int64_t planes, int64_t parts,
                   int candidates) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (number >= planes * candidates) return;
  const int64_t plane = number / candidates, k = number % candidates;
  Found all{};
  for (int64_t part = 0; part < parts; ++part) {
    add_found<kOutcome>(all, found[(plane * parts + part) * candidates + k]);
  }
  moments[2 * number] = all.first;
  moments[2 * number + 1] = all.second;
}

}  // namespace metapool::cuda
