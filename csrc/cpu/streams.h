// One row of the output in one go, for small square windows on packed rows: pixels come one by one,
// and all that windows have in common is carried from pixel to pixel in registers. Nothing slides:
// a window is always combined from the elements of its own.
#pragma once

#include "weights.h"
#include "windows.h"

namespace metapool::cpu::METAPOOL_ISA {

using Floats = Vec<float>;

// Windows up to this radius are streamed; sets of radii are constants, a bit for each.
constexpr int kStreamedRadius = 3;
constexpr int kStreamedRadii = (2 << kStreamedRadius) - 2;

constexpr bool contains(int set, int radius) { return (set >> radius & 1) != 0; }

constexpr int largest_radius(int set) {
  int radius = 0;
  for (int r = 1; r <= kStreamedRadius; ++r) radius = contains(set, r) ? r : radius;
  return radius;
}

// The radii of `items` where they can be streamed, else -1.
inline int streamed_set(Span<PoolItem> items) {
  int set = 0;
  for (const PoolItem& item : items) {
    const bool square = item.radius_h == item.radius_w;
    const bool single = item.end == item.begin + 1;
    if (!square || !single || item.radius_w < 1 || item.radius_w > kStreamedRadius) return -1;
    set |= 1 << item.radius_w;
  }
  return set;
}

// Whether a problem can be streamed, its numbers allowing.
inline bool suits_streams(const Plan& plan) {
  return plan.stride_h == 1 && plan.stride_w == 1 && plan.skip.end - plan.skip.begin <= 1 &&
         streamed_set(plan.avg) >= 0 && streamed_set(plan.max) >= 0 &&
         (plan.count_include_pad || plan.avg.count == 0);
}

// Calls body(set) with the set as a constant.
template <int kSet = kStreamedRadii, typename Body>
METAPOOL_INLINE void with_set(int set, Body body) {
  if (set == kSet) return body(Int<kSet>{});
  if constexpr (kSet > 0) with_set<kSet - 2>(set, body);
}

// Maxima of nested windows along a line whose elements come one by one. Two neighbours make a pair,
// two pairs a window of three, and two of those, which overlap, the next; a window of radius r is
// found r elements after its centre.
template <int kRadius>
struct MaximaStream {
  Floats element, pair;
  Floats windows[kRadius][2];  // at r - 1, of each smaller radius the last one and the one before

  METAPOOL_INLINE void reset() {
    element = pair = Floats{} - __builtin_inff();
    for (int r = 1; r < kRadius; ++r) windows[r - 1][0] = windows[r - 1][1] = element;
  }

  // Takes an element, combines parts by larger(r, left, right), where a pair has r = 0, and calls
  // found(r, window) for each radius.
  template <typename Larger, typename Found>
  METAPOOL_INLINE void push(Floats next, Larger larger, Found found) {
    const Floats next_pair = larger(Int<0>{}, element, next);
    Floats window = larger(Int<1>{}, pair, next_pair);
    element = next;
    pair = next_pair;
    found(Int<1>{}, window);
    for_each_distance(Int<kRadius - 1>{}, [&](auto r) METAPOOL_LAMBDA {
      Floats(&last_two)[2] = windows[r - 1];
      const Floats wider = larger(Int<r + 1>{}, last_two[1], window);
      last_two[1] = last_two[0];
      last_two[0] = window;
      window = wider;
      found(Int<r + 1>{}, window);
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
  static constexpr int kRemembered = 8;  // choices of a level: pairs, then each radius but the last
  static_assert(2 * kRadius - 1 < kRemembered);

  MaximaStream<kRadius> maxima;
  Floats right_of_pair, right_of_three;  // what the right part of the last one is sent
  Floats right[kRadius][2];  // at r - 2, the same for the last two of each radius from two on

  static METAPOOL_INLINE int64_t slot_of(int64_t step) { return step & (kRemembered - 1); }

  METAPOOL_INLINE void reset() {
    maxima.reset();
    right_of_pair = right_of_three = Floats{};
    for (int r = 2; r <= kRadius; ++r) right[r - 2][0] = right[r - 2][1] = Floats{};
  }

  // Takes element number `step`; keeps the choices of each level but the last, whose choice it
  // returns.
  template <typename Found>
  METAPOOL_INLINE Choice push(Floats next, int64_t step, Choice (*choices)[kRemembered],
                              Found found) {
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
  METAPOOL_INLINE Floats pull(Choice choice, int64_t step, const Choice (*choices)[kRemembered],
                              Arrived arrived) {
    Floats gradient = arrived(Int<kRadius>{});
    for_each_distance(Int<kRadius - 1>{}, [&](auto d) METAPOOL_LAMBDA {
      constexpr int r = kRadius + 1 - d;
      Floats(&last_two)[2] = right[r - 2];
      const Floats sent = add_where(choice, last_two[1], gradient);
      last_two[1] = last_two[0];
      last_two[0] = clear_where(choice, gradient);
      gradient = sent;
      if constexpr (contains(kSet, r - 1)) gradient += arrived(Int<r - 1>{});
      choice = choices[r - 1][slot_of(step - 2 * (kRadius - (r - 1)))];
    });
    const Floats sent = add_where(choice, right_of_three, gradient);
    right_of_three = clear_where(choice, gradient);
    choice = choices[0][slot_of(step - (2 * kRadius - 1))];
    const Floats result = add_where(choice, right_of_pair, sent);
    right_of_pair = clear_where(choice, sent);
    return result;
  }
};

// Hands a vector of sums of products on.
METAPOOL_INLINE void hand_on(Floats& part, double* sums) {
  for (int lane = 0; lane < kVectorLanes<float>; ++lane) sums[lane] += part[lane];
  part = Floats{};
}

// Where a row of averages comes from and goes to. Weights are those of the lanes; lines are those
// at distances -kStreamedRadius and on, from their first column; rows are dense.
struct AverageRow {
  const float* lines[2 * kStreamedRadius + 1];  // zeros beyond the map
  const float* weights[kStreamedRadius + 1];
  const float *x, *x_weights;  // of the identity, null where there is none
  float* out;
  int64_t columns, pitch;  // of `out`: elements from pixel to pixel
  // With kProducts: a row of another map, and for each pooling the sixteen sums of the products of
  // its sums along that row with the lines' sums down the columns. Over all rows, that is the
  // product of the pooled other map with the map of the lines. What a row leaves of a chain of
  // kChain products goes to the parts, all others to the products.
  const float* other;
  float* parts[kStreamedRadius + 1];
  float* x_parts;
  double* products[kStreamedRadius + 1];
  double* x_products;
};

// out = the weighted identity + the weighted averages of radii kSet. Weights are finite: sums of
// all radii are weighted and added up before they are spread along the row, as a wider window
// covers what a narrower one does.
template <int kSet, bool kProducts>
void stream_averages(const AverageRow row) {
  constexpr int kRadius = largest_radius(kSet);
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    const auto load_pixel = [&](const float* pixels, int64_t column) METAPOOL_LAMBDA {
      return load(pixels + column * kPackedLanes + slot);
    };
    Floats acc[2 * kRadius + 1] = {};     // the outputs around the column that is added
    Floats others[2 * kRadius + 1] = {};  // the other row's pixels there
    Floats parts[kRadius + 1] = {}, x_part{};
    const auto for_each_part = [&](auto body) METAPOOL_LAMBDA {
      if (row.x != nullptr) body(x_part, row.x_parts + slot, row.x_products + slot);
      for (int r = 1; r <= kRadius; ++r) {
        if (contains(kSet, r)) body(parts[r], row.parts[r] + slot, row.products[r] + slot);
      }
    };

    const auto push_other = [&](int64_t column) METAPOOL_LAMBDA {
      for (int i = 0; i < 2 * kRadius; ++i) others[i] = others[i + 1];
      others[2 * kRadius] = column < row.columns ? load_pixel(row.other, column) : Floats{};
    };
    const auto add = [&](int64_t column) METAPOOL_LAMBDA {
      if constexpr (kProducts) push_other(column + kRadius);
      Floats sum = load_pixel(row.lines[kStreamedRadius], column), other = others[kRadius];
      Floats weighted[kRadius + 1];
      for (int r = 1; r <= kRadius; ++r) {
        sum += load_pixel(row.lines[kStreamedRadius - r], column) +
               load_pixel(row.lines[kStreamedRadius + r], column);
        if constexpr (kProducts) other += others[kRadius - r] + others[kRadius + r];
        if (!contains(kSet, r)) continue;
        weighted[r] = load(row.weights[r] + slot) * sum;
        if constexpr (kProducts) parts[r] += other * sum;
      }
      for (int r = kRadius; r >= 1; --r) {
        if (r < kRadius)
          weighted[r] = contains(kSet, r) ? weighted[r] + weighted[r + 1] : weighted[r + 1];
        acc[kRadius - r] += weighted[r];
        acc[kRadius + r] += weighted[r];
      }
      if constexpr (kRadius > 0) acc[kRadius] += weighted[1];
      if (row.x != nullptr) {
        const Floats x = load_pixel(row.x, column);
        acc[kRadius] += load(row.x_weights + slot) * x;
        if constexpr (kProducts) x_part += x * others[kRadius];
      }
    };
    const auto finish = [&](int64_t column) METAPOOL_LAMBDA {
      if (column >= 0) store(row.out + column * row.pitch + slot, acc[0]);
      for (int i = 0; i < 2 * kRadius; ++i) acc[i] = acc[i + 1];
      acc[2 * kRadius] = Floats{};
    };

    for (int64_t column = 0; kProducts && column < kRadius; ++column) push_other(column);
    for (int64_t column = 0; column < row.columns; ++column) {
      add(column);
      finish(column - kRadius);
      if (kProducts && (column + 1) % kChain == 0) {
        for_each_part([](Floats& part, float*, double* sums)
                          METAPOOL_LAMBDA { hand_on(part, sums); });
      }
    }
    for (int64_t column = row.columns - kRadius; column < row.columns; ++column) finish(column);
    if constexpr (kProducts) {
      for_each_part([](Floats part, float* to, double*)
                        METAPOOL_LAMBDA { store(to, load(to) + part); });
    }
  }
}

// The same for maxima.
struct MaximumRow {
  const float* lines[2 * kStreamedRadius + 1];  // the map's edge again beyond it; no NaN
  const float* weights[kStreamedRadius + 1];
  float* out;
  int64_t columns, pitch;
};

// out += the weighted maxima of radii kSet.
template <int kSet>
void stream_maxima(const MaximumRow row) {
  constexpr int kRadius = largest_radius(kSet);
  const Maximum<false> larger;
  const Floats lowest = Floats{} - __builtin_inff();
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    MaximaStream<1> first;
    MaximaStream<2> second;
    MaximaStream<3> third;
    first.reset();
    second.reset();
    third.reset();
    Floats acc[kRadius + 1] = {};  // the outputs up to the column that is added

    const auto push = [&](auto& stream, auto radius, Floats maximum) METAPOOL_LAMBDA {
      if constexpr (contains(kSet, radius)) {
        stream.push(maximum, [&](auto r, Floats window) METAPOOL_LAMBDA {
          if constexpr (r == radius) acc[kRadius - r] += load(row.weights[r] + slot) * window;
        });
      }
    };
    const auto add = [&](int64_t column) METAPOOL_LAMBDA {
      const auto line = [&](int distance) METAPOOL_LAMBDA {
        return load(row.lines[kStreamedRadius + distance] + column * kPackedLanes + slot);
      };
      Floats maximum = line(0);
      const auto extend = [&](int r) METAPOOL_LAMBDA {
        maximum = larger(maximum, larger(line(-r), line(r)));
      };
      extend(1);
      push(first, Int<1>{}, maximum);
      if constexpr (kRadius >= 2) extend(2);
      push(second, Int<2>{}, maximum);
      if constexpr (kRadius >= 3) extend(3);
      push(third, Int<3>{}, maximum);
    };
    const auto finish = [&](int64_t column) METAPOOL_LAMBDA {
      if (column >= 0) {
        float* const to = row.out + column * row.pitch + slot;
        store(to, load(to) + acc[0]);
      }
      for (int i = 0; i < kRadius; ++i) acc[i] = acc[i + 1];
      acc[kRadius] = Floats{};
    };

    for (int64_t column = 0; column < row.columns; ++column) {
      add(column);
      finish(column - kRadius);
    }
    for (int64_t column = row.columns - kRadius; column < row.columns; ++column) {
      push(first, Int<1>{}, lowest);
      push(second, Int<2>{}, lowest);
      push(third, Int<3>{}, lowest);
      finish(column);
    }
  }
}

}  // namespace metapool::cpu::METAPOOL_ISA
