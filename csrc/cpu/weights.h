// The weights of a task's planes, and what averages are divided by.
#pragma once

#include "rows.h"

namespace metapool::cpu::METAPOOL_ISA {

// The numbers of a [16] array that belong to vector `b` of the block at `offset`.
template <int kLanes, typename Acc>
METAPOOL_INLINE Vec<Acc> lane_values(const Acc* values, int64_t offset, int b) {
  return load(values + ((offset + b * Block<Acc, kLanes>::kStep) & (kPackedLanes - 1)));
}

// So many products are added up one after the other before they are handed on to a sum in double:
// equal ones are rounded the same way each time, and a longer chain would drift.
constexpr int64_t kChain = 16;

// The numbers of a plane, `stride_k` apart.
template <typename Acc>
METAPOOL_INLINE const Acc* weights_of_plane(const WeightView& view, const Plan& plan,
                                            int64_t plane) {
  return static_cast<const Acc*>(view.data) + plane / plan.c * view.stride_n +
         plane % plan.c * view.stride_c;
}

// Writes a task's share of the gradient of the weights; sums: [num_pools][16], by lane.
template <typename Acc>
void write_share(const Plan& plan, const Task& task, const double* sums, Acc* share) {
  for (int k = 0; k < plan.num_pools; ++k) {
    double lanes[kPackedLanes];
    for (int lane = 0; lane < kPackedLanes; ++lane) {
      lanes[lane] = lane < task.lanes ? sums[k * kPackedLanes + lane] : 0;
    }
    if (plan.share_rows > 1) {
      for (int lane = 0; lane < task.lanes; ++lane) {
        share[lane * plan.num_pools + k] = static_cast<Acc>(lanes[lane]);
      }
      continue;
    }
    for (int half = kPackedLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    share[k] = static_cast<Acc>(lanes[0]);
  }
}

// Arrays of [16]: a number for each lane of a packed row, or one number sixteen times.
template <typename Acc, int kLanes>
class Weights {
  using B = Block<Acc, kLanes>;

 public:
  Weights(const Plan& plan, const RowShape<Acc, kLanes>& shape, Arena& arena)
      : plan_(plan), size_(shape.size) {
    weights_ = arena.take_row<Acc>(plan.order.count * kPackedLanes, 0);
    averages_ = arena.take_row<Acc>(plan.order.count * kPackedLanes, 0);
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

  // Only a mixture has weights; elsewhere each is one.
  void load(const WeightView& weights, const Task& task, const WeightView& constants = {}) {
    if (shared_) return;  // by all planes, and here already
    const WeightView view = plan_.form == Form::kMix ? weights : WeightView{};
    shared_ = view.stride_n == 0 && view.stride_c == 0;
    shared_ &= constants.data == nullptr;
    finite_ = true;
    for (int lane = 0; lane < kPackedLanes; ++lane) {
      const int64_t plane = task.plane + (lane < task.lanes ? lane : 0);
      const Acc* const from = weights_of_plane<Acc>(view, plan_, plane);
      for (int p = 0; p < plan_.order.count; ++p) {
        const Acc weight =
            view.data == nullptr ? Acc(1) : from[plan_.order.data[p] * view.stride_k];
        weights_[p * kPackedLanes + lane] = weight;
        finite_ &= weight - weight == 0;
      }
      start_[lane] =
          constants.data == nullptr ? Acc(0) : *weights_of_plane<Acc>(constants, plan_, plane);
      finite_ &= start_[lane] - start_[lane] == 0;
      for (int p = plan_.none.begin; p < plan_.none.end; ++p) {
        start_[lane] += weights_[p * kPackedLanes + lane] * Acc(0);
      }
    }
    for (const PoolItem& item : plan_.avg) {
      const Acc area = static_cast<Acc>((2 * item.radius_h + 1) * (2 * item.radius_w + 1));
      for (int e = item.begin * kPackedLanes; e < item.end * kPackedLanes; ++e) {
        averages_[e] = weights_[e] / area;
      }
    }
  }

  // Whether all weights and constants are.
  bool finite() const { return finite_; }

  // The [16] of an item with one candidate; averages_of() are those of its sums with counted
  // padding.
  const Acc* of(const PoolItem& item) const { return weights_ + item.begin * kPackedLanes; }
  const Acc* averages_of(const PoolItem& item) const {
    return averages_ + item.begin * kPackedLanes;
  }

  // acc += the item's weights times `pooled`. The sums of an average come divided where padding
  // does not count, and are divided by the area here where it does.
  METAPOOL_INLINE void add(const PoolItem& item, int64_t at, const B& pooled, B& acc) const {
    add_from(weights_, item, at, pooled, acc);
  }
  METAPOOL_INLINE void add_average(const PoolItem& item, int64_t at, const B& sums, B& acc) const {
    add_from(plan_.count_include_pad ? averages_ : weights_, item, at, sums, acc);
  }

  // The item's weights times `pooled`.
  METAPOOL_INLINE B times(const PoolItem& item, int64_t at, const B& pooled) const {
    B product;
    for (int b = 0; b < B::kVectors; ++b) {
      product.vector[b] =
          pooled.vector[b] * lane_values<kLanes>(weights_ + item.begin * kPackedLanes, at, b);
    }
    PoolItem others = item;
    ++others.begin;
    add(others, at, pooled, product);
    return product;
  }

  // What is added to: constants, and zeros times the weights of "none", NaN where those are not
  // finite.
  const Acc* start() const { return start_; }
  METAPOOL_INLINE B start(int64_t at) const {
    B block;
    for (int b = 0; b < B::kVectors; ++b) block.vector[b] = lane_values<kLanes>(start_, at, b);
    return block;
  }

  // Divides sums by the sizes of their windows around input row `center`, where these differ.
  METAPOOL_INLINE void divide(const PoolItem& item, int64_t center, int64_t at, B& sums) const {
    if (plan_.count_include_pad) return;
    const Acc rows = static_cast<Acc>(divisor(center, item.radius_h, plan_.h, false));
    for (int b = 0; b < B::kVectors; ++b) sums.vector[b] /= rows;
    divide_columns(item, at, sums);
  }

  // Divides sums by the area of their windows where divide() does not.
  METAPOOL_INLINE void divide_by_area(const PoolItem& item, B& sums) const {
    if (!plan_.count_include_pad) return;
    const Acc area = static_cast<Acc>((2 * item.radius_h + 1) * (2 * item.radius_w + 1));
    for (int b = 0; b < B::kVectors; ++b) sums.vector[b] /= area;
  }

  // Divides sums by the columns of their windows, where these differ.
  METAPOOL_INLINE void divide_columns(const PoolItem& item, int64_t at, B& sums) const {
    const B scale = B::load(column_scales_ + item.radius_w * size_ + at);
    for (int b = 0; b < B::kVectors; ++b) sums.vector[b] *= scale.vector[b];
  }

 private:
  METAPOOL_INLINE static void add_from(const Acc* weights, const PoolItem& item, int64_t at,
                                       const B& pooled, B& acc) {
    for (int p = item.begin; p < item.end; ++p) {
      for (int b = 0; b < B::kVectors; ++b) {
        acc.vector[b] += lane_values<kLanes>(weights + p * kPackedLanes, at, b) * pooled.vector[b];
      }
    }
  }

  const Plan& plan_;
  int64_t size_;
  Acc *weights_, *averages_, *start_, *column_scales_ = nullptr;
  bool shared_ = false, finite_ = true;
};

// How many times more than with counted padding an average weighs that does not count it: along
// each axis, the positions of its window by those within the map. That is one but near the border.
class BorderScales {
 public:
  BorderScales(const Plan& plan, Arena& arena) {
    if (plan.count_include_pad) return;
    for (const PoolItem& item : plan.avg) {
      rows_[item.radius_h] = along(plan.h, item.radius_h, arena);
      columns_[item.radius_w] = along(plan.w, item.radius_w, arena);
    }
  }

  // Those of windows of a radius, by the lines of their centres; null where padding counts. Lines
  // up to kMaxRadius beyond the map may be asked for too.
  const float* rows(int radius) const { return rows_[radius]; }
  const float* columns(int radius) const { return columns_[radius]; }

 private:
  static const float* along(int64_t size, int radius, Arena& arena) {
    float* const scales = arena.take_row<float>(size + 2 * kMaxRadius, 1.0f);
    if (arena.counts_only()) return nullptr;
    for (int64_t line = 0; line < size; ++line) {
      scales[kMaxRadius + line] = static_cast<float>(2 * radius + 1) /
                                  static_cast<float>(divisor(line, radius, size, false));
    }
    return scales + kMaxRadius;
  }

  const float *rows_[kMaxRadius + 1] = {}, *columns_[kMaxRadius + 1] = {};
};

}  // namespace metapool::cpu::METAPOOL_ISA
