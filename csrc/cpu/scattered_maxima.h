// The way back for maxima of square windows at stride 1 on packed rows that share nothing with
// others: the place of each window's maximum is found by vectors, along the rows first, then down
// the columns, and then gradients are added there one by one. Lanes are planes of their own, so
// neighbouring additions do not wait for each other; their order is that of the windows, row by
// row, whatever the instruction set.
#pragma once

#include "maps.h"
#include "streams.h"

namespace metapool::cpu::METAPOOL_ISA {

// Elements, one in each lane: their values, and their places in the ring of rows of gradients.
struct Located {
  Floats value;
  Code<float> place;
};

// Of equal ones the first.
METAPOOL_INLINE Located larger(Located first, Located second) {
  return {Maximum<false>()(first.value, second.value),
          choose(at_least(first.value, second.value), first.place, second.place)};
}

// So many windows are found together.
template <int kRadius>
constexpr int kTile = kRadius < 4 ? 4 : 8;

// Finds the maxima of `count` windows that begin at neighbouring elements of a line: element(i) is
// the element i after the first window's first. Each window is made of what comes before the
// elements that all of them share, and of those and what comes after.
template <int kRadius, typename Element, typename Found>
METAPOOL_INLINE void find_windows(int count, Element element, Found found) {
  constexpr int kShared = kTile<kRadius> - 1;  // the first element that all of them hold
  static_assert(kShared <= 2 * kRadius);
  Located before[kShared];
  before[kShared - 1] = element(Int<kShared - 1>{});
  for_each_down<kShared - 1>(
      [&](auto i) METAPOOL_LAMBDA { before[i] = larger(element(i), before[i + 1]); });
  Located rest = element(Int<kShared>{});
  for_each_up<2 * kRadius - kShared>(
      [&](auto i) METAPOOL_LAMBDA { rest = larger(rest, element(Int<kShared + 1 + i>{})); });
  for_each_up<kTile<kRadius> >([&](auto i) METAPOOL_LAMBDA {
    if (i >= count) return;
    if constexpr (i > 0) rest = larger(rest, element(Int<2 * kRadius + i>{}));
    if constexpr (i < kShared) found(i, larger(before[i], rest));
    if constexpr (i == kShared) found(i, rest);
  });
}

class ScatteredMaxima {
  static constexpr int kPair = 2 * kPackedLanes;  // the elements of a pixel, then their places
  static constexpr int kMostRows = 8;             // that are found together

 public:
  // Rings of longer rows leave the caches: then trees and the general kernels are faster. Of so
  // many columns 32 bits are enough for a place in a ring.
  static constexpr int64_t kMostColumns = 512;

  // The radii that are handled here. Windows of three are cheaper as trees, and so are nested ones,
  // where the gradients of all of them go down one tree along the rows. Trees alone know a window's
  // maximum when its gradient comes.
  static int radii_of(const Plan& plan) {
    int set = 0, nested = 0;
    for (const PoolItem& item : plan.max) nested += item.radius_w <= kStreamedRadius;
    const bool in_trees = plan.w > kMostColumns || plan.form == Form::kMoments || nested > 1;
    for (const PoolItem& item : plan.max) {
      if (item.radius_w > (in_trees ? kStreamedRadius : 1)) set |= 1 << item.radius_w;
    }
    return set;
  }

  // `lines` of x, or all, are worked on at a time.
  ScatteredMaxima(const Plan& plan, int64_t lines, bool wants_x, Arena& arena)
      : plan_(plan), radii_(radii_of(plan)), wants_x_(wants_x), row_size_(plan.w * kPackedLanes) {
    if (!any()) return;
    if (lines > plan.h) lines = plan.h;
    for (const PoolItem& item : plan.max) {
      if (!handles(item)) continue;
      found_[item.radius_w].allocate(arena, lines, 2 * row_size_, 0.0f);
      gradients_[item.radius_w].allocate(arena, lines, row_size_, 0.0f);
    }
    x_ = arena.take_row<float>(row_size_ + 2 * kMaxRadius * kPackedLanes, -__builtin_inff());
    lowest_ = arena.take_row<float>(2 * row_size_, -__builtin_inff());
    zeros_ = arena.take_row<float>(row_size_, 0);
    places_ = arena.take_row<int32_t>(kMostRows * row_size_, 0);
  }

  bool any() const { return radii_ != 0; }
  bool handles(const PoolItem& item) const { return contains(radii_, item.radius_w); }

  // Finds the maxima along lines [begin, end). Gradients come together for lines of other tasks
  // too, which find them themselves: these are never stored.
  void find_in_rows(int64_t begin, int64_t end, const DenseLines& x) {
    if (!any()) return;
    for (int64_t line = begin; line < end; ++line) {
      float* const row = x_ + kMaxRadius * kPackedLanes;
      __builtin_memcpy(row, x[line], row_size_ * sizeof(float));
      for (const PoolItem& item : plan_.max) {
        if (!handles(item)) continue;
        float* const to = gradients_[item.radius_w][line];
        fill_row(to, row_size_, 0.0f);
        const int place = static_cast<int>(to - gradients_[item.radius_w].rows);
        with_radius_of(item, [&](auto r) METAPOOL_LAMBDA {
          find_in_row<r>(row - r * kPackedLanes, place - r * kPackedLanes, found_[r][line]);
        });
      }
    }
  }

  // Sends the gradients of those of an item's windows on that are complete with a chunk. Where
  // `products` are wanted, adds those that belong to the task.
  void route(const PoolItem& item, const Task& task, const Chunk& chunk, const DenseLines& grads,
             const float* weights, double* products) {
    const int radius = item.radius_h;
    const int64_t first = first_valid(task.row_begin, radius), from = chunk.line - radius;
    const int64_t last = last_valid(task.row_end - 1, radius, plan_.h) + 1;
    const int64_t to = chunk.line_end == chunk.end ? last : chunk.line_end - radius;
    const int64_t begin = from > first ? from : first, end = to < last ? to : last;
    const int64_t line_end = chunk.line_end;
    with_radius_of(item, [&](auto r) METAPOOL_LAMBDA {
      for (int64_t row = begin; row < end; row += kTile<r>) {
        const int count = tile_at<r>(row, end);
        const float* grads_of[kMostRows];
        const float* counted[kMostRows];
        for (int i = 0; i < count; ++i) {
          const bool owned = row + i >= task.row_begin && row + i < task.row_end;
          grads_of[i] = grads[row + i];
          counted[i] = owned ? grads_of[i] : zeros_;
        }
        products != nullptr ? find_in_columns<r, true>(row, count, line_end, counted, products)
                            : find_in_columns<r, false>(row, count, line_end, counted, products);
        for (int i = 0; wants_x_ && i < count; ++i) {
          scatter(grads_of[i], weights, places_ + i * row_size_, gradients_[r].rows);
        }
      }
    });
  }

  // out = what has come together for row i.
  void store_row(int64_t i, float* out, int64_t pitch) const {
    bool first = true;
    for (const PoolItem& item : plan_.max) {
      if (!handles(item)) continue;
      const float* const from = gradients_[item.radius_w][i];
      for (int64_t e = 0; e < row_size_; e += kVectorLanes<float>) {
        float* const to = out + e / kPackedLanes * pitch + e % kPackedLanes;
        store(to, first ? load(from + e) : load(to) + load(from + e));
      }
      first = false;
    }
  }

 private:
  template <int kRadius>
  static METAPOOL_INLINE int tile_at(int64_t begin, int64_t end) {
    return end - begin < kTile<kRadius> ? static_cast<int>(end - begin) : kTile<kRadius>;
  }

  template <typename Body>
  static METAPOOL_INLINE void with_radius_of(const PoolItem& item, Body body) {
    switch (item.radius_w) {
      case 2:
        return body(Int<2>{});
      case 3:
        return body(Int<3>{});
      case 4:
        return body(Int<4>{});
      case 5:
        return body(Int<5>{});
      case 6:
        return body(Int<6>{});
      case 7:
        return body(Int<7>{});
    }
  }

  // The maxima along a row whose first window begins at `from`, the place of which is `place`.
  template <int kRadius>
  METAPOOL_NOINLINE void find_in_row(const float* from, int place, float* to) {
    const int64_t columns = plan_.w;
    for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
      Code<float> first;
      for (int lane = 0; lane < kVectorLanes<float>; ++lane) first[lane] = place + slot + lane;
      for (int64_t column = 0; column < columns; column += kTile<kRadius>) {
        const float* const pixels = from + column * kPackedLanes + slot;
        float* const pairs = to + column * kPair + slot;
        find_windows<kRadius>(
            tile_at<kRadius>(column, columns),
            [&](auto i) METAPOOL_LAMBDA {
              const Floats value = load(pixels + i * kPackedLanes);
              return Located{value, splat_code<float>(i * kPackedLanes)};
            },
            [&](auto i, Located window) METAPOOL_LAMBDA {
              store(pairs + i * kPair, window.value);
              store(pairs + i * kPair + kPackedLanes, (Floats)(window.place + first));
            });
        first += kTile<kRadius> * kPackedLanes;
      }
    }
  }

  // Finds the places of the maxima of windows around rows [row, row + count). Chains of products
  // end where a pixel's does not fit in: how many that are must not depend on the instruction set.
  template <int kRadius, bool kProducts>
  METAPOOL_NOINLINE void find_in_columns(int64_t row, int count, int64_t line_end,
                                         const float* const* counted, double* products) {
    const int64_t columns = plan_.w, row_size = row_size_;
    int32_t* const places = places_;
    const float* lines[kTile<kRadius> + 2 * kRadius];
    for (int i = 0; i < kTile<kRadius> + 2 * kRadius; ++i) {
      const int64_t line = row - kRadius + i;
      lines[i] = line >= 0 && line < line_end ? found_[kRadius][line] : lowest_;
    }
    for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
      Floats sum{};
      int64_t chained = 0;
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t at = column * kPackedLanes + slot, pair = column * kPair + slot;
        find_windows<kRadius>(
            count,
            [&](auto i) METAPOOL_LAMBDA {
              const Floats value = load(lines[i] + pair);
              const Floats place = load(lines[i] + pair + kPackedLanes);
              return Located{value, (Code<float>)place};
            },
            [&](auto i, Located window) METAPOOL_LAMBDA {
              store(places + i * row_size + at, window.place);
              if constexpr (kProducts) sum += window.value * load(counted[i] + at);
            });
        if constexpr (!kProducts) continue;
        chained += count;
        if (chained + count <= kChain) continue;
        hand_on(sum, products + slot);
        chained = 0;
      }
      if constexpr (kProducts) hand_on(sum, products + slot);
    }
  }

  // Adds a row of weighted gradients up at the places of its windows' maxima.
  METAPOOL_NOINLINE void scatter(const float* grads, const float* weights, const int32_t* places,
                                 float* to) {
    const int64_t row_size = row_size_;
    for (int64_t at = 0; at < row_size; at += kPackedLanes) {
      float sent[kPackedLanes];
      for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
        store(sent + slot, load(weights + slot) * load(grads + at + slot));
      }
      for (int lane = 0; lane < kPackedLanes; ++lane) to[places[at + lane]] += sent[lane];
    }
  }

  const Plan& plan_;
  const int radii_;
  const bool wants_x_;
  const int64_t row_size_;
  RowRing<float> found_[kMaxRadius + 1];  // maxima along the rows with their places
  // What belongs to each radius is added up by itself: a longer chain would drift.
  RowRing<float> gradients_[kMaxRadius + 1];
  float *x_, *lowest_, *zeros_;
  int32_t* places_;  // of the maxima of kMostRows rows
};

}  // namespace metapool::cpu::METAPOOL_ISA
