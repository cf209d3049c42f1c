// The shared memory of a block of backward: the sums that lanes hand to each other, rows of the
// input with what is beyond them, and what each thread has found of the gradient of the weights.
#pragma once

#include "lanes.cuh"

namespace metapool::cuda {

constexpr int kBackwardThreads = 128;
// Rows whose sums a lane keeps: seven get something while the one before them is read.
constexpr int kSumRows = 8;
// The sums of one place lie side by side for all lanes, and behind them are zeros, which stand for
// lanes that do not exist. A multiple of the banks, so that any places are free of conflicts.
constexpr int kLaneStride = kBackwardThreads + 32;
// Columns beyond the ends of a row in shared memory. Where rows lie one after the other, those
// between two serve both, and are so many that columns stay aligned.
template <Access kAccess>
constexpr int kGuard = kAccess == Access::kStrided ? kReach : kReach + 1;

// Columns of a lane. Of halves registers hold more, which not every device has the shared memory
// for.
constexpr int kFewColumns = 2, kManyColumns = 4;

template <typename T, Form kForm>
constexpr bool kMayHaveMany = sizeof(T) == 2 && kForm == Form::kMix;

// Lanes that hand something to a lane, and those beside a tile that have to see the same as in the
// next one: its windows, and what these hold.
template <int kColumns>
constexpr int kNeighbours = (kReach + kColumns - 1) / kColumns;
template <int kColumns>
constexpr int kOverlap = (2 * kReach + kColumns - 1) / kColumns;

template <int kColumns>
constexpr int kSumFloats = kSumRows * (kColumns + 2 * kReach) * kLaneStride;

// A row of all planes of a block, with their guards: most where planes are no wider than a lane.
template <int kColumns>
constexpr int kRowFloats = kBackwardThreads * (kColumns + 2 * kGuard<Access::kStrided>);

// The sums, and two rows of the input, of a mixture of the gradients too: one is read while the
// next is being written.
template <Form kForm, int kColumns>
constexpr int kRunFloats =
    kSumFloats<kColumns> + (kForm == Form::kMix ? 4 : 2) * kRowFloats<kColumns>;

// Behind them in double what each thread has found of the gradient of the weights.
template <Form kForm, int kColumns>
constexpr int kBackwardShared =
    kRunFloats<kForm, kColumns> * static_cast<int>(sizeof(float)) +
    (kForm == Form::kMix ? kSlots * kBackwardThreads * static_cast<int>(sizeof(double)) : 0);

template <int kColumns>
METAPOOL_DEVICE double* found_in(float* shared) {
  return reinterpret_cast<double*>(shared + kRunFloats<Form::kMix, kColumns>);
}

// Writes so many copies of a number, all threads together.
template <int kCount>
METAPOOL_DEVICE void fill(float* to, float number) {
  constexpr int kAtOnce = 4 * kBackwardThreads;
  static_assert(kCount % kAtOnce == 0);
  const Vector<float, 4> numbers{number, number, number, number};
#pragma unroll
  for (int i = 0; i < kCount; i += kAtOnce) {
    *reinterpret_cast<Vector<float, 4>*>(to + i + 4 * threadIdx.x) = numbers;
  }
}

// Fills sums with zeros and the guards of rows with what is beyond the map.
template <Form kForm, int kColumns>
METAPOOL_DEVICE void prepare_shared(float* shared, float beyond) {
  constexpr int kTwoRows = 2 * kRowFloats<kColumns>;
  float* const rows = shared + kSumFloats<kColumns>;
  fill<kSumFloats<kColumns>>(shared, 0);
  fill<kTwoRows>(rows, beyond);
  if constexpr (kForm == Form::kMix) {
    fill<kTwoRows>(rows + kTwoRows, 0);
    fill<2 * kSlots * kBackwardThreads>(rows + 2 * kTwoRows, 0);  // doubles
  }
  __syncthreads();
}

}  // namespace metapool::cuda
