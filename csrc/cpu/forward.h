// Forward: streams over the lines of x once. One or two rows of the output at a time, and a tile of
// their columns at a time, so that everything stays in the first cache: the windows are combined
// down the columns, then along the row, and are weighted and added up in registers.
#pragma once

#include "weights.h"
#include "windows.h"
#include "winners.h"

namespace metapool::cpu::METAPOOL_ISA {

template <typename Acc, int kLanes, bool kValue>
class Forward {
  using B = Block<Acc, kLanes>;
  using Lines = MapLines<Acc, kLanes>;

  static constexpr Acc kLowest = -static_cast<Acc>(__builtin_inf());
  // Columns of a tile: with the lines of x, its rows fill a first cache of 32 KB.
  static constexpr int64_t kTile = kLanes == 1 ? 256 : 16;

  // Poolings of one kind: their windows down the columns, in a row for each radius and output row.
  struct Columns {
    ColumnRows<Acc> rows;

    void allocate(Arena& arena, Span<PoolItem> items, int64_t size, Acc padding) {
      for (const PoolItem& item : items) {
        rows.radius = item.radius_h > rows.radius ? item.radius_h : rows.radius;
        for (Acc*& row : rows.out[item.radius_h]) {
          if (row == nullptr) row = arena.take_row<Acc>(size, padding);
        }
      }
    }
  };

 public:
  Forward(const Plan& plan, const ForwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        shape_(plan.w, plan.radius_w),
        tile_shape_(plan.w < kTile + kTile / 2 ? plan.w : kTile + plan.radius_w, plan.radius_w),
        weights_(plan, shape_, arena),
        winners_(plan, shape_, arena) {
    const int64_t lines = 2 * plan.radius_h + 2;
    values_.allocate(arena, lines, shape_.size, Acc(0));
    nans_.allocate(arena, lines, 1, false);
    sums_.allocate(arena, plan.avg, tile_shape_.size, 0);
    if (kValue) {
      picked_.allocate(arena, 2 * plan.max.count, shape_.size, Acc(0));
    } else {
      maxima_.allocate(arena, plan.max, tile_shape_.size, kLowest);
    }
    zeros_ = arena.take_row<Acc>(shape_.size, 0);
    x_row_ = kValue ? arena.take_row<Acc>(shape_.size, static_cast<Acc>(__builtin_nan("")))
                    : nullptr;
    out_row_ = arena.take_row<Acc>(2 * shape_.size, 0);
    staging_ = arena.take<Acc>(shape_.size);
  }

  void run(const Task& task, const Task& next) {
    const Lines x(args_.x, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines values(args_.values, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines out(args_.out, plan_, plan_.h_out, plan_.w_out, plan_.stride_w, task, next);
    weights_.load(args_.weights, task);
    int64_t next_line = 0;
    for (int64_t i = task.row_begin; i < task.row_end;) {
      const int64_t center = i * plan_.stride_h;
      const int rows = plan_.stride_h == 1 && i + 1 < task.row_end ? 2 : 1;
      const int64_t first = first_valid(center, plan_.radius_h);
      const int64_t last = last_valid(center + rows - 1, plan_.radius_h, plan_.h);
      for (next_line = next_line > first ? next_line : first; next_line <= last; ++next_line) {
        load_line(x, values, next_line);
      }
      rows == 2 ? compute<2>(center) : compute<1>(center);
      for (int r = 0; r < rows; ++r) {
        out.store(shape_, i + r, out_row_ + r * shape_.size, staging_);
      }
      i += rows;
    }
  }

 private:
  void load_line(const Lines& x, const Lines& values, int64_t line) {
    Acc* const row = values_[line];
    values.load(shape_, line, row, staging_);
    if constexpr (kValue) {
      x.load(shape_, line, x_row_, staging_);
      winners_.load_line(line, x_row_, row);
    } else if (plan_.max.count > 0) {
      *nans_[line] = has_nan(shape_, row);
    }
  }

  // Computes kRows rows of the output around input row `center` in out_row_.
  template <int kRows>
  void compute(int64_t center) {
    const Acc* inside[2 * kMaxRadius + 2];   // with zeros beyond the map
    const Acc* clamped[2 * kMaxRadius + 2];  // with the map's edge beyond the map
    bool nan = false;
    const int radius = plan_.radius_h;
    for (int d = -radius; d < radius + kRows; ++d) {
      const int64_t line = center + d, valid = clamp_line(line, plan_.h);
      clamped[radius + d] = values_[valid];
      inside[radius + d] = line == valid ? values_[valid] : zeros_;
      nan |= *nans_[valid];
    }
    if constexpr (kValue) {
      winners_.template find<kRows>(center, [&](int m, int r, int64_t at, const auto& winners) METAPOOL_LAMBDA {
        for (int b = 0; b < B::kVectors; ++b) {
          store(picked_[2 * m + r] + at + b * B::kStep, winners[b].value);
        }
      });
    }
    const bool tiled = tile_shape_.w < plan_.w;
    const int64_t step = tiled ? kTile : plan_.w;
    for (int64_t begin = 0; begin < plan_.w; begin += step) {
      const int64_t end = begin + step < plan_.w ? begin + step : plan_.w;
      // Windows reach beyond the tile; where they reach beyond the map, there is padding.
      const int64_t from = first_valid(begin, plan_.radius_w);
      const int64_t to = last_valid(end - 1, plan_.radius_w, plan_.w) + 1;
      const int64_t at_line = shape_.cell(from), at_row = tile_shape_.cell(from - begin);
      if (plan_.avg.count > 0) {
        column_windows<kRows, kLanes>(inside + radius, at_line, sums_.rows, at_row, to - from,
                                      Sum{});
        pad_tile(sums_.rows, begin, end, from, to, Acc(0));
      }
      if (!kValue && plan_.max.count > 0) {
        if (nan) {
          column_windows<kRows, kLanes>(clamped + radius, at_line, maxima_.rows, at_row, to - from,
                                        Maximum<true>{});
        } else {
          column_windows<kRows, kLanes>(clamped + radius, at_line, maxima_.rows, at_row, to - from,
                                        Maximum<false>{});
        }
        pad_tile(maxima_.rows, begin, end, from, to, kLowest);
      }
      nan ? mix<kRows, true>(center, begin, end) : mix<kRows, false>(center, begin, end);
    }
  }

  // Fills what a tile's windows see beyond the map.
  void pad_tile(const ColumnRows<Acc>& rows, int64_t begin, int64_t end, int64_t from, int64_t to,
                Acc padding) {
    const bool tiled = tile_shape_.w < plan_.w;
    const int64_t covered = from + (to - from + B::kPixels - 1) / B::kPixels * B::kPixels;
    const int64_t right = tiled && end + plan_.radius_w > covered ? end + plan_.radius_w : covered;
    for (int d = 0; d <= rows.radius; ++d) {
      for (Acc* const row : rows.out[d]) {
        if (row == nullptr) continue;
        if (tiled && begin == 0) fill_pixels(row, tile_shape_, -plan_.radius_w, 0, padding);
        if (to == plan_.w) fill_pixels(row, tile_shape_, to - begin, right - begin, padding);
      }
    }
  }

  // Adds up columns [begin, end) of out_row_, one pooling after the other.
  template <int kRows, bool kNan>
  void mix(int64_t center, int64_t begin, int64_t end) {
    const int64_t first = shape_.cell(begin), in_tile = tile_shape_.cell(0);
    const auto add = [&](const Acc* weight, const auto& pooled_at) METAPOOL_LAMBDA {
      for_each_block<Acc, kLanes>(end - begin, [&](int64_t offset) METAPOOL_LAMBDA {
        for (int r = 0; r < kRows; ++r) {
          Acc* const out = out_row_ + r * shape_.size + first + offset;
          B acc = B::load(out);
          const B pooled = pooled_at(r, offset);
          for (int b = 0; b < B::kVectors; ++b) {
            acc.vector[b] += lane_values<kLanes>(weight, offset, b) * pooled.vector[b];
          }
          acc.store(out);
        }
      });
    };
    start<kRows>(center, begin, end);
    for (const PoolItem& item : plan_.avg) {
      Acc* const* const rows = sums_.rows.out[item.radius_h];
      with_radius(item.radius_w, [&](auto radius) METAPOOL_LAMBDA {
        add(weights_.average(item), [&](int r, int64_t offset) METAPOOL_LAMBDA {
          B pooled = row_windows<kLanes>(rows[r] + in_tile + offset, radius, Sum{});
          weights_.divide(item, center + r, first + offset, pooled);
          return pooled;
        });
      });
    }
    for (int m = 0; m < plan_.max.count; ++m) {
      const PoolItem& item = plan_.max.data[m];
      const Acc* const weight = weights_.weight(item.index);
      if constexpr (kValue) {
        add(weight, [&](int r, int64_t offset) METAPOOL_LAMBDA {
          return B::load(picked_[2 * m + r] + first + offset);
        });
      } else {
        Acc* const* const rows = maxima_.rows.out[item.radius_h];
        with_radius(item.radius_w, [&](auto radius) METAPOOL_LAMBDA {
          add(weight, [&](int r, int64_t offset) METAPOOL_LAMBDA {
            return row_windows<kLanes>(rows[r] + in_tile + offset, radius, Maximum<kNan>{});
          });
        });
      }
    }
  }

  // Begins with what needs no windows.
  template <int kRows>
  void start(int64_t center, int64_t begin, int64_t end) {
    const int64_t first = shape_.cell(begin);
    for_each_block<Acc, kLanes>(end - begin, [&](int64_t offset) METAPOOL_LAMBDA {
      for (int r = 0; r < kRows; ++r) {
        const Acc* const values = values_[center + r] + first + offset;
        B acc;
        for (int b = 0; b < B::kVectors; ++b) {
          acc.vector[b] = lane_values<kLanes>(weights_.start(), offset, b);
          if (plan_.skip < 0) continue;
          acc.vector[b] += lane_values<kLanes>(weights_.weight(plan_.skip), offset, b) *
                           load(values + b * B::kStep);
        }
        acc.store(out_row_ + r * shape_.size + first + offset);
      }
    });
  }

  const Plan& plan_;
  const ForwardArgs& args_;
  const RowShape<Acc, kLanes> shape_, tile_shape_;
  Weights<Acc, kLanes> weights_;
  Winners<Acc, kLanes, false, kValue> winners_;
  RowRing<Acc> values_, picked_;
  RowRing<bool> nans_;
  Columns sums_, maxima_;
  Acc *zeros_, *x_row_, *out_row_, *staging_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
