// One row of the output in one go, for small square windows on packed rows: pixels come one by one,
// and all that windows have in common is carried from pixel to pixel in registers. Nothing slides:
// a window is always combined from the elements of its own.
#pragma once

#include "weights.h"
#include "windows.h"

namespace metapool::cpu::METAPOOL_ISA {

using Floats = Vec<float>;

// Windows up to this radius are streamed; for maxima of wider ones see scattered_maxima.h. Sets of
// radii are constants, a bit for each.
constexpr int kStreamedRadius = 3;
constexpr int kStreamedRadii = (2 << kStreamedRadius) - 2;

constexpr bool contains(int set, int radius) { return (set >> radius & 1) != 0; }

constexpr int largest_radius(int set) {
  int radius = 0;
  for (int r = 1; r <= kStreamedRadius; ++r) radius = contains(set, r) ? r : radius;
  return radius;
}

// The radii of `items` where they can be streamed, else -1.
inline int streamed_set(Span<PoolItem> items, int largest) {
  int set = 0;
  for (const PoolItem& item : items) {
    const bool square = item.radius_h == item.radius_w;
    const bool single = item.end == item.begin + 1;
    if (!square || !single || item.radius_w < 1 || item.radius_w > largest) return -1;
    set |= 1 << item.radius_w;
  }
  return set;
}

// Whether a problem can be streamed, its numbers allowing, with maxima up to a radius.
inline bool suits_streams(const Plan& plan, int largest_maximum) {
  return plan.stride_h == 1 && plan.stride_w == 1 && plan.skip.end - plan.skip.begin <= 1 &&
         streamed_set(plan.avg, kStreamedRadius) >= 0 &&
         streamed_set(plan.max, largest_maximum) >= 0;
}

// Calls body(set) with the set as a constant.
template <int kSet = kStreamedRadii, typename Body>
METAPOOL_INLINE void with_set(int set, Body body) {
  if (set == kSet) return body(Int<kSet>{});
  if constexpr (kSet > 0) with_set<kSet - 2>(set, body);
}

// The same for the set of one radius, and that of none for radius 0.
template <int kRadius = kStreamedRadius, typename Body>
METAPOOL_INLINE void with_set_of(int radius, Body body) {
  if (radius == kRadius) return body(Int<(1 << kRadius) & kStreamedRadii>{});
  if constexpr (kRadius > 0) with_set_of<kRadius - 1>(radius, body);
}

// Lines [line, line_end) of those [begin, end) that a task works on.
struct Chunk {
  int64_t begin, line, line_end, end;
};

// How windows along a line come about, level by level: a pair, a window of three, one of five, one
// of seven. Each is made of two of the level before it, which lie so many elements apart and may
// overlap; a pair is made of two elements. But for the pair, a level is the radius of its windows.
constexpr int distance_of_parts(int level) { return level < 2 ? 1 : 2; }

// The vector that came kDistance steps ago, `next` being that of this step.
template <int kDistance>
METAPOOL_INLINE Floats delay(Floats (&last)[2], Floats next) {
  const Floats oldest = last[kDistance - 1];
  last[1] = last[0];
  last[0] = next;
  return oldest;
}

// Calls body(i) for each i below kCount as a constant, upwards or downwards.
template <int kCount, int kFirst = 0, typename Body>
METAPOOL_INLINE void for_each_up(Body body) {
  if constexpr (kFirst < kCount) {
    body(Int<kFirst>{});
    for_each_up<kCount, kFirst + 1>(body);
  }
}
template <int kCount, typename Body>
METAPOOL_INLINE void for_each_down(Body body) {
  if constexpr (kCount > 0) {
    body(Int<kCount - 1>{});
    for_each_down<kCount - 1>(body);
  }
}

// Maxima of windows along a line whose elements come one by one; a window of radius r is found r
// elements after its centre.
template <int kRadius>
struct MaximaStream {
  Floats last[kRadius + 1][2];  // what each level may still need as a left part

  METAPOOL_INLINE void reset() {
    for (auto& level : last) {
      for (Floats& part : level) part = Floats{} - __builtin_inff();
    }
  }

  // Takes an element, combines parts by larger(level, left, right), and calls found(r, window) for
  // each radius.
  template <typename Larger, typename Found>
  METAPOOL_INLINE void push(Floats next, Larger larger, Found found) {
    Floats window = next;
    for_each_up<kRadius + 1>([&](auto level) METAPOOL_LAMBDA {
      const Floats left = delay<distance_of_parts(level)>(last[level], window);
      window = larger(level, left, window);
      if constexpr (level > 0) found(level, window);
    });
  }
  template <typename Found>
  METAPOOL_INLINE void push(Floats next, Found found) {
    push(
        next,
        [](auto, Floats left, Floats right)
            METAPOOL_LAMBDA { return Maximum<false>()(left, right); },
        found);
  }
};

// The same, and the way back. Each window is one choice between its two parts, so a gradient
// follows the choices down to an element; of equal parts the left one is chosen, and that makes it
// the first maximum. The gradient of a window of radius r is known 2 * kRadius - r elements after
// its centre.
template <int kRadius>
struct MaximaTree {
  static constexpr int kRemembered = 8;  // choices of each level but the last
  static_assert(2 * kRadius - 1 < kRemembered);
  using Choices = Choice[kRadius][kRemembered];

  MaximaStream<kRadius> maxima;
  Floats right[kRadius + 1][2];  // what each level's last right parts are sent

  static METAPOOL_INLINE int64_t slot_of(int64_t step) { return step & (kRemembered - 1); }

  METAPOOL_INLINE void reset() {
    maxima.reset();
    for (auto& level : right) {
      for (Floats& part : level) part = Floats{};
    }
  }

  // Takes element number `step`; keeps the choices of each level but the last, whose choice it
  // returns.
  template <typename Found>
  METAPOOL_INLINE Choice push(Floats next, int64_t step, Choices& choices, Found found) {
    Choice choice{};
    const auto larger = [&](auto level, Floats left, Floats right_part) METAPOOL_LAMBDA {
      choice = at_least(left, right_part);
      if constexpr (level < kRadius) choices[level][slot_of(step)] = choice;
      return Maximum<false>()(left, right_part);
    };
    maxima.push(next, larger, found);
    return choice;
  }

  // Sends gradients back: arrived(r) is what windows of radius r, of those in kSet and the largest,
  // receive directly, and `choice` what push() returned. Gives the gradient of element step - 2 *
  // kRadius.
  template <int kSet, typename Arrived>
  METAPOOL_INLINE Floats pull(Choice choice, int64_t step, const Choices& choices,
                              Arrived arrived) {
    Floats gradient = arrived(Int<kRadius>{});
    int64_t at = step;  // of the last element of the windows that gradients have come down to
    for_each_down<kRadius + 1>([&](auto level) METAPOOL_LAMBDA {
      constexpr int distance = distance_of_parts(level);
      const Floats to_left = delay<distance>(right[level], clear_where(choice, gradient));
      gradient = add_where(choice, to_left, gradient);
      at -= distance;
      if constexpr (level > 0) {
        constexpr int r = level - 1;
        if constexpr (r > 0 && contains(kSet, r)) gradient += arrived(Int<r>{});
        choice = choices[level - 1][slot_of(at)];
      }
    });
    return gradient;
  }
};

// Hands a vector of sums of products on.
METAPOOL_INLINE void hand_on(Floats& part, double* sums) {
  for (int lane = 0; lane < kVectorLanes<float>; ++lane) sums[lane] += part[lane];
  part = Floats{};
}

// What scales averages at the border where padding does not count: an average is scaled by the size
// of its own window, and so is what it sends back. So a forward scales outputs, and a backward the
// sources that it adds up.
enum class Scales : int { kNone, kOfOutputs, kOfSources };

// Takes the pixels of a row as they come, column by column, first for some lanes and then for the
// next, and keeps or adds them.
class StoredRow {
 public:
  StoredRow(float* out, int64_t pitch, bool adds) : out_(out), pitch_(pitch), adds_(adds) {}

  METAPOOL_INLINE void begin(int slot) { slot_ = slot; }
  METAPOOL_INLINE void take(int64_t column, Floats pixel) {
    float* const to = out_ + column * pitch_ + slot_;
    store(to, adds_ ? load(to) + pixel : pixel);
  }
  METAPOOL_INLINE void end(int64_t) {}

 private:
  float* out_;
  int64_t pitch_;  // elements from pixel to pixel
  bool adds_;
  int slot_ = 0;
};

// The products of a row of another map, see AverageRow: for each pooling the sixteen sums of the
// products of its sums along that row with the lines' sums down the columns. Over all rows, that is
// the product of the pooled other map with the map of the lines. What a row leaves of a chain of
// kChain products goes to the parts, all others to the products.
struct RowProducts {
  const float* other;
  float* parts[kStreamedRadius + 1];
  float* x_parts;
  double* products[kStreamedRadius + 1];
  double* x_products;
};

// What a row of averages is made of. Weights are those of the lanes; lines are those at distances
// -kStreamedRadius and on, from their first column; rows are dense.
struct AverageRow {
  const float* lines[2 * kStreamedRadius + 1];  // zeros beyond the map
  const float* weights[kStreamedRadius + 1];
  const float *x, *x_weights;  // of the identity, null where there is none
  const float* start;          // what is added to, for each lane; null for zeros
  int64_t columns;
  // Where padding does not count: BorderScales by radius, of columns and, in a backward, of rows
  // from the middle line on. They apply to so many columns at either end, and are one in between.
  const float* column_scales[kStreamedRadius + 1];
  const float* const* row_scales;
  int64_t border;
  const RowProducts* products;  // with kProducts
};

// Hands out the weighted identity + the weighted averages of radii kSet. Weights are finite: sums
// of all radii are weighted and added up before they are spread along the row, as a wider window
// covers what a narrower one does.
template <int kSet, Scales kScales, bool kProducts, typename Epilogue>
void stream_averages(const AverageRow& of, const Epilogue& epilogue_of) {
  const AverageRow row = of;  // whose members no store can change
  Epilogue epilogue = epilogue_of;
  constexpr int kRadius = largest_radius(kSet);
  const float* const other_row = kProducts ? row.products->other : nullptr;
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    const auto load_pixel = [&](const float* pixels, int64_t column) METAPOOL_LAMBDA {
      return load(pixels + column * kPackedLanes + slot);
    };
    epilogue.begin(slot);
    const Floats start = row.start == nullptr ? Floats{} : load(row.start + slot);
    Floats acc[2 * kRadius + 1];  // the outputs around the column that is added
    for (Floats& output : acc) output = start;
    Floats others[2 * kRadius + 1] = {};  // the other row's pixels there
    Floats parts[kRadius + 1] = {}, x_part{};
    const auto for_each_part = [&](auto body) METAPOOL_LAMBDA {
      const RowProducts& products = *row.products;
      if (row.x != nullptr) body(x_part, products.x_parts + slot, products.x_products + slot);
      for (int r = 1; r <= kRadius; ++r) {
        if (!contains(kSet, r)) continue;
        body(parts[r], products.parts[r] + slot, products.products[r] + slot);
      }
    };

    const auto push_other = [&](int64_t column) METAPOOL_LAMBDA {
      for (int i = 0; i < 2 * kRadius; ++i) others[i] = others[i + 1];
      others[2 * kRadius] = column < row.columns ? load_pixel(other_row, column) : Floats{};
    };
    const auto scaled_sum = [&](int r, int64_t column) METAPOOL_LAMBDA {
      Floats sum{};
      for (int d = -r; d <= r; ++d) {
        sum += load_pixel(row.lines[kStreamedRadius + d], column) * row.row_scales[r][d];
      }
      return sum * row.column_scales[r][column];
    };
    const auto weight = [&](int r) METAPOOL_LAMBDA { return load(row.weights[r] + slot); };
    const auto spread = [&](const Floats* sums) METAPOOL_LAMBDA {
      Floats wider = weight(kRadius) * sums[kRadius];
      for (int r = kRadius; r >= 1; --r) {
        if (r < kRadius && contains(kSet, r)) wider = weight(r) * sums[r] + wider;
        acc[kRadius - r] += wider;
        acc[kRadius + r] += wider;
      }
      acc[kRadius] += wider;
    };
    // Scaled weights are numbers of ordinary size; a product of tiny ones would be rounded twice.
    const auto spread_scaled = [&](const Floats* sums, int64_t column) METAPOOL_LAMBDA {
      for (int r = 1; r <= kRadius; ++r) {
        if (!contains(kSet, r)) continue;
        for (int d = -r; d <= r; ++d) {
          acc[kRadius + d] += weight(r) * row.column_scales[r][column + d] * sums[r];
        }
      }
    };
    const auto add = [&](int64_t column, auto at_border) METAPOOL_LAMBDA {
      constexpr bool kScalesSums = at_border && kScales == Scales::kOfSources;
      if constexpr (kProducts) push_other(column + kRadius);
      Floats sum = load_pixel(row.lines[kStreamedRadius], column), other = others[kRadius];
      Floats sums[kRadius + 1];
      for (int r = 1; r <= kRadius; ++r) {
        sum += load_pixel(row.lines[kStreamedRadius - r], column) +
               load_pixel(row.lines[kStreamedRadius + r], column);
        if constexpr (kProducts) other += others[kRadius - r] + others[kRadius + r];
        if (!contains(kSet, r)) continue;
        sums[r] = kScalesSums ? scaled_sum(r, column) : sum;
        if constexpr (kProducts) parts[r] += other * sums[r];
      }
      if constexpr (kRadius > 0) {
        at_border && !kScalesSums ? spread_scaled(sums, column) : spread(sums);
      }
      if (row.x != nullptr) {
        const Floats x = load_pixel(row.x, column);
        acc[kRadius] += load(row.x_weights + slot) * x;
        if constexpr (kProducts) x_part += x * others[kRadius];
      }
    };
    const auto finish = [&](int64_t column) METAPOOL_LAMBDA {
      if (column >= 0) epilogue.take(column, acc[0]);
      for (int i = 0; i < 2 * kRadius; ++i) acc[i] = acc[i + 1];
      acc[2 * kRadius] = start;
    };

    for (int64_t column = 0; kProducts && column < kRadius; ++column) push_other(column);
    int64_t next = 0;
    const auto stream_to = [&](int64_t end, auto at_border) METAPOOL_LAMBDA {
      for (; next < end; ++next) {
        add(next, at_border);
        finish(next - kRadius);
        if (kProducts && (next + 1) % kChain == 0) {
          for_each_part([](Floats& part, float*, double* sums)
                            METAPOOL_LAMBDA { hand_on(part, sums); });
        }
      }
    };
    if constexpr (kScales == Scales::kNone) {
      stream_to(row.columns, Int<false>{});
    } else {
      stream_to(row.border < row.columns ? row.border : row.columns, Int<true>{});
      stream_to(row.columns - row.border, Int<false>{});
      stream_to(row.columns, Int<true>{});
    }
    for (int64_t column = row.columns - kRadius; column < row.columns; ++column) finish(column);
    epilogue.end(row.columns);
    if constexpr (kProducts) {
      for_each_part([](Floats part, float* to, double*)
                        METAPOOL_LAMBDA { store(to, load(to) + part); });
    }
  }
}

// The same, scaled as kScales says only where that is wanted.
template <int kSet, Scales kScales, bool kProducts, typename Epilogue>
METAPOOL_INLINE void stream_averages_where(bool scaled, const AverageRow& row,
                                           const Epilogue& epilogue) {
  if constexpr (kSet != 0) {
    if (scaled) return stream_averages<kSet, kScales, kProducts>(row, epilogue);
  }
  stream_averages<kSet, Scales::kNone, kProducts>(row, epilogue);
}

// What a row of maxima is made of.
struct MaximumRow {
  const float* lines[2 * kStreamedRadius + 1];  // the map's edge again beyond it; no NaN
  const float* weights[kStreamedRadius + 1];
  int64_t columns;
};

// Along a row, calls found(r, column, maximum) for the window of each radius of kSet around each
// column, and then passed(column): around that and those before it all have been found. Columns
// beyond the row may come up too.
template <int kSet, typename Found, typename Passed>
METAPOOL_INLINE void stream_windows(const MaximumRow& row, int slot, Found found, Passed passed) {
  constexpr int kRadius = largest_radius(kSet);
  const Maximum<false> larger;
  const Floats lowest = Floats{} - __builtin_inff();
  MaximaStream<1> first;
  MaximaStream<2> second;
  MaximaStream<3> third;
  first.reset();
  second.reset();
  third.reset();
  const auto push = [&](auto& stream, auto radius, int64_t column, Floats maximum) METAPOOL_LAMBDA {
    if constexpr (contains(kSet, radius)) {
      stream.push(maximum, [&](auto r, Floats window) METAPOOL_LAMBDA {
        if constexpr (r == radius) found(r, column - r, window);
      });
    }
  };
  for (int64_t column = 0; column < row.columns; ++column) {
    const auto line = [&](int distance) METAPOOL_LAMBDA {
      return load(row.lines[kStreamedRadius + distance] + column * kPackedLanes + slot);
    };
    Floats maximum = line(0);
    const auto extend = [&](int r) METAPOOL_LAMBDA {
      maximum = larger(maximum, larger(line(-r), line(r)));
    };
    extend(1);
    push(first, Int<1>{}, column, maximum);
    if constexpr (kRadius >= 2) extend(2);
    push(second, Int<2>{}, column, maximum);
    if constexpr (kRadius >= 3) extend(3);
    push(third, Int<3>{}, column, maximum);
    passed(column - kRadius);
  }
  for (int64_t column = row.columns; column < row.columns + kRadius; ++column) {
    push(first, Int<1>{}, column, lowest);
    push(second, Int<2>{}, column, lowest);
    push(third, Int<3>{}, column, lowest);
    passed(column - kRadius);
  }
}

// Hands out the weighted maxima of radii kSet together.
template <int kSet, typename Epilogue>
void stream_maxima(const MaximumRow& of, const Epilogue& epilogue_of) {
  const MaximumRow row = of;
  Epilogue epilogue = epilogue_of;
  constexpr int kRadius = largest_radius(kSet);
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    epilogue.begin(slot);
    Floats acc[kRadius + 1] = {};  // the outputs up to the column that is added
    stream_windows<kSet>(
        row, slot,
        [&](auto r, int64_t, Floats maximum)
            METAPOOL_LAMBDA { acc[kRadius - r] += load(row.weights[r] + slot) * maximum; },
        [&](int64_t column) METAPOOL_LAMBDA {
          if (column >= 0) epilogue.take(column, acc[0]);
          for (int i = 0; i < kRadius; ++i) acc[i] = acc[i + 1];
          acc[kRadius] = Floats{};
        });
    epilogue.end(row.columns);
  }
}

// Hands out the maxima of each radius of kSet, to an epilogue for each.
template <int kSet, typename Epilogue>
void stream_each_maximum(const MaximumRow& of, const Epilogue* epilogues_of) {
  const MaximumRow row = of;
  Epilogue epilogues[kStreamedRadius + 1];
  const auto for_each = [&](auto body) METAPOOL_LAMBDA {
    for_each_up<kStreamedRadius + 1>([&](auto r) METAPOOL_LAMBDA {
      if constexpr (contains(kSet, r)) body(epilogues[r], r);
    });
  };
  for_each([&](Epilogue& epilogue, int r) METAPOOL_LAMBDA { epilogue = epilogues_of[r]; });
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    for_each([&](Epilogue& epilogue, int) METAPOOL_LAMBDA { epilogue.begin(slot); });
    stream_windows<kSet>(
        row, slot,
        [&](auto r, int64_t column, Floats maximum) METAPOOL_LAMBDA {
          if (column >= 0 && column < row.columns) epilogues[r].take(column, maximum);
        },
        [](int64_t) METAPOOL_LAMBDA {});
    for_each([&](Epilogue& epilogue, int) METAPOOL_LAMBDA { epilogue.end(row.columns); });
  }
}

}  // namespace metapool::cpu::METAPOOL_ISA
