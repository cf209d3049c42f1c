// Rows as the kernels see them: widened to the accumulation type, padded, and laid out so that
// every tap of a window is a contiguous run whatever the stride and the memory format.
//
// A row holds `kLanes` planes side by side (pixel-major, lane-minor). With a horizontal stride s
// its columns are stored as s phases (column mod s): the elements that the windows of
// neighbouring outputs see at the same offset then lie next to each other.
#pragma once

#include <cstdint>
#include <type_traits>

#include "plan.h"

namespace metapool::cpu::METAPOOL_ISA {

template <typename To, typename From>
METAPOOL_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

METAPOOL_INLINE float widen(float value) { return value; }
METAPOOL_INLINE double widen(double value) { return value; }
METAPOOL_INLINE float widen(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
METAPOOL_INLINE float widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  const uint32_t normal = (rest << 13) + 0x38000000u;  // rebias the exponent from 15 to 127
  const uint32_t special = (rest << 13) | 0x7f800000u;
  const uint32_t subnormal =
      bit_cast<uint32_t>(static_cast<float>(static_cast<int>(rest)) * 0x1p-24f);
  return bit_cast<float>(sign | (rest >= 0x7c00u ? special : rest >= 0x0400u ? normal : subnormal));
}

// Rounds to nearest, ties to even.
METAPOOL_INLINE void narrow(float value, float& to) { to = value; }
METAPOOL_INLINE void narrow(double value, double& to) { to = value; }
METAPOOL_INLINE void narrow(float value, BFloat16& to) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}
METAPOOL_INLINE void narrow(float value, Half& to) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  const uint32_t normal = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
  // Adding one half lines the sum's last bit up with the smallest subnormal, 2^-24.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  uint32_t result = rest < 0x38800000u ? subnormal : normal;
  result = rest >= 0x477ff000u ? 0x7c00u : result;
  result = rest > 0x7f800000u ? 0x7e00u : result;
  to.bits = static_cast<uint16_t>(sign | result);
}

METAPOOL_INLINE int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

// Where the columns of a row lie in its buffer.
template <int kLanes>
struct RowShape {
  int64_t w, w_out, step;
  int radius;
  int64_t left;       // pixels of padding at the start of a phase
  int64_t phase_len;  // pixels in a phase, padding included

  explicit RowShape(const Plan& plan)
      : w(plan.w),
        w_out(plan.w_out),
        step(plan.stride_w),
        radius(plan.radius_w),
        left((radius + step - 1) / step),
        phase_len(left + w_out + radius / step) {}

  // An output row: its pixels in order, no padding.
  static RowShape plain(int64_t pixels) { return RowShape(pixels); }

  METAPOOL_INLINE int64_t size() const { return step * phase_len * kLanes; }
  METAPOOL_INLINE int64_t out_size() const { return w_out * kLanes; }

  // Offset of a column's first lane; `column` may lie up to `radius` outside of the row.
  METAPOOL_INLINE int64_t cell(int64_t column) const {
    if (step == 1) return (left + column) * kLanes;  // a division costs as much as the pixel
    const int64_t quotient = floor_div(column, step);
    return ((column - quotient * step) * phase_len + left + quotient) * kLanes;
  }
  // Offset of what output 0 sees at distance d from its centre; output j sees it j pixels later.
  METAPOOL_INLINE int64_t tap(int d) const { return cell(d); }
  METAPOOL_INLINE int64_t last_column() const { return (w_out - 1) * step + radius; }

  // Calls body(offset, count) for each contiguous run of elements that are no padding.
  template <typename Body>
  METAPOOL_INLINE void for_each_run(Body body) const {
    for (int64_t phase = 0; phase < step && phase < w; ++phase) {
      body(cell(phase), ((w - 1 - phase) / step + 1) * kLanes);
    }
  }

 private:
  explicit RowShape(int64_t pixels)
      : w(pixels), w_out(pixels), step(1), radius(0), left(0), phase_len(pixels) {}
};

// The planes of a task in one map.
template <int kLanes>
struct Planes {
  int64_t offset[kLanes];  // of each lane's first element
  int lanes;
  bool adjacent;  // the lanes of a pixel are neighbours in memory
  int64_t stride_h, stride_w;

  template <typename View>
  Planes(const View& view, const Plan& plan, const Task& task)
      : lanes(task.lanes), adjacent(true), stride_h(view.stride_h), stride_w(view.stride_w) {
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t plane = task.plane + lane;
      offset[lane] = plane / plan.c * view.stride_n + plane % plan.c * view.stride_c;
      adjacent &= offset[lane] == offset[0] + lane;
    }
  }
};

template <int kLanes, typename T, typename Acc>
void load_columns(const RowShape<kLanes>& shape, const Planes<kLanes>& planes, const T* source,
                  Acc* __restrict row) {
  if (kLanes == 1 && shape.step == 1 && planes.stride_w == 1) {
    const T* __restrict from = source + planes.offset[0];
    Acc* __restrict to = row + shape.cell(0);
    for (int64_t column = 0; column < shape.w; ++column) to[column] = widen(from[column]);
  } else if (planes.adjacent && planes.lanes == kLanes) {
    for (int64_t column = 0; column < shape.w; ++column) {
      const T* __restrict from = source + planes.offset[0] + column * planes.stride_w;
      Acc* __restrict to = row + shape.cell(column);
      for (int lane = 0; lane < kLanes; ++lane) to[lane] = widen(from[lane]);
    }
  } else {
    for (int lane = 0; lane < planes.lanes; ++lane) {
      const T* from = source + planes.offset[lane];
      for (int64_t column = 0; column < shape.w; ++column) {
        row[shape.cell(column) + lane] = widen(from[column * planes.stride_w]);
      }
    }
  }
}

template <int kLanes, typename Acc, typename T>
void store_columns(const RowShape<kLanes>& shape, const Planes<kLanes>& planes,
                   const Acc* __restrict row, T* target) {
  if (kLanes == 1 && shape.step == 1 && planes.stride_w == 1) {
    T* __restrict to = target + planes.offset[0];
    const Acc* __restrict from = row + shape.cell(0);
    for (int64_t column = 0; column < shape.w; ++column) narrow(from[column], to[column]);
  } else if (planes.adjacent && planes.lanes == kLanes) {
    for (int64_t column = 0; column < shape.w; ++column) {
      T* __restrict to = target + planes.offset[0] + column * planes.stride_w;
      const Acc* __restrict from = row + shape.cell(column);
      for (int lane = 0; lane < kLanes; ++lane) narrow(from[lane], to[lane]);
    }
  } else {
    for (int lane = 0; lane < planes.lanes; ++lane) {
      T* to = target + planes.offset[lane];
      for (int64_t column = 0; column < shape.w; ++column) {
        narrow(row[shape.cell(column) + lane], to[column * planes.stride_w]);
      }
    }
  }
}

// Calls body(pointer) with `data` as a pointer to the element type of `dtype`. The accumulation
// type fixes which types are possible.
template <typename Acc, typename Body>
METAPOOL_INLINE void with_elements(DType dtype, const void* data, Body body) {
  if constexpr (sizeof(Acc) == sizeof(double)) {
    body(static_cast<const double*>(data));
  } else if (dtype == DType::kFloat32) {
    body(static_cast<const float*>(data));
  } else if (dtype == DType::kFloat16) {
    body(static_cast<const Half*>(data));
  } else {
    body(static_cast<const BFloat16*>(data));
  }
}

template <typename Acc, typename Body>
METAPOOL_INLINE void with_mutable_elements(DType dtype, void* data, Body body) {
  with_elements<Acc>(dtype, data, [&](const auto* elements) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(elements)>>;
    body(const_cast<T*>(elements));
  });
}

template <int kLanes, typename Acc>
void load_row(const RowShape<kLanes>& shape, const Planes<kLanes>& planes, DType dtype,
              const void* data, int64_t line, Acc* row) {
  with_elements<Acc>(dtype, data, [&](const auto* elements) {
    load_columns(shape, planes, elements + line * planes.stride_h, row);
  });
}

template <int kLanes, typename Acc>
void store_row(const RowShape<kLanes>& shape, const Planes<kLanes>& planes, DType dtype,
               const Acc* row, void* data, int64_t line) {
  with_mutable_elements<Acc>(dtype, data, [&](auto* elements) {
    store_columns(shape, planes, row, elements + line * planes.stride_h);
  });
}

// Repeats the edge columns into the padding: a maximum may look there, since the edge itself is
// always in the same window.
template <int kLanes, typename Acc>
void replicate_edges(const RowShape<kLanes>& shape, Acc* row) {
  const auto copy = [&](int64_t from, int64_t to) {
    for (int lane = 0; lane < kLanes; ++lane)
      row[shape.cell(to) + lane] = row[shape.cell(from) + lane];
  };
  for (int64_t column = -shape.radius; column < 0; ++column) copy(0, column);
  for (int64_t column = shape.w; column <= shape.last_column(); ++column) copy(shape.w - 1, column);
}

// The adjoint of replicate_edges: what was sent to the padding belongs to the edge.
template <int kLanes, typename Acc>
void fold_edges(const RowShape<kLanes>& shape, Acc* row) {
  const auto add = [&](int64_t from, int64_t to) {
    for (int lane = 0; lane < kLanes; ++lane)
      row[shape.cell(to) + lane] += row[shape.cell(from) + lane];
  };
  for (int64_t column = -shape.radius; column < 0; ++column) add(column, 0);
  for (int64_t column = shape.w; column <= shape.last_column(); ++column) add(column, shape.w - 1);
}

// Hands out parts of a task's workspace. With a null base it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t offset = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// A ring of rows, addressed by the number of the line that they hold.
template <typename Acc>
struct RowRing {
  Acc* rows = nullptr;
  int64_t capacity = 0, row_size = 0;

  void allocate(Arena& arena, int64_t count, int64_t size) {
    capacity = count;
    row_size = size;
    rows = arena.take<Acc>(count * size);
  }
  METAPOOL_INLINE Acc* operator[](int64_t line) const { return rows + line % capacity * row_size; }
};

// The weights of a task's planes as [K][kLanes].
template <int kLanes, typename Acc>
void load_weights(const Plan& plan, const WeightView& view, const Task& task, Acc* weights) {
  for (int lane = 0; lane < task.lanes; ++lane) {
    const int64_t plane = task.plane + lane;
    const Acc* const from = static_cast<const Acc*>(view.data) + plane / plan.c * view.stride_n +
                            plane % plan.c * view.stride_c;
    for (int64_t k = 0; k < plan.num_candidates; ++k) {
      weights[k * kLanes + lane] = from[k * view.stride_k];
    }
  }
}

}  // namespace metapool::cpu::METAPOOL_ISA
