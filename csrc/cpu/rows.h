// Rows as the kernels see them: widened to the accumulation type, and (but for DenseLines in
// maps.h) with padding on both sides so that every tap of a window is a contiguous run.
//
// A row holds `kLanes` planes side by side (pixel-major, lane-minor), so that a shift by one column
// is a shift by whole vectors and narrow maps fill the lanes as well as wide ones. With one lane
// the vector lies along the row instead.
#pragma once

#include <cstdint>

#include "elements.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace metapool::cpu::METAPOOL_ISA {

constexpr int64_t kCacheLine = 64;

// Four vectors that are worked on together: four pixels of a packed row, or a run of a plain one.
template <typename Acc, int kLanes>
struct Block {
  static constexpr int kVectors = 4;
  // Elements from one vector to the next.
  static constexpr int kStep = kLanes == 1 ? kVectorLanes<Acc> : kLanes;
  static constexpr int kPixels = kLanes == 1 ? kVectors * kVectorLanes<Acc> : kVectors;

  Vec<Acc> vector[kVectors];

  static METAPOOL_INLINE Block load(const Acc* from) {
    Block block;
    for (int b = 0; b < kVectors; ++b) block.vector[b] = METAPOOL_ISA::load(from + b * kStep);
    return block;
  }
  static METAPOOL_INLINE Block zero() { return {}; }
  METAPOOL_INLINE void store(Acc* to) const {
    for (int b = 0; b < kVectors; ++b) METAPOOL_ISA::store(to + b * kStep, vector[b]);
  }
};

// Where the columns of a row lie in its buffer.
template <typename Acc, int kLanes>
struct RowShape {
  static constexpr int kPixels = Block<Acc, kLanes>::kPixels;

  int64_t w;         // columns
  int64_t padded_w;  // columns that blocks cover: those from w on are computed and never used
  int64_t left;      // pixels before the first column
  int64_t size;      // elements in all

  explicit RowShape(const Plan& plan)
      : w(plan.w),
        padded_w((plan.w + kPixels - 1) / kPixels * kPixels),
        left((plan.radius_w * kLanes + kPackedLanes - 1) / kPackedLanes * kPackedLanes / kLanes),
        size((left + padded_w + plan.radius_w) * kLanes) {}

  METAPOOL_INLINE int64_t cell(int64_t column) const { return (left + column) * kLanes; }

  // Calls body(offset) for each block of the row's columns.
  template <typename Body>
  METAPOOL_INLINE void for_each_block(Body body) const {
    constexpr int kSlots = kLanes == 1 ? 1 : kLanes / kVectorLanes<Acc>;
    for (int64_t column = 0; column < w; column += kPixels) {
      for (int slot = 0; slot < kSlots; ++slot) body(cell(column) + slot * kVectorLanes<Acc>);
    }
  }

  // The same for each group of neighbouring vectors.
  template <int kVectors, typename Body>
  METAPOOL_INLINE void for_each_group(Body body) const {
    constexpr int kGroup = kVectors * kVectorLanes<Acc>;
    static_assert(kGroup <= kPixels * kLanes);
    for (int64_t e = 0; e < w * kLanes; e += kGroup) body(cell(0) + e);
  }
};

template <int kLanes, typename Acc, typename T>
METAPOOL_INLINE void fill_pixels(T* row, const RowShape<Acc, kLanes>& shape, int64_t begin,
                                 int64_t end, T value) {
  for (int64_t e = shape.cell(begin); e < shape.cell(end); ++e) row[e] = value;
}

// Fills a whole row: its padding stays as it is until fill_overrun() is due.
template <typename T>
METAPOOL_INLINE void fill_row(T* row, int64_t size, T value) {
  for (int64_t e = 0; e < size; ++e) row[e] = value;
}

// Blocks write beyond the last column: makes padding of it again.
template <int kLanes, typename Acc, typename T>
METAPOOL_INLINE void fill_overrun(T* row, const RowShape<Acc, kLanes>& shape, T value) {
  fill_pixels(row, shape, shape.w, shape.padded_w, value);
}

// Whether any of `size` elements is NaN.
template <typename Acc>
bool has_nan(const Acc* from, int64_t size) {
  Mask<Acc> found{};
  int64_t e = 0;
  for (; e + kVectorLanes<Acc> <= size; e += kVectorLanes<Acc>) {
    const Vec<Acc> vector = load(from + e);
    found |= vector != vector;
  }
  bool rest = false;
  for (; e < size; ++e) rest |= from[e] != from[e];
  return rest || any<Acc>(found);
}

// Whether any column of a row is NaN.
template <int kLanes, typename Acc>
bool has_nan(const RowShape<Acc, kLanes>& shape, const Acc* row) {
  return has_nan(row + shape.cell(0), shape.w * kLanes);
}

// Hands out arrays from a task's workspace. With a null base it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t offset = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    // Nobody may touch what lies between two arrays.
    const int64_t end = offset + count * static_cast<int64_t>(sizeof(T));
    used_ += kCacheLine;
    if (base_ != nullptr) __asan_poison_memory_region(base_ + end, used_ - end);
#endif
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
  }
  // A row filled with `value`, or null where only counting.
  template <typename T>
  T* take_row(int64_t size, T value) {
    T* const row = take<T>(size);
    if (row != nullptr) fill_row(row, size, value);
    return row;
  }
  bool counts_only() const { return base_ == nullptr; }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// A ring of rows, addressed by the number of the line that they hold. The capacity is a power of
// two: a division would cost as much as a row of a narrow map.
template <typename T>
struct RowRing {
  T* rows = nullptr;
  int64_t mask = 0, row_size = 0;

  void allocate(Arena& arena, int64_t at_least, int64_t size, T padding) {
    int64_t capacity = 1;
    while (capacity < at_least) capacity *= 2;
    mask = capacity - 1;
    row_size = size;
    rows = arena.take_row<T>(capacity * size, padding);
  }
  void fill(T value) const { fill_row(rows, (mask + 1) * row_size, value); }
  METAPOOL_INLINE T* operator[](int64_t line) const { return rows + (line & mask) * row_size; }
};

}  // namespace metapool::cpu::METAPOOL_ISA
