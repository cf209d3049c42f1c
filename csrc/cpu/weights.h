// The weights of a task's planes, and what averages are divided by.
#pragma once

#include "rows.h"

namespace metapool::cpu::METAPOOL_ISA {

// Arrays of [16]: a number for each lane of a packed row, or one number sixteen times.
template <typename Acc, int kLanes>
class Weights {
  using B = Block<Acc, kLanes>;

 public:
  Weights(const Plan& plan, const RowShape<Acc, kLanes>& shape, Arena& arena)
      : plan_(plan), size_(shape.size) {
    weights_ = arena.take_row<Acc>(plan.num_pools * kPackedLanes, 0);
    averages_ = arena.take_row<Acc>(plan.num_pools * kPackedLanes, 0);
    start_ = arena.take_row<Acc>(kPackedLanes, 0);
    if (plan.count_include_pad) return;
    column_scales_ = arena.take_row<Acc>((kMaxRadius + 1) * shape.size, 0);
    if (arena.counts_only()) return;
    for (const PoolItem& item : plan.avg) {
      for (int64_t column = 0; column < plan.w; ++column) {
        const int64_t count = divisor(column, item.radius_w, plan.w, false);
        fill_pixels(column_scales_ + item.radius_w * size_, shape, column, column + 1,
                    Acc(1) / static_cast<Acc>(count));
      }
    }
  }

  void load(const WeightView& view, const Task& task) {
    if (shared_) return;  // by all planes, and here already
    shared_ = view.stride_n == 0 && view.stride_c == 0;
    fill_row(weights_, plan_.num_pools * kPackedLanes, Acc(0));
    for (int lane = 0; lane < kPackedLanes; ++lane) {
      const int64_t plane = task.plane + (lane < task.lanes ? lane : 0);
      const Acc* const from = static_cast<const Acc*>(view.data) +
                              plane / plan_.c * view.stride_n + plane % plan_.c * view.stride_c;
      for (int64_t k = 0; k < plan_.pools.count; ++k) {
        weights_[plan_.pools.data[k] * kPackedLanes + lane] += from[k * view.stride_k];
      }
    }
    if (plan_.none >= 0) {
      for (int lane = 0; lane < kPackedLanes; ++lane) {
        start_[lane] = weight(plan_.none)[lane] * Acc(0);
      }
    }
    for (const PoolItem& item : plan_.avg) {
      const int area = (2 * item.radius_h + 1) * (2 * item.radius_w + 1);
      for (int lane = 0; lane < kPackedLanes; ++lane) {
        const int64_t e = item.index * kPackedLanes + lane;
        averages_[e] = plan_.count_include_pad ? weights_[e] / static_cast<Acc>(area) : weights_[e];
      }
    }
  }

  const Acc* weight(int k) const { return weights_ + k * kPackedLanes; }
  // What divided sums are multiplied with: the weight, and where padding counts, over the area.
  const Acc* average(const PoolItem& item) const { return averages_ + item.index * kPackedLanes; }
  // Zeros times the weights of "none": NaN where those are not finite.
  const Acc* start() const { return start_; }

  // Divides sums by the sizes of their windows around input row `center`, where these differ.
  METAPOOL_INLINE void divide(const PoolItem& item, int64_t center, int64_t at, B& sums) const {
    if (plan_.count_include_pad) return;
    const Acc rows = static_cast<Acc>(divisor(center, item.radius_h, plan_.h, false));
    for (int b = 0; b < B::kVectors; ++b) sums.vector[b] /= rows;
    divide_columns(item, at, sums);
  }

  // The same for the columns of the windows alone.
  METAPOOL_INLINE void divide_columns(const PoolItem& item, int64_t at, B& sums) const {
    const B scale = B::load(column_scales_ + item.radius_w * size_ + at);
    for (int b = 0; b < B::kVectors; ++b) sums.vector[b] *= scale.vector[b];
  }

 private:
  const Plan& plan_;
  int64_t size_;
  Acc *weights_, *averages_, *start_, *column_scales_ = nullptr;
  bool shared_ = false;
};

// The numbers of a [16] array that belong to vector `b` of the block at `offset`.
template <int kLanes, typename Acc>
METAPOOL_INLINE Vec<Acc> lane_values(const Acc* values, int64_t offset, int b) {
  return load(values + ((offset + b * Block<Acc, kLanes>::kStep) & (kPackedLanes - 1)));
}

}  // namespace metapool::cpu::METAPOOL_ISA
