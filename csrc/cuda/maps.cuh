// Maps and weights as kernels take them, and which pixel a thread stands for.
#pragma once

#include "device.cuh"

namespace metapool::cuda {

// What a kernel makes of the poolings, see Form.
enum class Outcome : int { kMix, kStack, kMoments, kProducts };

// A map in memory; strides count elements.
template <typename T>
struct Map {
  T* data;
  int64_t stride_n, stride_c, stride_h, stride_w;

  METAPOOL_INLINE T* plane(int64_t n, int64_t c) const {
    return data + n * stride_n + c * stride_c;
  }
};

template <typename T>
Map<const T> map_of(const MapView& view) {
  return {static_cast<const T*>(view.data), view.stride_n, view.stride_c, view.stride_h,
          view.stride_w};
}
template <typename T>
Map<T> map_of(const MutableMapView& view) {
  return {static_cast<T*>(view.data), view.stride_n, view.stride_c, view.stride_h, view.stride_w};
}

template <typename A>
struct Weights {
  const A* data;
  int64_t stride_n, stride_c, stride_k;

  METAPOOL_INLINE A at(int64_t n, int64_t c, int k) const {
    return data[n * stride_n + c * stride_c + k * stride_k];
  }
};

template <typename A>
Weights<A> weights_of(const WeightView& view) {
  return {static_cast<const A*>(view.data), view.stride_n, view.stride_c, view.stride_k};
}

// Sizes of a problem; strides beyond the map mean one window, as those of its size do.
struct Sizes {
  int64_t n, c, h, w, h_out, w_out, stride_h, stride_w;
  bool count_include_pad;
};

inline Sizes sizes_of(const Problem& problem) {
  return {problem.n,
          problem.c,
          problem.h,
          problem.w,
          output_size(problem.h, problem.stride_h),
          output_size(problem.w, problem.stride_w),
          problem.stride_h < problem.h ? problem.stride_h : problem.h,
          problem.stride_w < problem.w ? problem.stride_w : problem.w,
          problem.count_include_pad};
}

struct Pixel {
  int64_t n, c, y, x;
};

// The pixel of a number below n * c * h * w, along rows or, with channels last, along channels, so
// that neighbouring threads have neighbours in memory.
METAPOOL_INLINE Pixel pixel_of(int64_t number, int64_t channels, int64_t h, int64_t w,
                               bool channels_last) {
  Pixel at;
  if (channels_last) {
    at.c = number % channels;
    number /= channels;
  }
  at.x = number % w;
  number /= w;
  at.y = number % h;
  number /= h;
  if (!channels_last) {
    at.c = number % channels;
    number /= channels;
  }
  at.n = number;
  return at;
}

template <typename T>
bool is_channels_last(const Map<T>& map) {
  return map.stride_c == 1 && map.stride_w != 1;
}

}  // namespace metapool::cuda
