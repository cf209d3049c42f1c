// Single poolings along a row, streamed: where not their mixture is wanted but each of them.
#pragma once

#include "maps.h"
#include "streams.h"

namespace metapool::cpu::METAPOOL_ISA {

class PooledRows {
 public:
  PooledRows(const Plan& plan, const BorderScales& scales, Arena& arena)
      : plan_(plan), scales_(scales) {
    if (plan.form != Form::kMoments) return;
    ones_ = arena.take_row<float>(kPackedLanes, 1);
    weights_ = arena.take_row<float>(kPackedLanes, 0);
    zeros_ = arena.take_row<float>(plan.w * kPackedLanes, 0);
  }

  // Calls body(item, write) for each of the poolings; write(x, center, start, out) does out = start
  // + pooling along row `center` of x, for a start of [16] and a dense row.
  template <typename Body>
  void for_each(const Body& body) const {
    const auto with = [&](const PoolItem& item, auto write) {
      if (item.index < 0) return;
      body(item, [&](const DenseLines& x, int64_t center, const float* start, float* out) {
        (this->*write)(item, x, center, start, out);
      });
    };
    with(plan_.none, &PooledRows::write_identity);
    with(plan_.skip, &PooledRows::write_identity);
    for (const PoolItem& item : plan_.avg) with(item, &PooledRows::write_average);
    for (const PoolItem& item : plan_.max) with(item, &PooledRows::write_maximum);
  }

 private:
  void write_identity(const PoolItem& item, const DenseLines& x, int64_t center, const float* start,
                      float* out) const {
    AverageRow row{};
    row.x = item.index == plan_.none.index ? zeros_ : x[center];
    row.x_weights = ones_;
    row.start = start;
    row.out = out;
    row.columns = plan_.w;
    row.pitch = kPackedLanes;
    stream_averages<0, Scales::kNone, false>(row);
  }

  void write_average(const PoolItem& item, const DenseLines& x, int64_t center, const float* start,
                     float* out) const {
    const int radius = item.radius_h;
    AverageRow row{};
    float weight = 1.0f / static_cast<float>((2 * radius + 1) * (2 * radius + 1));
    if (!plan_.count_include_pad) {
      weight *= scales_.rows(radius)[center];
      row.column_scales[radius] = scales_.columns(radius);
      row.border = 2 * radius;
    }
    fill_row(weights_, kPackedLanes, weight);
    row.weights[radius] = weights_;
    for (int d = -radius; d <= radius; ++d) {
      const int64_t line = center + d;
      row.lines[kStreamedRadius + d] = line == clamp_line(line, plan_.h) ? x[line] : zeros_;
    }
    row.start = start;
    row.out = out;
    row.columns = plan_.w;
    row.pitch = kPackedLanes;
    stream_averages_of<Scales::kOfOutputs, false>(1 << radius, !plan_.count_include_pad, row);
  }

  void write_maximum(const PoolItem& item, const DenseLines& x, int64_t center, const float* start,
                     float* out) const {
    MaximumRow row{};
    row.weights[item.radius_h] = ones_;
    for (int d = -item.radius_h; d <= item.radius_h; ++d) {
      row.lines[kStreamedRadius + d] = x[clamp_line(center + d, plan_.h)];
    }
    row.start = start;
    row.out = out;
    row.columns = plan_.w;
    row.pitch = kPackedLanes;
    with_set(1 << item.radius_h, [&](auto set) METAPOOL_LAMBDA {
      if constexpr (set != 0) stream_maxima<set, false>(row);
    });
  }

  const Plan& plan_;
  const BorderScales& scales_;
  float *ones_ = nullptr, *weights_ = nullptr, *zeros_ = nullptr;
};

}  // namespace metapool::cpu::METAPOOL_ISA
