// The separable maximum: along each row first, then down the rows, which keeps row-major order
// and so the choice among equal maxima. Shared by forward and backward.
#pragma once

#include "row_math.h"
#include "rows.h"

namespace metapool::cpu::METAPOOL_ISA {

// For each distinct window width, the horizontal maxima of the last few input rows.
template <typename Acc, int kLanes>
class HorizontalMaxima {
 public:
  HorizontalMaxima(const Plan& plan, bool codes, bool values, int64_t rows, Arena& arena)
      : widths_(plan.max_widths) {
    const int64_t size = RowShape<kLanes>(plan).out_size();
    for (int i = 0; i < widths_.count; ++i) {
      key_[i].allocate(arena, rows, size);
      if (codes) code_[i].allocate(arena, rows, size);
      if (values) value_[i].allocate(arena, rows, size);
    }
  }

  // Computes the maxima of one row, given with its edges replicated.
  template <bool kCode, bool kValue>
  void load(const RowShape<kLanes>& shape, int64_t line, const Acc* x, const Acc* values) {
    const int64_t size = shape.out_size();
    for (int i = 0; i < widths_.count; ++i) {
      const Maxima<Acc> acc = at<kCode, kValue>(i, line);
      int reached = 0;
      if (i == 0) {
        start_maxima<kCode, kValue>(acc, x + shape.tap(0), values + shape.tap(0), size);
      } else {
        const Maxima<Acc> narrower = at<kCode, kValue>(i - 1, line);
        copy_row(acc.key, narrower.key, size);
        if constexpr (kCode) copy_row(acc.code, narrower.code, size);
        if constexpr (kValue) copy_row(acc.value, narrower.value, size);
        reached = widths_.data[i - 1];
      }
      for (int d = reached + 1; d <= widths_.data[i]; ++d) {
        extend_maxima<false, kCode, kValue>(acc, x + shape.tap(-d), Acc(-d), values + shape.tap(-d),
                                            size);
        extend_maxima<true, kCode, kValue>(acc, x + shape.tap(d), Acc(d), values + shape.tap(d),
                                           size);
      }
    }
  }

  // Extends vertical windows around row `center` from `reached` to `radius` rows each way; a
  // negative `reached` starts them. Rows outside of the map are left out.
  template <bool kCode, bool kValue>
  void extend(const Plan& plan, const Maxima<Acc>& acc, int width_index, int64_t center,
              int reached, int radius) const {
    const int64_t size = RowShape<kLanes>(plan).out_size();
    if (reached < 0) {
      const Maxima<Acc> row = at<false, kValue>(width_index, center);
      start_maxima<kCode, kValue>(acc, row.key, row.value, size);
      reached = 0;
    }
    for (int d = reached + 1; d <= radius; ++d) {
      if (center - d >= 0) {
        const Maxima<Acc> row = at<false, kValue>(width_index, center - d);
        extend_maxima<false, kCode, kValue>(acc, row.key, Acc(-d), row.value, size);
      }
      if (center + d < plan.h) {
        const Maxima<Acc> row = at<false, kValue>(width_index, center + d);
        extend_maxima<true, kCode, kValue>(acc, row.key, Acc(d), row.value, size);
      }
    }
  }

  // The horizontal position of each maximum of a row, relative to its window's centre.
  const Acc* codes(int width_index, int64_t line) const { return code_[width_index][line]; }

 private:
  template <bool kCode, bool kValue>
  Maxima<Acc> at(int i, int64_t line) const {
    return {key_[i][line], kCode ? code_[i][line] : nullptr, kValue ? value_[i][line] : nullptr};
  }

  Span<int> widths_;
  RowRing<Acc> key_[kMaxRadius + 1], code_[kMaxRadius + 1], value_[kMaxRadius + 1];
};

}  // namespace metapool::cpu::METAPOOL_ISA
