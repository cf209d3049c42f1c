// Single poolings along a row, streamed: where not their mixture is wanted but each of them.
#pragma once

#include <utility>

#include "maps.h"
#include "streamed_rows.h"

namespace metapool::cpu::METAPOOL_ISA {

class PooledRows {
  template <typename EpilogueOf>
  using Of = decltype(std::declval<EpilogueOf>()(PoolItem{}));

  // Where padding does not count: each pixel is scaled before it is handed on.
  template <typename Epilogue>
  struct Scaled {
    Epilogue epilogue;
    const float* scales = nullptr;  // BorderScales of columns

    METAPOOL_INLINE void begin(int slot) { epilogue.begin(slot); }
    METAPOOL_INLINE void take(int64_t column, Floats pixel) {
      epilogue.take(column, pixel * scales[column]);
    }
    METAPOOL_INLINE void end(int64_t columns) { epilogue.end(columns); }
  };

  template <typename EpilogueOf>
  struct ScaledFrom {
    const EpilogueOf& epilogue_of;
    const BorderScales& scales;

    Scaled<Of<EpilogueOf>> operator()(const PoolItem& item) const {
      return {epilogue_of(item), scales.columns(item.radius_w)};
    }
  };

 public:
  PooledRows(const Plan& plan, const BorderScales& scales, Arena& arena)
      : plan_(plan),
        scales_(scales),
        average_radii_(streamed_set(plan.avg, kStreamedRadius)),
        maximum_radii_(streamed_set(plan.max, kStreamedRadius)) {
    if (plan.form != Form::kMoments) return;
    weights_ = arena.take_row<float>((kStreamedRadius + 1) * kPackedLanes, 1);
    zeros_ = arena.take_row<float>(plan.w * kPackedLanes, 0);
    averages_.columns = maxima_.columns = plan.w;
    for (const PoolItem& item : plan.avg) {
      averages_.weights[item.radius_h] = weights_ + item.radius_h * kPackedLanes;
    }
  }

  // Whoever holds it holds the scales that it refers to: together they stay where they are.
  PooledRows(const PooledRows&) = delete;

  // Calls body(item) for each of the poolings.
  template <typename Body>
  void for_each(const Body& body) const {
    if (plan_.none.index >= 0) body(plan_.none);
    if (plan_.skip.index >= 0) body(plan_.skip);
    for (const PoolItem& item : plan_.avg) body(item);
    for (const PoolItem& item : plan_.max) body(item);
  }

  // Hands all poolings along row `center` of x to the epilogues epilogue_of(item), see StoredRow.
  template <typename EpilogueOf>
  void stream_all(const DenseLines& x, int64_t center, const EpilogueOf& epilogue_of) {
    if (plan_.none.index >= 0) stream_pixels(zeros_, plan_.w, epilogue_of(plan_.none));
    if (plan_.skip.index >= 0) stream_pixels(x[center], plan_.w, epilogue_of(plan_.skip));
    stream_averages(x, center, epilogue_of);
    with_set(maximum_radii_, [&](auto set) METAPOOL_LAMBDA {
      if constexpr (set != 0) {
        Of<EpilogueOf> epilogues[kStreamedRadius + 1];
        for (const PoolItem& item : plan_.max) epilogues[item.radius_h] = epilogue_of(item);
        stream_each_maximum<set>(maxima_around(x, center), epilogues);
      }
    });
  }

  // The same for averages alone.
  template <typename EpilogueOf>
  void stream_averages(const DenseLines& x, int64_t center, const EpilogueOf& epilogue_of) {
    plan_.count_include_pad
        ? stream_averages_to(x, center, epilogue_of)
        : stream_averages_to(x, center, ScaledFrom<EpilogueOf>{epilogue_of, scales_});
  }

 private:
  template <typename EpilogueOf>
  void stream_averages_to(const DenseLines& x, int64_t center, const EpilogueOf& epilogue_of) {
    with_set(average_radii_, [&](auto set) METAPOOL_LAMBDA {
      if constexpr (set != 0) {
        Of<EpilogueOf> epilogues[kStreamedRadius + 1];
        for (const PoolItem& item : plan_.avg) epilogues[item.radius_h] = epilogue_of(item);
        stream_each_average<set>(averages_around(x, center), epilogues);
      }
    });
  }

  const AverageRow& averages_around(const DenseLines& x, int64_t center) {
    for (const PoolItem& item : plan_.avg) {
      const int radius = item.radius_h;
      float weight = 1.0f / static_cast<float>((2 * radius + 1) * (2 * radius + 1));
      if (!plan_.count_include_pad) weight *= scales_.rows(radius)[center];
      fill_row(weights_ + radius * kPackedLanes, kPackedLanes, weight);
    }
    for (int d = -plan_.radius_h; d <= plan_.radius_h; ++d) {
      const int64_t line = center + d;
      averages_.lines[kStreamedRadius + d] = line == clamp_line(line, plan_.h) ? x[line] : zeros_;
    }
    return averages_;
  }

  const MaximumRow& maxima_around(const DenseLines& x, int64_t center) {
    for (int d = -plan_.radius_h; d <= plan_.radius_h; ++d) {
      maxima_.lines[kStreamedRadius + d] = x[clamp_line(center + d, plan_.h)];
    }
    return maxima_;
  }

  const Plan& plan_;
  const BorderScales& scales_;
  const int average_radii_, maximum_radii_;  // sets
  float *weights_ = nullptr, *zeros_ = nullptr;
  AverageRow averages_{};  // around the row at hand
  MaximumRow maxima_{};
};

}  // namespace metapool::cpu::METAPOOL_ISA
