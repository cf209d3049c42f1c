// Maxima of windows, combined along rows first and then down columns: for forward their values, for
// backward their places too.
#pragma once

#include "lanes.cuh"

namespace metapool::cuda {

// Maxima along a row around a column, of each width.
template <int kLength>
METAPOOL_INLINE void maxima_around(const float (&row)[kLength], int center,
                                   float (&along)[kMaxSlots]) {
  float top = row[center];
#pragma unroll
  for (int d = 1; d <= kReach; ++d) {
    top = largest(largest(row[center - d], top), row[center + d]);
    along[d - 1] = top;
  }
}

// Maxima down a column: of each width what is kept of the rows before, oldest first.
struct MaxRings {
  float rows3[2], rows5[4], rows7[1];
  float pairs5[2], pairs7[2];  // of two rows
  float fours7[3];             // of four
};

METAPOOL_INLINE void clear(MaxRings& rings) {
#pragma unroll
  for (float& item : rings.rows3) item = -kInfinity<float>;
#pragma unroll
  for (float& item : rings.rows5) item = -kInfinity<float>;
  rings.rows7[0] = -kInfinity<float>;
#pragma unroll
  for (int i = 0; i < 2; ++i) rings.pairs5[i] = rings.pairs7[i] = -kInfinity<float>;
#pragma unroll
  for (float& item : rings.fours7) item = -kInfinity<float>;
}

// Takes the maxima along a new row; tops are those of the windows that end with it.
METAPOOL_INLINE void add_maxima(MaxRings& rings, const float (&row)[kMaxSlots],
                                float (&tops)[kMaxSlots]) {
  tops[0] = largest(largest(rings.rows3[0], rings.rows3[1]), row[0]);
  push(rings.rows3, row[0]);

  const float pair5 = largest(rings.rows5[3], row[1]);
  tops[1] = largest(rings.rows5[0], largest(rings.pairs5[0], pair5));
  push(rings.pairs5, pair5);
  push(rings.rows5, row[1]);

  const float pair7 = largest(rings.rows7[0], row[2]);
  const float four7 = largest(rings.pairs7[0], pair7);
  tops[2] = largest(rings.fours7[0], four7);
  push(rings.fours7, four7);
  push(rings.pairs7, pair7);
  push(rings.rows7, row[2]);
}

// A maximum and its place among the sums of its lane, counted in elements of shared memory.
struct Top {
  float found;
  int at;

  static METAPOOL_INLINE constexpr Top beyond() { return {-kInfinity<float>, 0}; }

  METAPOOL_INLINE float value() const { return found; }
  METAPOOL_INLINE int place() const { return at; }
};

template <bool kCareful>
METAPOOL_INLINE bool wins(float left, float right) {
  return kCareful ? right_wins(left, right) : right > left;
}

// Widens a window by one element on either side. Of equal elements the first is the maximum, unless
// it is beyond the map, which only matters where the others are -Inf.
template <bool kCareful>
METAPOOL_INLINE void widen_window(Top& top, const Top& before, bool before_is_on_map,
                                  const Top& after) {
  bool keeps = wins<kCareful>(before.found, top.found);
  if (kCareful) keeps |= !before_is_on_map;
  if (!keeps) top.at = before.at;
  top.found = largest(before.found, top.found);
  if (wins<kCareful>(top.found, after.found)) top.at = after.at;
  top.found = largest(top.found, after.found);
}

// The maximum of the window that a ring of rows makes; `first` is the oldest of them.
template <bool kCareful, int kRows>
METAPOOL_INLINE Top top_of(const Top (&rows)[kRows], int first) {
  Top top = rows[kRows / 2];
#pragma unroll
  for (int d = 1; d <= kRows / 2; ++d) {
    widen_window<kCareful>(top, rows[kRows / 2 - d], first + kRows / 2 - d >= 0,
                           rows[kRows / 2 + d]);
  }
  return top;
}

}  // namespace metapool::cuda
