// The shared memory of a block of backward: the sums that lanes hand to each other, rows of maps
// with what is beyond them, and what each thread has found of the gradient of the weights.
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

// Columns of a lane. Where maxima are keys and averages are sent the same, registers hold more of
// them; not every device has the shared memory for it.
constexpr int kFewColumns = 2, kManyColumns = 4;

template <typename T, Form kForm>
constexpr bool kMayHaveMany = sizeof(T) == 2 && kForm == Form::kMix;

// Lanes that hand something to a lane, and those beside a tile that have to see the same as in the
// next one: its windows, and what these hold.
template <int kColumns>
constexpr int kNeighbours = (kReach + kColumns - 1) / kColumns;
constexpr int overlap_of(int columns) { return (2 * kReach + columns - 1) / columns; }

template <int kColumns>
constexpr int kSumFloats = kSumRows * (kColumns + 2 * kReach) * kLaneStride;

// A row of all planes of a block, with their guards: most where planes are no wider than a lane.
template <int kColumns>
constexpr int kRowFloats = kBackwardThreads * (kColumns + 2 * kGuard<Access::kStrided>);

// What of it a kernel has, and where it begins, in floats. Of rows there are two: one is read while
// the next is being written.
template <Form kForm, bool kAvg, bool kMax, int kColumns>
struct BackwardShared {
  static constexpr bool kHasSums = kMax || kForm != Form::kMix;
  static constexpr bool kHasInput = kMax || kForm == Form::kMoments;
  static constexpr bool kHasGrads = kAvg && kForm == Form::kMix;
  static constexpr bool kHasFound = kForm == Form::kMix;

  static constexpr int kTwoRows = 2 * kRowFloats<kColumns>;
  static constexpr int kInput = kHasSums ? kSumFloats<kColumns> : 0;
  static constexpr int kGrads = kInput + (kHasInput ? kTwoRows : 0);
  static constexpr int kFound = kGrads + (kHasGrads ? kTwoRows : 0);
  static constexpr int kFoundFloats = kHasFound ? 2 * kSlots * kBackwardThreads : 0;  // in double
  static constexpr int kBytes = (kFound + kFoundFloats) * static_cast<int>(sizeof(float));
};

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
template <typename Shared>
METAPOOL_DEVICE void prepare_shared(float* shared, float beyond) {
  fill<Shared::kInput>(shared, 0);
  fill<Shared::kGrads - Shared::kInput>(shared + Shared::kInput, beyond);
  fill<Shared::kFound - Shared::kGrads + Shared::kFoundFloats>(shared + Shared::kGrads, 0);
  __syncthreads();
}

}  // namespace metapool::cuda
