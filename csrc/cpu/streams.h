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

// Maxima of windows along a line: push(e[t]) gives that of radius kRadius around element t -
// kRadius. Two neighbours make a pair, two pairs a window of three, and two of those, which
// overlap, the next.
template <int kRadius>
struct MaximaStream {
  Floats element, pair;
  Floats windows[kRadius][2];  // of each smaller radius the last one and the one before

  METAPOOL_INLINE explicit MaximaStream(Floats padding) : element(padding), pair(padding) {
    for (auto& last_two : windows) last_two[0] = last_two[1] = padding;
  }

  METAPOOL_INLINE Floats push(Floats next) {
    const Maximum<false> maximum;
    const Floats next_pair = maximum(element, next);
    Floats window = maximum(pair, next_pair);
    element = next;
    pair = next_pair;
    for (int r = 1; r < kRadius; ++r) {
      const Floats wider = maximum(windows[r][1], window);
      windows[r][1] = windows[r][0];
      windows[r][0] = window;
      window = wider;
    }
    return window;
  }
};

// The maxima of windows of all radii up to kRadius along a line, and the way back. Each window is
// one choice between its two parts, so a gradient follows the choices down to an element; of equal
// parts the left one is chosen, and that makes it the first maximum. Nodes on the way are
// distances behind the element that is pushed: windows of radius r are r behind when found and
// 2 * kRadius - r when their gradient is known.
template <int kRadius>
struct MaximaTree {
  static constexpr int kRemembered = 8;  // choices of a level
  static_assert(2 * kRadius - 1 < kRemembered);

  Floats element, pair;
  Floats windows[kRadius][2];    // of each smaller radius the last one and the one before
  Floats right[kRadius + 1][2];  // of each radius what the right parts of the last two are sent
  Floats right_of_pair;

  static METAPOOL_INLINE int64_t slot_of(int64_t step) { return step & (kRemembered - 1); }

  METAPOOL_INLINE void reset() {
    element = pair = Floats{} - __builtin_inff();
    for (auto& last_two : windows) last_two[0] = last_two[1] = element;
    for (auto& last_two : right) last_two[0] = last_two[1] = Floats{};
    right_of_pair = Floats{};
  }

  // As push(), but remembers no choices: for what need not be sent back.
  template <typename Found>
  METAPOOL_INLINE void find(Floats next, Found found) {
    Choice unused[kRadius][kRemembered];
    push(next, 0, unused, found);
  }

  // Takes element number `step` and calls found(r, window) for each radius; the choices of a level
  // are kept in choices[level].
  template <typename Found>
  METAPOOL_INLINE Choice push(Floats next, int64_t step, Choice (*choices)[kRemembered],
                              Found found) {
    const Maximum<false> maximum;
    Choice choice = at_least(element, next);
    choices[0][slot_of(step)] = choice;
    const Floats next_pair = maximum(element, next);
    choice = at_least(pair, next_pair);
    Floats window = maximum(pair, next_pair);
    element = next;
    pair = next_pair;
    found(Int<1>{}, window);
    for_each_distance(Int<kRadius - 1>{}, [&](auto r) METAPOOL_LAMBDA {
      choices[r][slot_of(step)] = choice;
      choice = at_least(windows[r][1], window);
      const Floats wider = maximum(windows[r][1], window);
      windows[r][1] = windows[r][0];
      windows[r][0] = window;
      window = wider;
      found(Int<r + 1>{}, window);
    });
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
      const Floats sent = add_where(choice, right[r][1], gradient);
      right[r][1] = right[r][0];
      right[r][0] = clear_where(choice, gradient);
      gradient = sent;
      if constexpr (contains(kSet, r - 1)) gradient += arrived(Int<r - 1>{});
      choice = choices[r - 1][slot_of(step - 2 * (kRadius - (r - 1)))];
    });
    const Floats sent = add_where(choice, right[1][0], gradient);
    right[1][0] = clear_where(choice, gradient);
    choice = choices[0][slot_of(step - (2 * kRadius - 1))];
    const Floats result = add_where(choice, right_of_pair, sent);
    right_of_pair = clear_where(choice, sent);
    return result;
  }
};

// Where a row of averages comes from and goes to. Weights are those of the lanes; lines are those
// at distances -kStreamedRadius and on, from their first column; rows are dense.
struct AverageRow {
  const float* lines[2 * kStreamedRadius + 1];  // zeros beyond the map
  const float* weights[kStreamedRadius + 1];
  const float *x, *x_weights;  // of the identity, null where there is none
  float* out;
  int64_t columns, pitch;  // of `out`: elements from pixel to pixel
  // With kProducts: a row of another map, and the sixteen sums for each pooling that the products
  // of its sums along the row with the lines' sums down the columns are added to. Over all rows,
  // that is the product of the pooled other map with the map of the lines.
  const float* other;
  float* products[kStreamedRadius + 1];
  float* x_products;
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
    Floats products[kRadius + 1] = {}, x_product{};
    const auto hand_products_on = [&] METAPOOL_LAMBDA {
      const auto hand_on = [&](float* to, Floats& product) METAPOOL_LAMBDA {
        store(to + slot, load(to + slot) + product);
        product = Floats{};
      };
      if (row.x != nullptr) hand_on(row.x_products, x_product);
      for (int r = 1; r <= kRadius; ++r) {
        if (contains(kSet, r)) hand_on(row.products[r], products[r]);
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
        if constexpr (kProducts) products[r] += other * sum;
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
        if constexpr (kProducts) x_product += x * others[kRadius];
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
      if (kProducts && (column + 1) % kPartialPixels == 0) hand_products_on();
    }
    for (int64_t column = row.columns - kRadius; column < row.columns; ++column) finish(column);
    if constexpr (kProducts) hand_products_on();
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
    MaximaStream<1> first(lowest);
    MaximaStream<2> second(lowest);
    MaximaStream<3> third(lowest);
    Floats acc[kRadius + 1] = {};  // the outputs up to the column that is added

    const auto push = [&](auto& stream, auto radius, Floats maximum) METAPOOL_LAMBDA {
      if constexpr (contains(kSet, radius)) {
        acc[kRadius - radius] += load(row.weights[radius] + slot) * stream.push(maximum);
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
