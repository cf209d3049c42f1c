// Sums and maxima of windows, separably: down the columns over lines of a map, then along the row.
// Each window extends the one before it; neighbouring rows and pixels share what they have in
// common. Nothing slides: every value is combined from the elements of its own window.
#pragma once

#include "rows.h"

namespace metapool::cpu::METAPOOL_ISA {

// For kRows neighbouring rows (one or two), windows of the given ascending radii down the columns.
// lines[d] is the line at distance d from the first row; out[slot * kRows + r] receives row r for
// radii[slot]. With two rows, what both windows cover is combined once.
template <int kRows, int kLanes, typename Acc, typename Op>
METAPOOL_INLINE void column_windows(const RowShape<Acc, kLanes>& shape, const Acc* const* lines,
                                    Span<int> radii, Acc* const* out, Op op) {
  using B = Block<Acc, kLanes>;
  shape.for_each_block([&](int64_t at) {
    const auto line = [&](int d) { return B::load(lines[d] + at); };
    B first = line(0), shared{};
    for (int slot = 0, d = 0; slot < radii.count; ++slot) {
      while (d < radii.data[slot]) {
        ++d;
        const B below = line(d), above = line(-d);
        for (int b = 0; b < B::kVectors; ++b) {
          shared.vector[b] = op(first.vector[b], below.vector[b]);
          first.vector[b] = op(shared.vector[b], above.vector[b]);
        }
      }
      first.store(out[slot * kRows] + at);
      if constexpr (kRows == 2) {
        B second = line(d + 1);
        if (d > 0) {
          for (int b = 0; b < B::kVectors; ++b) {
            second.vector[b] = op(shared.vector[b], second.vector[b]);
          }
        }
        second.store(out[slot * kRows + 1] + at);
      }
    }
  });
}

// The windows of a block of pixels along a packed row: four outputs out of 4 + 2 * kRadius pixels.
// What all four cover is combined once and extended by what is left on either side.
template <int kRadius, int kLanes, typename Acc, typename Op>
METAPOOL_INLINE Block<Acc, kLanes> packed_row_windows(const Acc* row, Op op) {
  const auto pixel = [&](int p) { return load(row + (p - kRadius) * kLanes); };
  Block<Acc, kLanes> out;
  if constexpr (kRadius == 0) {
    for (int b = 0; b < 4; ++b) out.vector[b] = pixel(b);
  } else if constexpr (kRadius == 1) {
    const Vec<Acc> left = op(pixel(1), pixel(2)), right = op(pixel(3), pixel(4));
    out.vector[0] = op(left, pixel(0));
    out.vector[1] = op(left, pixel(3));
    out.vector[2] = op(right, pixel(2));
    out.vector[3] = op(right, pixel(5));
  } else {
    constexpr int kEnd = 2 * kRadius;  // the last pixel that all four windows hold; 3 is the first
    Vec<Acc> core = op(pixel(3), pixel(4));
    for (int p = 5; p <= kEnd; ++p) core = op(core, pixel(p));
    const Vec<Acc> left = op(pixel(1), pixel(2)), right = op(pixel(kEnd + 1), pixel(kEnd + 2));
    out.vector[0] = op(op(left, pixel(0)), core);
    out.vector[1] = op(op(left, core), pixel(kEnd + 1));
    out.vector[2] = op(op(pixel(2), core), right);
    out.vector[3] = op(op(right, pixel(kEnd + 3)), core);
  }
  return out;
}

// The windows of a block along a row; `row` points to the block's first pixel.
template <int kLanes, typename Acc, typename Op>
METAPOOL_INLINE Block<Acc, kLanes> row_windows(const Acc* row, int radius, Op op) {
  using B = Block<Acc, kLanes>;
  if constexpr (kLanes == 1) {
    B out = B::load(row);
    for (int d = 1; d <= radius; ++d) {
      const B left = B::load(row - d), right = B::load(row + d);
      for (int b = 0; b < B::kVectors; ++b) {
        out.vector[b] = op(op(out.vector[b], left.vector[b]), right.vector[b]);
      }
    }
    return out;
  } else {
    switch (radius) {
      case 0:
        return packed_row_windows<0, kLanes>(row, op);
      case 1:
        return packed_row_windows<1, kLanes>(row, op);
      case 2:
        return packed_row_windows<2, kLanes>(row, op);
      case 3:
        return packed_row_windows<3, kLanes>(row, op);
      case 4:
        return packed_row_windows<4, kLanes>(row, op);
      case 5:
        return packed_row_windows<5, kLanes>(row, op);
      case 6:
        return packed_row_windows<6, kLanes>(row, op);
      default:
        return packed_row_windows<7, kLanes>(row, op);
    }
  }
}

}  // namespace metapool::cpu::METAPOOL_ISA
