// How columns of a task's planes become columns of a row and are stored again: any strides, any
// element type, sixteen planes side by side by transposing.
#pragma once

#include <utility>

#include "rows.h"

namespace metapool::cpu::METAPOOL_ISA {

// The planes of a task in one map.
template <int kLanes>
struct Planes {
  int64_t offset[kLanes];  // of each lane's first element; those left empty repeat lane 0
  int lanes;
  int adjacent;  // so many lanes from the first on lie side by side, at every pixel
  int64_t stride_h, stride_w;

  template <typename View>
  Planes(const View& view, const Plan& plan, const Task& task)
      : lanes(task.lanes), stride_h(view.stride_h), stride_w(view.stride_w) {
    int64_t n = task.plane / plan.c, c = task.plane % plan.c;
    const int64_t first = n * view.stride_n + c * view.stride_c;
    one_image_ = c + lanes <= plan.c;
    channel_stride_ = view.stride_c;
    for (int lane = 0; lane < kLanes; ++lane) {
      offset[lane] = first + (lane < lanes ? lane : 0) * view.stride_c;
    }
    adjacent = one_image_ && view.stride_c == 1 ? lanes : 1;
    if (one_image_) return;
    for (int lane = 0; lane < lanes; ++lane) {
      offset[lane] = n * view.stride_n + c * view.stride_c;
      if (adjacent == lane && offset[lane] == offset[0] + lane) ++adjacent;
      if (++c == plan.c) {
        c = 0;
        ++n;
      }
    }
  }

  // Whether the planes are known to begin `distance` elements apart.
  METAPOOL_INLINE bool evenly_apart(int64_t distance) const {
    return one_image_ && channel_stride_ == distance;
  }

  // Whether the lanes lie side by side four by four, as where channels are the last dimension.
  METAPOOL_INLINE bool adjacent_fours() const {
    bool adjacent = lanes % 4 == 0;
    for (int lane = 0; lane + 4 <= lanes; lane += 4) {
      adjacent &= offset[lane + 1] == offset[lane] + 1 && offset[lane + 2] == offset[lane] + 2 &&
                  offset[lane + 3] == offset[lane] + 3;
    }
    return adjacent;
  }

 private:
  bool one_image_;
  int64_t channel_stride_;
};

// Vectors from parts and parts from vectors.
template <typename V, int... kIndex>
METAPOOL_INLINE auto concat(V low, V high, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(low, high, kIndex...);
}
template <int kFirst, typename V, int... kIndex>
METAPOOL_INLINE auto part(V vector, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(vector, vector, kFirst + kIndex...);
}

// Fours of elements side by side: number i is at from(i), or goes to to(i).
template <typename T, int kFours, typename From>
METAPOOL_INLINE Raw<T, 4 * kFours> gather_fours(From from, int first = 0) {
  if constexpr (kFours == 1) {
    return load_raw<T, 4>(from(first));
  } else {
    return concat(gather_fours<T, kFours / 2>(from, first),
                  gather_fours<T, kFours / 2>(from, first + kFours / 2),
                  std::make_integer_sequence<int, 4 * kFours>{});
  }
}
template <typename T, int kFours, typename To>
METAPOOL_INLINE void scatter_fours(Raw<T, 4 * kFours> raw, To to, int first = 0) {
  if constexpr (kFours == 1) {
    T* const at = to(first);
    if (at != nullptr) store_raw(at, raw);
  } else {
    constexpr std::make_integer_sequence<int, 2 * kFours> half{};
    scatter_fours<T, kFours / 2>(part<0>(raw, half), to, first);
    scatter_fours<T, kFours / 2>(part<2 * kFours>(raw, half), to, first + kFours / 2);
  }
}

// Transposes each four by four units of four vectors, of kUnit elements each.
template <int kUnit, typename V, int... kIndex>
METAPOOL_INLINE void transpose_units(V& v0, V& v1, V& v2, V& v3,
                                     std::integer_sequence<int, kIndex...>) {
  constexpr int kSize = sizeof...(kIndex), kFour = 4 * kUnit;
  // Two units of each four, from unit `from` on: of both vectors alternately; or first of the one,
  // then of the other.
  const auto mix = [](V left, V right, auto from) METAPOOL_LAMBDA {
    return __builtin_shufflevector(
        left, right,
        (kIndex / kFour * kFour + kIndex % kUnit + (from + kIndex / kUnit % 4 / 2) * kUnit +
         kIndex / kUnit % 2 * kSize)...);
  };
  const auto join = [](V left, V right, auto from) METAPOOL_LAMBDA {
    return __builtin_shufflevector(
        left, right,
        (kIndex / kFour * kFour + kIndex % kUnit + (from + kIndex / kUnit % 2) * kUnit +
         kIndex / kUnit % 4 / 2 * kSize)...);
  };
  const V a = mix(v0, v1, Int<0>{}), b = mix(v2, v3, Int<0>{});
  const V c = mix(v0, v1, Int<2>{}), d = mix(v2, v3, Int<2>{});
  v0 = join(a, b, Int<0>{});
  v1 = join(a, b, Int<2>{});
  v2 = join(c, d, Int<0>{});
  v3 = join(c, d, Int<2>{});
}

// Transposes each four by four elements of four vectors.
template <typename V>
METAPOOL_INLINE void transpose_fours(V* line) {
  constexpr int kSize = sizeof(V) / sizeof(line[0][0]);
  transpose_units<1>(line[0], line[1], line[2], line[3], std::make_integer_sequence<int, kSize>{});
}

// Transposes as many vectors as each has elements: 4, 8 or 16.
template <typename V>
METAPOOL_INLINE void transpose(V* line) {
  constexpr int kSize = sizeof(V) / sizeof(line[0][0]);
  constexpr std::make_integer_sequence<int, kSize> indices{};
  for (int i = 0; i < kSize; i += 4) transpose_fours(line + i);
  if constexpr (kSize == 16) {
    for (int i = 0; i < 4; ++i) {
      transpose_units<4>(line[i], line[i + 4], line[i + 8], line[i + 12], indices);
    }
  } else if constexpr (kSize == 8) {
    constexpr std::make_integer_sequence<int, 4> half{};
    for (int i = 0; i < 4; ++i) {
      const V low = line[i], high = line[i + 4];
      line[i] = concat(part<0>(low, half), part<0>(high, half), indices);
      line[i + 4] = concat(part<4>(low, half), part<4>(high, half), indices);
    }
  }
}

// Columns of a map and of a row, whose first ones are at `map` (but for the planes' offsets) and
// `row`; converted into the row, or into the map.
template <bool kIntoRow, int kLanes, typename T, typename Acc>
struct Columns {
  static constexpr int kAtOnce = METAPOOL_ISA::kAtOnce<Acc>, kFours = kAtOnce / 4;
  using Wide = RawVector<Acc, Acc>;

  const Planes<kLanes>& planes;
  T* map;
  Acc* row;
  int64_t pitch;  // of the row: elements from column to column

  void convert(int64_t columns) const {
    if constexpr (kLanes == 1) {
      int64_t column = 0;
      if (planes.stride_w == 1 && pitch == 1) {
        for (; column + kAtOnce <= columns; column += kAtOnce) convert_vector(column, 0);
      }
      for (; column < columns; ++column) convert_one(column, 0);
    } else if (planes.adjacent == kLanes) {
      for_each_vector(
          columns, [&](int64_t column, int lane) METAPOOL_LAMBDA { convert_vector(column, lane); });
    } else if (planes.stride_w == 1 && columns >= 4) {
      // The last columns may overlap others.
      for (int64_t next = 0; next < columns;) {
        const bool few = columns < kAtOnce || columns - next <= 4;
        const int64_t count = few ? 4 : kAtOnce;
        const int64_t column = next + count <= columns ? next : columns - count;
        few ? convert_four_columns(column) : convert_block(column);
        next += count;
      }
    } else if (planes.adjacent_fours()) {
      for_each_vector(columns, [&](int64_t column, int lane) METAPOOL_LAMBDA {
        const auto in_lanes = [&](int four)
                                  METAPOOL_LAMBDA { return in_lane(column, lane + 4 * four); };
        if constexpr (kIntoRow) {
          const auto raw = gather_fours<T, kFours>(in_lanes);
          store_raw(in_row(column, lane), widen_vector<T, Acc>(raw));
        } else {
          const Wide wide = load_raw<Acc, kAtOnce>(in_row(column, lane));
          scatter_fours<T, kFours>(narrow_vector<T, Acc>(wide), in_lanes);
        }
      });
    } else {
      for (int lane = 0; lane < planes.lanes; ++lane) {
        for (int64_t column = 0; column < columns; ++column) convert_one(column, lane);
      }
    }
  }

 private:
  METAPOOL_INLINE T* in_map(int64_t column, int lane) const {
    return map + planes.offset[lane] + column * planes.stride_w;
  }
  METAPOOL_INLINE Acc* in_row(int64_t column, int lane) const {
    return row + column * pitch + lane;
  }
  // Null where nothing may be stored: the lane is left empty.
  METAPOOL_INLINE T* in_lane(int64_t column, int lane) const {
    return kIntoRow || lane < planes.lanes ? in_map(column, lane) : nullptr;
  }

  template <typename Body>
  METAPOOL_INLINE void for_each_vector(int64_t columns, Body body) const {
    for (int64_t column = 0; column < columns; ++column) {
      for (int lane = 0; lane < kLanes; lane += kAtOnce) body(column, lane);
    }
  }

  METAPOOL_INLINE void convert_one(int64_t column, int lane) const {
    if constexpr (kIntoRow) {
      *in_row(column, lane) = widen(*in_map(column, lane));
    } else {
      narrow(*in_row(column, lane), *in_map(column, lane));
    }
  }

  // What lies side by side in both.
  METAPOOL_INLINE void convert_vector(int64_t column, int lane) const {
    if constexpr (kIntoRow) {
      const auto raw = load_raw<T, kAtOnce>(in_map(column, lane));
      store_raw(in_row(column, lane), widen_vector<T, Acc>(raw));
    } else {
      const Wide wide = load_raw<Acc, kAtOnce>(in_row(column, lane));
      store_raw(in_map(column, lane), narrow_vector<T, Acc>(wide));
    }
  }

  // As many columns as lanes.
  METAPOOL_INLINE void convert_block(int64_t column) const {
    for (int lane = 0; lane < kLanes; lane += kAtOnce) {
      Wide line[kAtOnce];
      for (int i = 0; i < kAtOnce; ++i) {
        if constexpr (kIntoRow) {
          line[i] = widen_vector<T, Acc>(load_raw<T, kAtOnce>(in_map(column, lane + i)));
        } else {
          line[i] = load_raw<Acc, kAtOnce>(in_row(column + i, lane));
        }
      }
      transpose(line);
      for (int i = 0; i < kAtOnce; ++i) {
        if constexpr (kIntoRow) {
          store_raw(in_row(column + i, lane), line[i]);
        } else {
          T* const to = in_lane(column, lane + i);
          if (to != nullptr) store_raw(to, narrow_vector<T, Acc>(line[i]));
        }
      }
    }
  }

  METAPOOL_INLINE void convert_four_columns(int64_t column) const {
    for (int lane = 0; lane < kLanes; lane += kAtOnce) {
      Wide line[4];
      for (int i = 0; i < 4; ++i) {
        if constexpr (kIntoRow) {
          line[i] = widen_vector<T, Acc>(gather_fours<T, kFours>(
              [&](int four) METAPOOL_LAMBDA { return in_lane(column, lane + 4 * four + i); }));
        } else {
          line[i] = load_raw<Acc, kAtOnce>(in_row(column + i, lane));
        }
      }
      transpose_fours(line);
      for (int i = 0; i < 4; ++i) {
        if constexpr (kIntoRow) {
          store_raw(in_row(column + i, lane), line[i]);
        } else {
          scatter_fours<T, kFours>(narrow_vector<T, Acc>(line[i]), [&](int four) METAPOOL_LAMBDA {
            return in_lane(column, lane + 4 * four + i);
          });
        }
      }
    }
  }
};

}  // namespace metapool::cpu::METAPOOL_ISA
