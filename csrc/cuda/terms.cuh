// The gradient of the weights: every block writes down its terms, which are then summed in a fixed
// order. Sums of more than a few terms are in double: millions of equal ones, as constant maps have
// them, are rounded the same way again and again.
#pragma once

#include "lanes.cuh"

namespace metapool::cuda {

constexpr int kTotalThreads = 256;

// Terms (n, c, parts, K); their sum has shape (n or 1, c or 1, K).
struct Terms {
  int64_t n, c, parts;
  int candidates;
  bool per_n, per_c;
};

// Sums what the lanes of each plane have found, and writes it down. `shared` holds kSlots numbers
// of each of the kThreads threads.
template <int kThreads>
METAPOOL_DEVICE void write_terms_of_planes(const Terms& of, const Slots& slots, const Cut& cut,
                                           const Lane& lane, const double* shared, float* terms) {
  const int64_t first_plane =
      static_cast<int64_t>(blockIdx.x / cut.strips / cut.tiles) * cut.planes;
  for (int i = static_cast<int>(threadIdx.x); i < cut.planes * kSlots; i += kThreads) {
    const int slot = i % kSlots, plane = i / kSlots;
    const int k = slots.candidate[slot];
    if (k < 0 || first_plane + plane >= of.n * of.c) continue;
    double sum = 0;
    for (int l = 0; l < cut.lanes; ++l) {
      const int thread = cut.along_planes ? l * cut.planes + plane : plane * cut.lanes + l;
      sum += shared[slot * kThreads + thread];
    }
    terms[((first_plane + plane) * of.parts + lane.part) * of.candidates + k] =
        static_cast<float>(sum);
  }
}

// The same of the whole block. A part of the threads sums each slot, and one of them the parts.
template <int kThreads>
METAPOOL_DEVICE void write_terms_of_block(const Terms& of, const Slots& slots, double* shared,
                                          float* terms) {
  constexpr int kParts = kThreads / kSlots;
  const int thread = static_cast<int>(threadIdx.x), slot = thread / kParts;
  double sum = 0;
  for (int i = thread % kParts; i < kThreads; i += kParts) sum += shared[slot * kThreads + i];
  __syncthreads();
  shared[thread] = sum;
  __syncthreads();
  if (thread >= kSlots || slots.candidate[thread] < 0) return;
  double total = 0;
  for (int i = 0; i < kParts; ++i) total += shared[thread * kParts + i];
  terms[static_cast<int64_t>(blockIdx.x) * of.candidates + slots.candidate[thread]] =
      static_cast<float>(total);
}

// Every thread has written down its own numbers, which are zeros unless it is an owner.
template <int kThreads>
METAPOOL_DEVICE void write_terms(const Terms& of, const Slots& slots, const Cut& cut,
                                 const Lane& lane, double* shared, float* terms) {
  static_assert(kThreads % kSlots == 0);
  __syncthreads();
  if (of.per_n || of.per_c) {
    write_terms_of_planes<kThreads>(of, slots, cut, lane, shared, terms);
  } else {
    write_terms_of_block<kThreads>(of, slots, shared, terms);
  }
}

// One number is summed by `width` neighbouring threads, a power of two up to those of a block.
template <typename A>
__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(Terms of, const A* terms, A* total, int64_t count, int width) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  double* const shared = reinterpret_cast<double*>(shared_memory);
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / width;
  const int lane = static_cast<int>(threadIdx.x) % width;
  const int64_t k = number % of.candidates, plane = number / of.candidates;
  const int64_t c = of.per_c ? plane % of.c : 0, n = of.per_n ? plane / (of.per_c ? of.c : 1) : 0;
  const int64_t images = of.per_n ? 1 : of.n, channels = of.per_c ? 1 : of.c;
  double sum = 0;
  if (number < count) {
    for (int64_t i = lane; i < images * channels * of.parts; i += width) {
      const int64_t image = n + i / of.parts / channels, channel = c + i / of.parts % channels;
      sum += terms[((image * of.c + channel) * of.parts + i % of.parts) * of.candidates + k];
    }
  }
  shared[threadIdx.x] = sum;
  for (int span = width / 2; span > 0; span /= 2) {
    __syncthreads();
    if (lane < span) shared[threadIdx.x] += shared[threadIdx.x + span];
  }
  if (lane == 0 && number < count) total[number] = static_cast<A>(shared[threadIdx.x]);
}

template <typename A>
void launch_total(const Terms& of, const A* terms, A* total, cudaStream_t stream) {
  const int64_t count = (of.per_n ? of.n : 1) * (of.per_c ? of.c : 1) * of.candidates;
  const int64_t each = (of.per_n ? 1 : of.n) * (of.per_c ? 1 : of.c) * of.parts;
  int width = 1;
  while (width < kTotalThreads && width * 8 < each) width *= 2;
  METAPOOL_LAUNCH((&total_kernel<A>), ceil_div(count * width, kTotalThreads), kTotalThreads,
                  kTotalThreads * sizeof(double), stream, of, terms, total, count, width);
  check(cudaGetLastError(), "the sum of the gradient of the weights");
}

}  // namespace metapool::cuda
