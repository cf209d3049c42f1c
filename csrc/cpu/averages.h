// The separable averages: down the columns first, then along the row, each window extending the
// one before it. Shared by forward and backward.
#pragma once

#include "row_math.h"
#include "rows.h"

namespace metapool::cpu::METAPOOL_ISA {

template <typename Acc, int kLanes>
class Averages {
 public:
  Averages(const Plan& plan, Arena& arena) : plan_(plan), in_(plan) {
    column_sums_ = arena.take<Acc>(in_.size());
    row_sums_ = arena.take<Acc>(in_.out_size());
    scales_ = arena.take<Acc>(in_.w_out);
    scaled_ = arena.take<Acc>(in_.out_size());
  }

  // Calls body(item, sums, area) for each average of the output row around input row `center`:
  // the average is sums / area. With count_include_pad the area is that of the window, without it
  // is 1 and the sums are divided already.
  template <typename Body>
  void for_each(const RowRing<Acc>& values, int64_t center, Body body) {
    int reached_h = -1, reached_w = -1;
    for (const PoolItem& item : plan_.avg) {
      if (item.radius_h != reached_h) {
        extend_column_sums(values, center, reached_h, item.radius_h);
        reached_h = item.radius_h;
        reached_w = -1;
      }
      extend_row_sums(reached_w, item.radius_w);
      reached_w = item.radius_w;
      if (plan_.count_include_pad) {
        body(item, row_sums_, static_cast<Acc>((2 * item.radius_h + 1) * (2 * item.radius_w + 1)));
      } else {
        divide(center, item);
        body(item, scaled_, Acc(1));
      }
    }
  }

 private:
  // Sums rows [center - radius, center + radius], the part up to `reached` being there already.
  void extend_column_sums(const RowRing<Acc>& values, int64_t center, int reached, int radius) {
    in_.for_each_run([&](int64_t offset, int64_t count) {
      Acc* const sums = column_sums_ + offset;
      if (reached < 0) copy_row(sums, values[center] + offset, count);
      for (int d = reached < 0 ? 1 : reached + 1; d <= radius; ++d) {
        if (center - d >= 0) add_row(sums, values[center - d] + offset, count);
        if (center + d < plan_.h) add_row(sums, values[center + d] + offset, count);
      }
    });
  }

  // The same along the row; the padding of column_sums_ is zero from the start and stays so.
  void extend_row_sums(int reached, int radius) {
    const int64_t size = in_.out_size();
    if (reached < 0) copy_row(row_sums_, column_sums_ + in_.tap(0), size);
    for (int d = reached < 0 ? 1 : reached + 1; d <= radius; ++d) {
      add_row(row_sums_, column_sums_ + in_.tap(-d), size);
      add_row(row_sums_, column_sums_ + in_.tap(d), size);
    }
  }

  void divide(int64_t center, const PoolItem& item) {
    const int64_t rows = divisor(center, item.radius_h, plan_.h, false);
    for (int64_t j = 0; j < in_.w_out; ++j) {
      const int64_t columns = divisor(j * in_.step, item.radius_w, in_.w, false);
      scales_[j] = Acc(1) / static_cast<Acc>(rows * columns);
    }
    scale_pixels<kLanes>(scaled_, scales_, row_sums_, in_.w_out);
  }

  const Plan& plan_;
  const RowShape<kLanes> in_;
  Acc *column_sums_, *row_sums_, *scales_, *scaled_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
