// Which element of each window is its maximum, exactly as PyTorch picks it: along the row first,
// then down the columns, since only that order finds the first maximum in row-major order.
//
// A winner is known by two small codes: the line that it lies on and, on that line, the column
// relative to the window's centre. For a window that extends a narrower one the column code is 0
// where the narrower window's winner wins.
#pragma once

#include "windows.h"

namespace metapool::cpu::METAPOOL_ISA {

// A column code that no winner has; what surrounds the columns of a row is filled with it.
constexpr int8_t kNoWinner = 127;

// The code of a line. Lines of one window never share it.
METAPOOL_INLINE int line_code(int64_t line) { return static_cast<int>(line & 63); }

// The winner among the elements combined so far, for a vector of windows: its key, its code, and
// the element of another map that goes with it.
template <typename Acc, bool kCode, bool kValue>
struct Winner {
  struct Nothing {};
  Vec<Acc> key;
  std::conditional_t<kCode, Code<Acc>, Nothing> code;
  std::conditional_t<kValue, Vec<Acc>, Nothing> value;
};

template <bool kCode, bool kValue, typename Acc>
METAPOOL_INLINE void replace_where(Mask<Acc> taken, Winner<Acc, kCode, kValue>& winner,
                                   const Winner<Acc, kCode, kValue>& other) {
  winner.key = taken ? other.key : winner.key;
  if constexpr (kCode) winner.code = taken ? other.code : winner.code;
  if constexpr (kValue) winner.value = taken ? other.value : winner.value;
}

// Extends windows by an element that comes after (before) all others in row-major order. Without
// kNan a NaN element is padding: it never wins.
template <bool kNan, bool kCode, bool kValue, typename Acc>
METAPOOL_INLINE void extend_after(Winner<Acc, kCode, kValue>& winner,
                                  const Winner<Acc, kCode, kValue>& next,
                                  Mask<Acc> inside = ~Mask<Acc>{}) {
  Mask<Acc> taken = next.key > winner.key;
  if constexpr (kNan) taken = right_wins(winner.key, next.key) & inside;
  replace_where(taken, winner, next);
}

template <bool kNan, bool kCode, bool kValue, typename Acc>
METAPOOL_INLINE void extend_before(Winner<Acc, kCode, kValue>& winner,
                                   const Winner<Acc, kCode, kValue>& previous,
                                   Mask<Acc> inside = ~Mask<Acc>{}) {
  Mask<Acc> taken = previous.key >= winner.key;
  if constexpr (kNan) taken = ~right_wins(previous.key, winner.key) & inside;
  replace_where(taken, winner, previous);
}

template <typename Acc, int kLanes, bool kCode, bool kValue>
class Winners {
  using B = Block<Acc, kLanes>;
  static constexpr bool kUnroll = kLanes > 1 && sizeof(Acc) == sizeof(float) && !kValue;
  using W = Winner<Acc, kCode, kValue>;

 public:
  // Vectors that are worked on together, so that the next choice need not wait for the last one;
  // as many as there are registers for.
  static constexpr int kGroup = kVectorBytes == 64 ? 4 : 2;

  Winners(const Plan& plan, const RowShape<Acc, kLanes>& shape, bool wanted, Arena& arena)
      : plan_(plan), shape_(shape) {
    if (!wanted) return;
    const int64_t rows = 2 * plan.radius_h + 2;
    keys_.allocate(arena, rows * plan.max_widths.count, shape.size, Acc(0));
    if (kCode) columns_.allocate(arena, rows * plan.max_widths.count, shape.size, kNoWinner);
    if (kValue) values_.allocate(arena, rows * plan.max_widths.count, shape.size, Acc(0));
    nans_.allocate(arena, rows, 1, false);
    inside_ = arena.take_row<Acc>(shape.size, 0);
    if (!arena.counts_only()) fill_pixels(inside_, shape, 0, shape.w, Acc(1));
  }

  // Finds the winners along one line. `x` has NaN for padding.
  void load_line(int64_t line, const Acc* x, const Acc* values) {
    const bool nan = has_nan(shape_, x);
    *nans_[line] = nan;
    nan ? find_in_row<true>(line, x, values) : find_in_row<false>(line, x, values);
  }

  // For each item of plan.max and each of kRows neighbouring rows around input row `center`, calls
  // body(item, row, offset, winners) for each kGroup vectors: the codes are those of lines.
  template <int kRows, typename Body>
  METAPOOL_INLINE void find(int64_t center, Body body) {
    bool nan = false;
    const int64_t last = last_valid(center + kRows - 1, plan_.radius_h, plan_.h);
    for (int64_t line = first_valid(center, plan_.radius_h); line <= last; ++line) {
      nan |= *nans_[line];
    }
    nan ? find_in_columns<true, kRows>(center, body) : find_in_columns<false, kRows>(center, body);
  }

  // The column codes of a line for a width of plan.max_widths.
  const int8_t* columns(int width, int64_t line) const { return columns_[at_width(width, line)]; }

 private:
  METAPOOL_INLINE int64_t at_width(int width, int64_t line) const {
    return line * plan_.max_widths.count + width;
  }

  template <bool kNan>
  void find_in_row(int64_t line, const Acc* x, const Acc* values) {
    int width_of[kMaxRadius + 1];
    for (int& width : width_of) width = -1;
    for (int width = 0; width < plan_.max_widths.count; ++width) {
      width_of[plan_.max_widths.data[width]] = width;
    }
    const int largest = plan_.max_widths.data[plan_.max_widths.count - 1];
    with_radius<kUnroll>(largest, [&](auto radius) METAPOOL_LAMBDA {
      shape_.template for_each_group<kGroup>([&](int64_t group) METAPOOL_LAMBDA {
        const auto at = [&](int v) METAPOOL_LAMBDA { return group + v * kVectorLanes<Acc>; };
        const auto element = [&](int v, int d) METAPOOL_LAMBDA {
          W winner{load(x + at(v) + d * kLanes), {}, {}};
          if constexpr (kCode) winner.code = splat_code<Acc>(d);
          if constexpr (kValue) winner.value = load(values + at(v) + d * kLanes);
          return winner;
        };
        const auto inside = [&](int v, int d) METAPOOL_LAMBDA {
          if constexpr (kNan) return load(inside_ + at(v) + d * kLanes) != 0;
          return Mask<Acc>{};
        };
        W winners[kGroup];
        for (int v = 0; v < kGroup; ++v) winners[v] = element(v, 0);
        const auto keep = [&](int width) METAPOOL_LAMBDA {
          if (width < 0) return;
          for (int v = 0; v < kGroup; ++v) {
            store(keys_[at_width(width, line)] + at(v), winners[v].key);
            if constexpr (kValue) store(values_[at_width(width, line)] + at(v), winners[v].value);
            if constexpr (kCode) {
              store_codes<Acc>(columns_[at_width(width, line)] + at(v), winners[v].code);
              winners[v].code = splat_code<Acc>(0);
            }
          }
        };
        keep(width_of[0]);
        for_each_distance(radius, [&](int d) METAPOOL_LAMBDA {
          for (int v = 0; v < kGroup; ++v) {
            extend_before<kNan>(winners[v], element(v, -d), inside(v, -d));
            extend_after<kNan>(winners[v], element(v, d), inside(v, d));
          }
          keep(width_of[d]);
        });
      });
    });
    if constexpr (kCode) {
      for (int width = 0; width < plan_.max_widths.count; ++width) {
        fill_overrun(columns_[at_width(width, line)], shape_, kNoWinner);
      }
    }
  }

  template <bool kNan, int kRows, typename Body>
  METAPOOL_INLINE void find_in_columns(int64_t center, Body& body) {
    for (int m = 0, width = 0; width < plan_.max_widths.count; ++width) {
      int item_of[kMaxRadius + 1];
      for (int& item : item_of) item = -1;
      int largest = 0;
      for (; m < plan_.max.count; ++m) {
        const PoolItem& item = plan_.max.data[m];
        if (item.radius_w != plan_.max_widths.data[width]) break;
        item_of[item.radius_h] = m;
        largest = item.radius_h;
      }
      const Acc* keys[2 * kMaxRadius + 2];
      const Acc* values[2 * kMaxRadius + 2];
      int codes[2 * kMaxRadius + 2];
      for (int d = -largest; d < largest + kRows; ++d) {
        // Beyond the map stands its edge: it is in the same window anyhow.
        const int64_t line = clamp_line(center + d, plan_.h);
        keys[largest + d] = keys_[at_width(width, line)];
        if constexpr (kValue) values[largest + d] = values_[at_width(width, line)];
        codes[largest + d] = line_code(line);
      }
      with_radius<kUnroll>(largest, [&](auto radius) METAPOOL_LAMBDA {
        shape_.template for_each_group<kGroup>([&](int64_t group) METAPOOL_LAMBDA {
          const auto at = [&](int v) METAPOOL_LAMBDA { return group + v * kVectorLanes<Acc>; };
          const auto element = [&](int v, int d) METAPOOL_LAMBDA {
            W winner{load(keys[radius + d] + at(v)), {}, {}};
            if constexpr (kCode) winner.code = splat_code<Acc>(codes[radius + d]);
            if constexpr (kValue) winner.value = load(values[radius + d] + at(v));
            return winner;
          };
          W first[kGroup], second[kGroup];
          const auto found = [&](int item, int r, const W* winners)
                                 METAPOOL_LAMBDA { body(item, r, group, winners); };
          for (int v = 0; v < kGroup; ++v) first[v] = element(v, 0);
          if (item_of[0] >= 0) {
            found(item_of[0], 0, first);
            if constexpr (kRows == 2) {
              for (int v = 0; v < kGroup; ++v) second[v] = element(v, 1);
              found(item_of[0], 1, second);
            }
          }
          for_each_distance(radius, [&](int d) METAPOOL_LAMBDA {
            for (int v = 0; v < kGroup; ++v) {
              extend_after<kNan>(first[v], element(v, d));
              second[v] = first[v];
              extend_before<kNan>(first[v], element(v, -d));
            }
            if (item_of[d] < 0) return;
            found(item_of[d], 0, first);
            if constexpr (kRows == 2) {
              for (int v = 0; v < kGroup; ++v) extend_after<kNan>(second[v], element(v, d + 1));
              found(item_of[d], 1, second);
            }
          });
        });
      });
    }
  }

  const Plan& plan_;
  const RowShape<Acc, kLanes>& shape_;
  RowRing<Acc> keys_, values_;
  RowRing<int8_t> columns_;
  RowRing<bool> nans_;
  Acc* inside_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
