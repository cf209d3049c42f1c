// Maps in memory, and how the lines of a task's planes become rows and are stored again, ahead of
// time where possible.
#pragma once

#include "columns.h"

namespace metapool::cpu::METAPOOL_ISA {

constexpr int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The lines of a map that a task moves into rows and back. `step` is the distance of neighbouring
// columns of the map in the row, in pixels; what lies between is left as it is. Lines are asked for
// some time before it is their turn, in this task and in the next: what hardware prefetches is not
// enough for sixteen planes at a time.
template <typename Acc, int kLanes>
class MapLines {
 public:
  template <typename View>
  MapLines(const View& view, const Plan& plan, int64_t lines, int64_t columns, int64_t step,
           const Task& task, const Task& next)
      : data_(view.data),
        dtype_(plan.dtype),
        lines_(lines),
        columns_(columns),
        step_(step),
        ahead_(lines < kAhead(columns) ? lines : kAhead(columns)),
        planes_(view, plan, task),
        next_planes_(view, plan, next) {}

  // One of several maps side by side, so many elements further on. Nothing of it is asked for ahead
  // of time: lines of all of them would push each other out of the cache.
  MapLines beside(int64_t elements) const {
    MapLines other = *this;
    other.data_ = static_cast<const char*>(data_) + elements * element_bytes(dtype_);
    other.ahead_ = 2 * lines_;
    return other;
  }

  // Widens a line into a row whose first column is at `row`.
  void load(int64_t line, Acc* row) const {
    convert<true>(line, columns_, row, step_ * kLanes);
    prefetch_ahead<false>(line);
  }

  // Rounds a row into a line.
  void store(int64_t line, const Acc* row) const {
    convert<false>(line, columns_, const_cast<Acc*>(row), step_ * kLanes);
    prefetch_ahead<true>(line);
  }

  // The same for many lines, whose rows follow each other without padding.
  void load_dense(int64_t line, int64_t count, Acc* rows) const {
    convert_dense<true>(line, count, rows);
  }
  void store_dense(int64_t line, int64_t count, const Acc* rows) const {
    convert_dense<false>(line, count, const_cast<Acc*>(rows));
  }

  // The first column of a line where the map itself can serve as a packed row, else null.
  Acc* as_row(int64_t line) const {
    if (element_bytes(dtype_) != sizeof(Acc) || planes_.adjacent != kLanes) return nullptr;
    return static_cast<Acc*>(const_cast<void*>(data_)) + planes_.offset[0] +
           line * planes_.stride_h;
  }
  int64_t pixel_stride() const { return planes_.stride_w; }

  // Asks for the line that is due some time after `line`, in this task or the next.
  template <bool kWrite>
  METAPOOL_INLINE void prefetch_ahead(int64_t line) const {
    line += ahead_;
    if (kLanes == 1 || line >= 2 * lines_) return;
    const bool here = line < lines_;
    prefetch_line<kWrite>(here ? planes_ : next_planes_, here ? line : line - lines_);
  }

  // Asks for part `line` of the next task. Planes that follow each other without a gap are cut as
  // one: their own lines may be shorter than those of the cache.
  template <bool kWrite>
  METAPOOL_INLINE void prefetch_next(int64_t line) const {
    const Planes<kLanes>& planes = next_planes_;
    if (lines_run_on() && planes.evenly_apart(lines_ * planes.stride_h)) {
      const int64_t part = planes.lanes * planes.stride_h;
      prefetch_bytes<kWrite>(planes.offset[0] + line * part, part, 1);
    } else {
      prefetch_line<kWrite>(planes, line);
    }
  }

 private:
  static constexpr int64_t kAhead(int64_t columns) { return 2 + 64 / columns; }

  // Whether a line begins where the one before it ends.
  bool lines_run_on() const { return planes_.stride_h == columns_ * planes_.stride_w; }

  template <bool kWrite>
  METAPOOL_INLINE void prefetch_line(const Planes<kLanes>& planes, int64_t line) const {
    const bool adjacent = planes.adjacent == planes.lanes;  // each pixel's share cache lines
    for (int lane = 0; lane < (adjacent ? 1 : planes.lanes); ++lane) {
      prefetch_bytes<kWrite>(planes.offset[lane] + line * planes.stride_h,
                             (columns_ - 1) * planes.stride_w + (adjacent ? planes.lanes : 1),
                             planes.stride_w);
    }
  }

  // `count` elements of the map, of which every `step`th is needed.
  template <bool kWrite>
  METAPOOL_INLINE void prefetch_bytes(int64_t offset, int64_t count, int64_t step) const {
    const int64_t bytes = element_bytes(dtype_);
    const char* const from = static_cast<const char*>(data_) + offset * bytes;
    const int64_t line = step * bytes < kCacheLine ? kCacheLine : step * bytes;
    for (int64_t byte = 0; byte < count * bytes; byte += line) {
      __builtin_prefetch(from + byte, kWrite, 2);
    }
  }

  template <bool kIntoRow>
  void convert(int64_t line, int64_t columns, Acc* row, int64_t pitch) const {
    with_elements<Acc>(dtype_, data_, [&](const auto* elements) METAPOOL_LAMBDA {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(elements)>>;
      T* const map = const_cast<T*>(elements) + line * planes_.stride_h;
      Columns<kIntoRow, kLanes, T, Acc>{planes_, map, row, pitch}.convert(columns);
    });
  }

  template <bool kIntoRow>
  void convert_dense(int64_t line, int64_t count, Acc* rows) const {
    const int64_t run = lines_run_on() ? count : 1;
    for (int64_t done = 0; done < count; done += run) {
      convert<kIntoRow>(line + done, run * columns_, rows + done * columns_ * kLanes, kLanes);
    }
  }

  const void* data_;
  DType dtype_;
  int64_t lines_, columns_, step_, ahead_;
  Planes<kLanes> planes_, next_planes_;
};

// The lines of a task's planes without padding: all of them where that is little, else a ring.
class DenseLines {
 public:
  using Lines = MapLines<float, kPackedLanes>;

  // `at_least` lines are there at a time, or all.
  DenseLines(const Plan& plan, int64_t at_least, Arena& arena)
      : whole_(plan.strips == 1 && plan.h * plan.w <= kWholePixels),
        h_(plan.h),
        row_size_(plan.w * kPackedLanes) {
    const bool all = whole_ || at_least > plan.h;
    lines_.allocate(arena, all ? plan.h : at_least, row_size_, 0.0f);
  }

  bool whole() const { return whole_; }
  METAPOOL_INLINE float* operator[](int64_t line) const { return lines_[line]; }

  // Before the first line of a task. Lanes that it leaves empty hold zeros, whatever ran before.
  void start(const Task& task, int64_t line) {
    next_ = line;
    if (task.lanes < kPackedLanes) lines_.fill(0.0f);
  }

  // Loads what is missing up to `last`, and calls body(first row, elements) for it.
  template <typename Body>
  METAPOOL_INLINE void load_to(int64_t last, const Lines& map, Body body) {
    if (whole_ && next_ <= last) {
      map.load_dense(0, h_, lines_[0]);
      body(lines_[0], h_ * row_size_);
      next_ = h_;
    }
    for (; next_ <= last; ++next_) {
      map.load(next_, lines_[next_]);
      body(lines_[next_], row_size_);
    }
  }

 private:
  static constexpr int64_t kWholePixels = 1024;

  const bool whole_;
  const int64_t h_, row_size_;
  int64_t next_ = 0;
  RowRing<float> lines_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
