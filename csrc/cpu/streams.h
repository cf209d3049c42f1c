// One row of the output in one go, for small square windows on packed rows: pixels come one by one,
// and all that windows have in common is carried from pixel to pixel in registers. Nothing slides:
// a window is always combined from the elements of its own.
#pragma once

#include "weights.h"
#include "windows.h"

namespace metapool::cpu::METAPOOL_ISA {

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

inline bool streamed_skip(const PoolItem& skip) { return skip.end - skip.begin <= 1; }

// Calls body(set) with the set as a constant.
template <int kSet = kStreamedRadii, typename Body>
METAPOOL_INLINE void with_set(int set, Body body) {
  if (set == kSet) return body(Int<kSet>{});
  if constexpr (kSet > 0) with_set<kSet - 2>(set, body);
}

// Maxima of windows along a line: push(e[t]) gives that of radius kRadius around element t -
// kRadius. Two neighbours make a pair, two pairs a window of three, and two of those, which
// overlap, the next.
template <typename Acc, int kRadius>
struct MaximaStream {
  Vec<Acc> element, pair;
  Vec<Acc> windows[kRadius][2];  // of each smaller radius the last one and the one before

  explicit MaximaStream(Vec<Acc> padding) : element(padding), pair(padding) {
    for (auto& last_two : windows) last_two[0] = last_two[1] = padding;
  }

  METAPOOL_INLINE Vec<Acc> push(Vec<Acc> next) {
    const Maximum<false> maximum;
    const Vec<Acc> next_pair = maximum(element, next);
    Vec<Acc> window = maximum(pair, next_pair);
    element = next;
    pair = next_pair;
    for (int r = 1; r < kRadius; ++r) {
      const Vec<Acc> wider = maximum(windows[r][1], window);
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
  using V = Vec<float>;
  static constexpr int kRemembered = 8;  // choices of a level
  static_assert(2 * kRadius - 1 < kRemembered);

  V element, pair;
  V windows[kRadius][2];       // of each smaller radius the last one and the one before
  V right[kRadius + 1][2];     // of each radius what the right parts of the last two are sent
  V right_of_pair;

  static METAPOOL_INLINE int64_t slot_of(int64_t step) { return step & (kRemembered - 1); }

  METAPOOL_INLINE void reset() {
    element = pair = V{} - __builtin_inff();
    for (auto& last_two : windows) last_two[0] = last_two[1] = element;
    for (auto& last_two : right) last_two[0] = last_two[1] = V{};
    right_of_pair = V{};
  }

  // As push(), but remembers no choices: for what need not be sent back.
  template <typename Found>
  METAPOOL_INLINE void find(V next, Found found) {
    Choice unused[kRadius][kRemembered];
    push(next, 0, unused, found);
  }

  // Takes element number `step` and calls found(r, window) for each radius; the choices of a level
  // are kept in choices[level].
  template <typename Found>
  METAPOOL_INLINE Choice push(V next, int64_t step, Choice (*choices)[kRemembered], Found found) {
    const Maximum<false> maximum;
    Choice choice = at_least(element, next);
    choices[0][slot_of(step)] = choice;
    const V next_pair = maximum(element, next);
    choice = at_least(pair, next_pair);
    V window = maximum(pair, next_pair);
    element = next;
    pair = next_pair;
    found(Int<1>{}, window);
    for_each_distance(Int<kRadius - 1>{}, [&](auto r) METAPOOL_LAMBDA {
      choices[r][slot_of(step)] = choice;
      choice = at_least(windows[r][1], window);
      const V wider = maximum(windows[r][1], window);
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
  METAPOOL_INLINE V pull(Choice choice, int64_t step, const Choice (*choices)[kRemembered],
                         Arrived arrived) {
    V gradient = arrived(Int<kRadius>{});
    for_each_distance(Int<kRadius - 1>{}, [&](auto d) METAPOOL_LAMBDA {
      constexpr int r = kRadius + 1 - d;
      const V sent = add_where(choice, right[r][1], gradient);
      right[r][1] = right[r][0];
      right[r][0] = clear_where(choice, gradient);
      gradient = sent;
      if constexpr (contains(kSet, r - 1)) gradient += arrived(Int<r - 1>{});
      choice = choices[r - 1][slot_of(step - 2 * (kRadius - (r - 1)))];
    });
    const V sent = add_where(choice, right[1][0], gradient);
    right[1][0] = clear_where(choice, gradient);
    choice = choices[0][slot_of(step - (2 * kRadius - 1))];
    const V result = add_where(choice, right_of_pair, sent);
    right_of_pair = clear_where(choice, sent);
    return result;
  }
};

// What a row of the output is made of. Weights are those of the lanes; lines are at distances
// -kStreamedRadius and on from the row, and point to the first column.
template <typename Acc>
struct RowStream {
  const Acc *x, *x_weights;                   // null where there is no identity
  const Acc* sums[2 * kStreamedRadius + 1];   // zeros beyond the map
  const Acc* maxima[2 * kStreamedRadius + 1];  // the map's edge, repeated; no NaN
  const Acc* sum_weights[kStreamedRadius + 1];
  const Acc* maximum_weights[kStreamedRadius + 1];
  // With kProducts: another row, and the sixteen sums that its products with x, and those of its
  // own sums along the row with the sums down the columns, are added to.
  const Acc* other;
  double* x_products;
  double* products[kStreamedRadius + 1];
  Acc* out;
  int64_t columns, pitch;  // of `out`: elements from pixel to pixel
};

// Adds a vector to numbers in double.
template <typename Acc>
METAPOOL_INLINE void add_to_doubles(double* to, Vec<Acc> vector) {
  Acc values[kVectorLanes<Acc>];
  store(values, vector);
  for (int i = 0; i < kVectorLanes<Acc>; ++i) to[i] += static_cast<double>(values[i]);
}

// out = the weighted identity + the weighted averages and maxima of these radii; with kAdd, all of
// that but the identity and the averages is added to what is there. Weights are finite: sums of all radii are weighted and added
// up before they are spread along the row, as a wider window covers what a narrower one does.
template <int kLanes, int kSums, int kMaxima, bool kAdd, bool kProducts = false, typename Acc>
void stream_row(const RowStream<Acc>& row) {
  constexpr int kRadius = largest_radius(kSums | kMaxima);
  constexpr int kSumRadius = largest_radius(kSums), kMaximumRadius = largest_radius(kMaxima);
  const Vec<Acc> lowest = Vec<Acc>{} - static_cast<Acc>(__builtin_inf());
  for (int slot = 0; slot < kLanes; slot += kVectorLanes<Acc>) {
    const auto element = [&](const Acc* const* lines, int distance, int64_t column) METAPOOL_LAMBDA {
      return load(lines[kStreamedRadius + distance] + column * kLanes + slot);
    };
    Vec<Acc> acc[2 * kRadius + 1] = {};  // the outputs around the column that is added
    MaximaStream<Acc, 1> first(lowest);
    MaximaStream<Acc, 2> second(lowest);
    MaximaStream<Acc, 3> third(lowest);

    // The pixels of `other` around the column that is added.
    Vec<Acc> others[2 * kSumRadius + 1] = {};
    Vec<Acc> x_product{}, column_products[kSumRadius + 1] = {};
    const auto push_other = [&](int64_t column) METAPOOL_LAMBDA {
      for (int i = 0; i < 2 * kSumRadius; ++i) others[i] = others[i + 1];
      others[2 * kSumRadius] =
          column < row.columns ? load(row.other + column * kLanes + slot) : Vec<Acc>{};
    };
    for (int64_t column = 0; kProducts && column < kSumRadius; ++column) push_other(column);

    const auto add_sums = [&](int64_t column) METAPOOL_LAMBDA {
      if constexpr (kProducts) push_other(column + kSumRadius);
      Vec<Acc> products[kSumRadius + 1];
      Vec<Acc> sum = element(row.sums, 0, column);
      if (row.x != nullptr) {
        const Vec<Acc> x = load(row.x + column * kLanes + slot);
        acc[kRadius] += load(row.x_weights + slot) * x;
        if constexpr (kProducts) x_product += x * others[kSumRadius];
      }
      Vec<Acc> other_sum = others[kSumRadius];
      for (int r = 1; r <= kSumRadius; ++r) {
        sum += element(row.sums, -r, column) + element(row.sums, r, column);
        if (contains(kSums, r)) products[r] = load(row.sum_weights[r] + slot) * sum;
        if constexpr (kProducts) {
          other_sum += others[kSumRadius - r] + others[kSumRadius + r];
          if (contains(kSums, r)) column_products[r] += other_sum * sum;
        }
      }
      for (int r = kSumRadius; r >= 1; --r) {
        if (r < kSumRadius) {
          products[r] = contains(kSums, r) ? products[r] + products[r + 1] : products[r + 1];
        }
        acc[kRadius - r] += products[r];
        acc[kRadius + r] += products[r];
      }
      if constexpr (kSumRadius > 0) acc[kRadius] += products[1];
    };
    const auto add_maximum = [&](auto& stream, auto radius, Vec<Acc> maximum) METAPOOL_LAMBDA {
      if constexpr (contains(kMaxima, radius)) {
        acc[kRadius - radius] += load(row.maximum_weights[radius] + slot) * stream.push(maximum);
      }
    };
    const auto add_maxima = [&](int64_t column) METAPOOL_LAMBDA {
      const Maximum<false> larger;
      Vec<Acc> maximum = element(row.maxima, 0, column);
      const auto extend = [&](int r) METAPOOL_LAMBDA {
        maximum = larger(maximum, larger(element(row.maxima, -r, column),
                                         element(row.maxima, r, column)));
      };
      if constexpr (kMaximumRadius >= 1) extend(1);
      add_maximum(first, Int<1>{}, maximum);
      if constexpr (kMaximumRadius >= 2) extend(2);
      add_maximum(second, Int<2>{}, maximum);
      if constexpr (kMaximumRadius >= 3) extend(3);
      add_maximum(third, Int<3>{}, maximum);
    };
    const auto finish = [&](int64_t column) METAPOOL_LAMBDA {
      Acc* const to = row.out + column * row.pitch + slot;
      store(to, kAdd ? load(to) + acc[0] : acc[0]);
    };
    const auto shift = [&] METAPOOL_LAMBDA {
      for (int i = 0; i < 2 * kRadius; ++i) acc[i] = acc[i + 1];
      acc[2 * kRadius] = Vec<Acc>{};
    };
    const auto add = [&](int64_t column) METAPOOL_LAMBDA {
      if constexpr (!kAdd) add_sums(column);
      if constexpr (kMaxima != 0) add_maxima(column);
    };

    int64_t column = 0;
    for (; column < kRadius && column < row.columns; ++column) {
      add(column);
      shift();
    }
    for (; column < row.columns; ++column) {
      add(column);
      finish(column - kRadius);
      shift();
    }
    for (column -= kRadius; column < row.columns; ++column) {
      add_maximum(first, Int<1>{}, lowest);
      add_maximum(second, Int<2>{}, lowest);
      add_maximum(third, Int<3>{}, lowest);
      if (column >= 0) finish(column);
      shift();
    }
    if constexpr (kProducts) {
      if (row.x != nullptr) add_to_doubles<Acc>(row.x_products + slot, x_product);
      for (int r = 1; r <= kSumRadius; ++r) {
        if (contains(kSums, r)) add_to_doubles<Acc>(row.products[r] + slot, column_products[r]);
      }
    }
  }
}

}  // namespace metapool::cpu::METAPOOL_ISA
