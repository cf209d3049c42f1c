// Outcomes of forward that write nothing pooled: sums over a plane, of deviations and their
// squares, or of another map and its products with deviations.
#pragma once

#include "outcomes.cuh"

namespace metapool::cuda {

// Rows of the other map, loaded ahead; what is complete comes up to kReach rows after its own.
template <typename T, int kColumns, Access kAccess>
struct OtherRows {
  const T* next;
  RawRow<T, kColumns, 0, kAccess> ahead[kForwardAhead];
  float last[kColumns][kReach + 1];  // rows, oldest first

  METAPOOL_DEVICE void load(const Map<const T>& other, bool is_there, unsigned inside, int i) {
    load_row(next, other.stride_w, is_there ? inside >> kReach : 0, ahead[i]);
    next = forget_origin(next + other.stride_h);
  }

  METAPOOL_DEVICE void take(const Map<const T>& other, bool is_there, unsigned inside) {
    float row[kColumns];
    widen_row(ahead[0], row);
#pragma unroll
    for (int v = 0; v < kColumns; ++v) push(last[v], row[v]);
#pragma unroll
    for (int i = 0; i + 1 < kForwardAhead; ++i) ahead[i] = ahead[i + 1];
    load(other, is_there, inside, kForwardAhead - 1);
  }
};

// Sums of a lane. Those of a few rows are in float, and are handed on to doubles in shared memory:
// for each slot two, of each thread.
template <int kColumns>
struct LaneSums : Completed<kColumns> {
  float shifts[kSlots], sums[kSlots], products[kSlots];

  METAPOOL_DEVICE void begin(const Weights<float>& weights, const Weights<float>& none,
                             const Slots& slots, const Lane& lane) {
    Completed<kColumns>::begin(weights, none, slots, lane);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      shifts[slot] = weights.data == nullptr ? 0 : weight_of(weights, slots, slot, lane.n, lane.c);
      sums[slot] = products[slot] = 0;
      found()[2 * slot * kForwardThreads] = found()[(2 * slot + 1) * kForwardThreads] = 0;
    }
  }

  static METAPOOL_DEVICE double* found() {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    return reinterpret_cast<double*>(shared_memory) + threadIdx.x;
  }

  METAPOOL_DEVICE void hand_on() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      found()[2 * slot * kForwardThreads] += sums[slot];
      found()[(2 * slot + 1) * kForwardThreads] += products[slot];
      sums[slot] = products[slot] = 0;
    }
  }
};

template <typename T, int kColumns, Access kAccess>
struct Poolings<T, Outcome::kMoments, kColumns, kAccess> : LaneSums<kColumns> {
  METAPOOL_DEVICE void give(const Map<T>&, const Apart<T>&, const Slots& slots, const Lane& lane,
                            T*, unsigned inside, int t) {
#pragma unroll
    for (int slot = 0; slot < kNoneSlot; ++slot) {  // nothing has no moments
      if (!this->completes(slots, lane, slot, t)) continue;
      if (t - delay_of(slot) == lane.row_begin) this->shifts[slot] = near(this->complete[slot][0]);
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const float deviation = this->complete[slot][v] - this->shifts[slot];
        const float counted = inside >> (kReach + v) & 1 ? deviation : 0.0f;
        this->sums[slot] += counted;
        this->products[slot] += counted * counted;
      }
    }
  }
};

template <typename T, int kColumns, Access kAccess>
struct Poolings<T, Outcome::kProducts, kColumns, kAccess> : LaneSums<kColumns> {
  OtherRows<T, kColumns, kAccess> other;

  METAPOOL_DEVICE void give(const Map<T>&, const Apart<T>&, const Slots& slots, const Lane& lane,
                            T*, unsigned inside, int t) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (!this->completes(slots, lane, slot, t)) continue;
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const float deviation = this->complete[slot][v] - this->shifts[slot];
        const float factor = other.last[v][kReach - delay_of(slot)];
        this->sums[slot] += factor;
        this->products[slot] += inside >> (kReach + v) & 1 ? deviation * factor : 0.0f;
      }
    }
  }
};

// Writes down what the lanes of each plane have found together.
template <Outcome kOutcome, int kColumns, typename T>
METAPOOL_DEVICE void write_found(LaneSums<kColumns>& sums, const Sizes& sizes, const Cut& cut,
                                 const Slots& slots, const Lane& lane, const Apart<T>& apart) {
  const auto count_of = [&](int64_t group) {
    const int64_t columns = sizes.w - group * kColumns, rows = lane.row_end - lane.row_begin;
    return static_cast<double>(rows * (columns < 0 ? 0 : columns < kColumns ? columns : kColumns));
  };
  sums.hand_on();
  double* const own = sums.found();
  if (kOutcome == Outcome::kMoments && lane.is_on_map) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      double &first = own[2 * slot * kForwardThreads],
             &second = own[(2 * slot + 1) * kForwardThreads];
      const Found found = found_of(count_of(lane.group), sums.shifts[slot], first, second);
      first = found.first;
      second = found.second;
    }
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t behind = blockIdx.x / cut.strips, first_plane = behind / cut.tiles * cut.planes;
  const int64_t first_group = behind % cut.tiles * cut.lanes;
  for (int i = thread; i < cut.planes * kSlots; i += kForwardThreads) {
    const int slot = i % kSlots, plane = i / kSlots, k = slots.candidate[slot];
    if (k < 0 || first_plane + plane >= sizes.n * sizes.c) continue;
    Found all{};
    for (int l = 0; l < cut.lanes; ++l) {
      const int of = (cut.along_planes ? l * cut.planes + plane : plane * cut.lanes + l) - thread;
      add_found<kOutcome>(all, {count_of(first_group + l), own[2 * slot * kForwardThreads + of],
                                own[(2 * slot + 1) * kForwardThreads + of]});
    }
    apart.found[((first_plane + plane) * apart.parts + lane.part) * apart.candidates + k] = all;
  }
}

}  // namespace metapool::cuda
