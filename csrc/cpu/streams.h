// Small square windows on packed rows whose elements come one by one: all that windows have in
// common is carried from element to element in registers. Nothing slides: a window is always
// combined from the elements of its own.
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

// Sums of the windows of one radius, likewise: of pairs, and of fours that are made of those.
template <int kRadius>
struct SumStream {
  static_assert(kRadius <= kStreamedRadius);
  Floats last, pairs[2], fours[3];  // the latest first

  METAPOOL_INLINE void reset() {
    last = Floats{};
    for (Floats& pair : pairs) pair = Floats{};
    for (Floats& four : fours) four = Floats{};
  }

  // Takes an element, and gives the sum of the window that ends with it.
  METAPOOL_INLINE Floats push(Floats next) {
    const Floats window = kRadius == 1   ? pairs[0] + next
                          : kRadius == 2 ? fours[0] + next
                                         : fours[2] + (pairs[0] + next);
    const Floats pair = last + next;
    fours[2] = fours[1];
    fours[1] = fours[0];
    fours[0] = pair + pairs[1];
    pairs[1] = pairs[0];
    pairs[0] = pair;
    last = next;
    return window;
  }
};

// Maxima, and the way back. Each window is one choice between its two parts, so a gradient
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

}  // namespace metapool::cpu::METAPOOL_ISA
