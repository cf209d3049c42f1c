// Single poolings along a row, streamed: where not their mixture is wanted but each of them.
#pragma once

#include "maps.h"
#include "streams.h"

namespace metapool::cpu::METAPOOL_ISA {

class PooledRows {
  // Where padding does not count: each pixel is scaled before it is handed on.
  template <typename Epilogue>
  struct Scaled {
    Epilogue epilogue;
    const float* scales;  // BorderScales of columns

    METAPOOL_INLINE void begin(int slot) { epilogue.begin(slot); }
    METAPOOL_INLINE void take(int64_t column, Floats pixel) {
      epilogue.take(column, pixel * scales[column]);
    }
    METAPOOL_INLINE void end(int64_t columns) { epilogue.end(columns); }
  };

 public:
  PooledRows(const Plan& plan, const BorderScales& scales, Arena& arena)
      : plan_(plan), scales_(scales), maximum_radii_(streamed_set(plan.max, kStreamedRadius)) {
    if (plan.form != Form::kMoments) return;
    weights_ = arena.take_row<float>((kStreamedRadius + 1) * kPackedLanes, 1);
    zeros_ = arena.take_row<float>(plan.w * kPackedLanes, 0);
    for (AverageRow& row : averages_) row.columns = plan.w;
    maxima_.columns = plan.w;
    averages_[0].x_weights = weights_;
    for (const PoolItem& item : plan.avg) {
      averages_[item.radius_h].weights[item.radius_h] = weights_ + item.radius_h * kPackedLanes;
    }
  }

  // Whoever holds it holds the scales that it refers to: together they stay where they are.
  PooledRows(const PooledRows&) = delete;

  // Calls body(item) for each of the poolings.
  template <typename Body>
  void for_each(const Body& body) const {
    for_each_average(body);
    for (const PoolItem& item : plan_.max) body(item);
  }

  // Hands all poolings along row `center` of x to the epilogues epilogue_of(item), see StoredRow.
  // Maxima have much of their windows in common.
  template <typename EpilogueOf>
  void stream_all(const DenseLines& x, int64_t center, const EpilogueOf& epilogue_of) {
    for_each_average(
        [&](const PoolItem& item) { stream_average(item, x, center, epilogue_of(item)); });
    with_set(maximum_radii_,
             [&](auto set) METAPOOL_LAMBDA { stream_maxima_of<set>(x, center, epilogue_of); });
  }

  // Hands an average along row `center` of x to an epilogue; the identity is one of one pixel.
  template <typename Epilogue>
  void stream_average(const PoolItem& item, const DenseLines& x, int64_t center,
                      const Epilogue& epilogue) {
    const AverageRow& row = averages_around(item, x, center);
    const float* const scales = scales_.columns(item.radius_h);
    with_set_of(item.radius_h, [&](auto set) METAPOOL_LAMBDA {
      if constexpr (set != 0) {
        if (scales != nullptr) {
          return stream_averages<set, Scales::kNone, false>(row,
                                                            Scaled<Epilogue>{epilogue, scales});
        }
      }
      stream_averages<set, Scales::kNone, false>(row, epilogue);
    });
  }

 private:
  // Nothing is one of one pixel too.
  template <typename Body>
  void for_each_average(const Body& body) const {
    if (plan_.none.index >= 0) body(plan_.none);
    if (plan_.skip.index >= 0) body(plan_.skip);
    for (const PoolItem& item : plan_.avg) body(item);
  }

  template <int kSet, typename EpilogueOf>
  void stream_maxima_of(const DenseLines& x, int64_t center, const EpilogueOf& epilogue_of) {
    if constexpr (kSet != 0) {
      decltype(epilogue_of(plan_.none)) epilogues[kStreamedRadius + 1];
      for (const PoolItem& item : plan_.max) {
        if (contains(kSet, item.radius_h)) epilogues[item.radius_h] = epilogue_of(item);
      }
      stream_each_maximum<kSet>(maxima_around(x, center), epilogues);
    }
  }

  const AverageRow& averages_around(const PoolItem& item, const DenseLines& x, int64_t center) {
    const int radius = item.radius_h;
    AverageRow& row = averages_[radius];
    if (radius == 0) {
      row.x = item.index == plan_.none.index ? zeros_ : x[center];
      return row;
    }
    float weight = 1.0f / static_cast<float>((2 * radius + 1) * (2 * radius + 1));
    if (!plan_.count_include_pad) weight *= scales_.rows(radius)[center];
    fill_row(weights_ + radius * kPackedLanes, kPackedLanes, weight);
    for (int d = -radius; d <= radius; ++d) {
      const int64_t line = center + d;
      row.lines[kStreamedRadius + d] = line == clamp_line(line, plan_.h) ? x[line] : zeros_;
    }
    return row;
  }

  const MaximumRow& maxima_around(const DenseLines& x, int64_t center) {
    for (int d = -plan_.radius_h; d <= plan_.radius_h; ++d) {
      maxima_.lines[kStreamedRadius + d] = x[clamp_line(center + d, plan_.h)];
    }
    return maxima_;
  }

  const Plan& plan_;
  const BorderScales& scales_;
  const int maximum_radii_;  // their set
  float *weights_ = nullptr, *zeros_ = nullptr;
  AverageRow averages_[kStreamedRadius + 1] = {};  // of each radius, around the row at hand
  MaximumRow maxima_{};
};

}  // namespace metapool::cpu::METAPOOL_ISA
