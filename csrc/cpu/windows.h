// Sums and maxima of windows, separably: down the columns over lines of a map, then along the row.
// Each window extends the one before it; neighbouring rows and pixels share what they have in
// common. Nothing slides: every value is combined from the elements of its own window.
#pragma once

#include "rows.h"

namespace metapool::cpu::METAPOOL_ISA {

// Calls body(radius): with kUnroll a constant for the radii that networks use, else a number. Code
// for all radii, or for the rarer kernels too, would take minutes to compile.
template <bool kUnroll, typename Body>
METAPOOL_INLINE void with_radius(int radius, Body body) {
  if constexpr (!kUnroll) return body(radius);
  switch (radius) {
    case 0:
      return body(Int<0>{});
    case 1:
      return body(Int<1>{});
    case 2:
      return body(Int<2>{});
    case 3:
      return body(Int<3>{});
    default:
      return body(radius);
  }
}

// Calls body(d) for d from 1 to the radius, unrolled where it is a constant.
template <typename Body>
METAPOOL_INLINE void for_each_distance(int radius, Body body) {
  for (int d = 1; d <= radius; ++d) body(d);
}
template <int kRadius, typename Body>
METAPOOL_INLINE void for_each_distance(Int<kRadius>, Body body) {
  if constexpr (kRadius >= 1) body(Int<1>{});
  if constexpr (kRadius >= 2) body(Int<2>{});
  if constexpr (kRadius >= 3) body(Int<3>{});
  static_assert(kRadius <= 3);
}

// The rows that windows of one kind down the columns go to: out[d][r] is for radius d and row r,
// null where not wanted.
template <typename Acc>
struct ColumnRows {
  Acc* out[kMaxRadius + 1][2] = {};
  int radius = 0;  // the largest that is wanted

  void allocate(Arena& arena, Span<PoolItem> items, int64_t size, Acc padding) {
    for (const PoolItem& item : items) {
      radius = item.radius_h > radius ? item.radius_h : radius;
      for (Acc*& row : out[item.radius_h]) {
        if (row == nullptr) row = arena.take_row<Acc>(size, padding);
      }
    }
  }

  // Makes padding again of what blocks wrote beyond the last column.
  template <int kLanes>
  void fill_overruns(const RowShape<Acc, kLanes>& shape, Acc padding) const {
    for (int d = 0; d <= radius; ++d) {
      for (Acc* const row : out[d]) {
        if (row != nullptr) fill_overrun(row, shape, padding);
      }
    }
  }
};

// For kRows neighbouring rows (one or two), windows down the columns. lines[d] is the line at
// distance d from the first row. What the windows of both rows cover is combined once.
template <int kRows, int kLanes, typename Acc, typename Op>
void column_windows(const RowShape<Acc, kLanes>& shape, const Acc* const* lines,
                    const ColumnRows<Acc>& rows, Op op) {
  using B = Block<Acc, kLanes>;
  constexpr bool kUnroll = kLanes > 1 && sizeof(Acc) == sizeof(float);
  with_radius<kUnroll>(rows.radius, [&](auto radius) METAPOOL_LAMBDA {
    shape.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
      const auto line = [&](int d) METAPOOL_LAMBDA { return B::load(lines[d] + at); };
      B first = line(0);
      if (rows.out[0][0] != nullptr) {
        first.store(rows.out[0][0] + at);
        if constexpr (kRows == 2) line(1).store(rows.out[0][1] + at);
      }
      for_each_distance(radius, [&](int d) METAPOOL_LAMBDA {
        const B below = line(d), above = line(-d);
        B shared;
        for (int b = 0; b < B::kVectors; ++b) {
          shared.vector[b] = op(first.vector[b], below.vector[b]);
          first.vector[b] = op(shared.vector[b], above.vector[b]);
        }
        if (rows.out[d][0] == nullptr) return;
        first.store(rows.out[d][0] + at);
        if constexpr (kRows == 2) {
          const B next = line(d + 1);
          for (int b = 0; b < B::kVectors; ++b) {
            shared.vector[b] = op(shared.vector[b], next.vector[b]);
          }
          shared.store(rows.out[d][1] + at);
        }
      });
    });
  });
}

// The windows of a block along a row whose first pixel `row` points to. Along a packed row the
// four windows of a block share what all of them hold, and extend it by what is left on either
// side.
template <int kLanes, typename Radius, typename Acc, typename Op>
METAPOOL_INLINE Block<Acc, kLanes> row_windows(const Acc* row, Radius radius, Op op) {
  using B = Block<Acc, kLanes>;
  const auto pixel = [&](int p) METAPOOL_LAMBDA { return load(row + p * kLanes); };
  B out = B::load(row);
  if constexpr (kLanes == 1 || std::is_same_v<Radius, int>) {
    for_each_distance(radius, [&](int d) METAPOOL_LAMBDA {
      const B left = B::load(row - d * kLanes), right = B::load(row + d * kLanes);
      for (int b = 0; b < B::kVectors; ++b) {
        out.vector[b] = op(op(out.vector[b], left.vector[b]), right.vector[b]);
      }
    });
  } else if constexpr (radius == 1) {
    const Vec<Acc> left = op(pixel(0), pixel(1)), right = op(pixel(2), pixel(3));
    out.vector[0] = op(left, pixel(-1));
    out.vector[1] = op(left, pixel(2));
    out.vector[2] = op(right, pixel(1));
    out.vector[3] = op(right, pixel(4));
  } else if constexpr (radius > 1) {
    constexpr int kRadius = Radius::value;
    Vec<Acc> core = op(pixel(3 - kRadius), pixel(4 - kRadius));
    for (int p = 5 - kRadius; p <= kRadius; ++p) core = op(core, pixel(p));
    const Vec<Acc> left = op(pixel(1 - kRadius), pixel(2 - kRadius));
    const Vec<Acc> right = op(pixel(kRadius + 1), pixel(kRadius + 2));
    out.vector[0] = op(op(left, pixel(-kRadius)), core);
    out.vector[1] = op(op(left, core), pixel(kRadius + 1));
    out.vector[2] = op(op(pixel(2 - kRadius), core), right);
    out.vector[3] = op(op(right, pixel(kRadius + 3)), core);
  }
  return out;
}

}  // namespace metapool::cpu::METAPOOL_ISA
