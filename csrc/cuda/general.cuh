// The kernels that can do everything: any windows, strides, divisors, maps and dtypes. A thread
// owns a pixel and looks at each window by itself, in a fixed order.
//
// Backward first writes down where the maximum of each window stands, one byte for each. A pixel
// then gathers from the windows that hold it, so that nothing is added by two threads.
#pragma once

#include "moments.cuh"
#include "sent.cuh"

namespace metapool::cuda {

constexpr int kMaxCandidates = 1024;
constexpr int kGeneralThreads = 256;
// Blocks that a processor holds at least. Unless told, the compiler goes for more, and spills.
constexpr int kGeneralBlocks = 2;

struct Candidates {
  int count;
  int16_t codes[kMaxCandidates];
};

// Blocks that share a plane, where sums of it are wanted.
inline int64_t general_parts(const Sizes& sizes) {
  const int64_t most = ceil_div(sizes.h_out * sizes.w_out, 4 * kGeneralThreads);
  const int64_t wanted = ceil_div(kWantedBlocks, sizes.n * sizes.c);
  return wanted < most ? wanted : most;
}

// Along one axis, what a window holds of a map or, the other way round, which windows hold a pixel.
struct Range {
  int64_t begin, end;
};

METAPOOL_INLINE Range held(int64_t center, int radius, int64_t size) {
  return {first_valid(center, radius), last_valid(center, radius, size) + 1};
}

METAPOOL_INLINE Range holders(int64_t at, int radius, int64_t stride, int64_t count) {
  const int64_t first = at > radius ? (at - radius + stride - 1) / stride : 0;
  const int64_t last = (at + radius) / stride;
  return {first, (last < count ? last + 1 : count)};
}

// Where the maximum of the window around a pixel stands, as an offset into the window.
template <typename T>
METAPOOL_INLINE int position_of_max(const T* plane, const Map<const T>& x, const Sizes& sizes,
                                    Window window, int64_t center_y, int64_t center_x) {
  const Range rows = held(center_y, window.radius_h, sizes.h);
  const Range columns = held(center_x, window.radius_w, sizes.w);
  Acc<T> top = widen(plane[rows.begin * x.stride_h + columns.begin * x.stride_w]);
  int64_t top_y = rows.begin, top_x = columns.begin;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    for (int64_t i = columns.begin; i < columns.end; ++i) {
      const Acc<T> value = widen(plane[y * x.stride_h + i * x.stride_w]);
      if (right_wins(top, value)) {
        top = value;
        top_y = y;
        top_x = i;
      }
    }
  }
  return static_cast<int>((top_y - center_y + window.radius_h) * (2 * window.radius_w + 1) + top_x -
                          center_x + window.radius_w);
}

template <typename T>
METAPOOL_INLINE Acc<T> at_position(const T* plane, const Map<const T>& map, Window window,
                                   int64_t center_y, int64_t center_x, int position) {
  const int width = 2 * window.radius_w + 1;
  const int64_t y = center_y - window.radius_h + position / width;
  const int64_t x = center_x - window.radius_w + position % width;
  return widen(plane[y * map.stride_h + x * map.stride_w]);
}

template <typename A>
METAPOOL_INLINE A area_of(const Sizes& sizes, Window window, int64_t center_y, int64_t center_x) {
  return static_cast<A>(divisor(center_y, window.radius_h, sizes.h, sizes.count_include_pad) *
                        divisor(center_x, window.radius_w, sizes.w, sizes.count_include_pad));
}

template <typename T>
METAPOOL_INLINE Acc<T> average(const T* plane, const Map<const T>& map, const Sizes& sizes,
                               Window window, int64_t center_y, int64_t center_x) {
  const Range rows = held(center_y, window.radius_h, sizes.h);
  const Range columns = held(center_x, window.radius_w, sizes.w);
  Acc<T> sum = 0;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    Acc<T> row = 0;  // shorter chains of additions round less
    for (int64_t x = columns.begin; x < columns.end; ++x) {
      row += widen(plane[y * map.stride_h + x * map.stride_w]);
    }
    sum += row;
  }
  return sum / area_of<Acc<T>>(sizes, window, center_y, center_x);
}

// P_k(values) at one pixel of the output.
template <typename T>
METAPOOL_INLINE Acc<T> pooled(const Map<const T>& x, const Map<const T>& values, const Sizes& sizes,
                              Window window, const Pixel& at) {
  const int64_t center_y = at.y * sizes.stride_h, center_x = at.x * sizes.stride_w;
  const T* const plane = values.plane(at.n, at.c);
  switch (window.kind) {
    case Kind::kNone:
      return 0;
    case Kind::kSkip:
      return widen(plane[center_y * values.stride_h + center_x * values.stride_w]);
    case Kind::kAvg:
      return average(plane, values, sizes, window, center_y, center_x);
    case Kind::kMax: {
      const int position =
          position_of_max(x.plane(at.n, at.c), x, sizes, window, center_y, center_x);
      return at_position(plane, values, window, center_y, center_x, position);
    }
  }
  return 0;
}

template <typename T, Outcome kOutcome>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocks)
    general_fwd_kernel(Sizes sizes, Map<const T> x, Map<const T> values, Weights<Acc<T>> weights,
                       Weights<Acc<T>> constants, Map<T> out, int64_t out_stride_k,
                       Candidates candidates, bool channels_last) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (number >= sizes.n * sizes.c * sizes.h_out * sizes.w_out) return;
  const Pixel at = pixel_of(number, sizes.c, sizes.h_out, sizes.w_out, channels_last);
  const auto to = [&] { return out.plane(at.n, at.c) + at.y * out.stride_h + at.x * out.stride_w; };
  Acc<T> sum = 0;
  if (kOutcome == Outcome::kMix && constants.data != nullptr) sum = constants.at(at.n, at.c, 0);
  for (int k = 0; k < candidates.count; ++k) {
    const Acc<T> value = pooled(x, values, sizes, decode_candidate(candidates.codes[k]), at);
    if constexpr (kOutcome == Outcome::kStack) {
      narrow(value, to()[k * out_stride_k]);
    } else {
      sum += weights.at(at.n, at.c, k) * value;
    }
  }
  if constexpr (kOutcome == Outcome::kMix) narrow(sum, *to());
}

// What is found once for each window, for all poolings of a kind among the candidates, in their
// order: where maxima stand, as an offset into the window, or averages, which fields depend on. One
// for each pixel of a dense (n, c, h_out, w_out) map.
template <typename T, typename Found>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocks)
    windows_kernel(Sizes sizes, Map<const T> x, Candidates candidates, Found* found,
                   bool channels_last) {
  constexpr bool kPlaces = std::is_same_v<Found, uint8_t>;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t count = sizes.n * sizes.c * sizes.h_out * sizes.w_out;
  if (number >= count) return;
  const Pixel at = pixel_of(number, sizes.c, sizes.h_out, sizes.w_out, channels_last);
  for (int k = 0; k < candidates.count; ++k) {
    const Window window = decode_candidate(candidates.codes[k]);
    if (window.kind != (kPlaces ? Kind::kMax : Kind::kAvg)) continue;
    if constexpr (kPlaces) {
      found[number] = static_cast<uint8_t>(position_of_max(
          x.plane(at.n, at.c), x, sizes, window, at.y * sizes.stride_h, at.x * sizes.stride_w));
    } else {
      found[number] = pooled(x, x, sizes, window, at);
    }
    found += count;
  }
}

// The number of a pixel, the other way round than pixel_of.
METAPOOL_INLINE int64_t number_of(const Pixel& at, int64_t channels, int64_t h, int64_t w,
                                  bool channels_last) {
  return channels_last ? ((at.n * h + at.y) * w + at.x) * channels + at.c
                       : ((at.n * channels + at.c) * h + at.y) * w + at.x;
}

// What windows have to send.
template <typename T>
struct Given {
  Map<const T> grad_out, x;
  int64_t stride_k;  // from the map of one candidate to that of the next
  Fields<Acc<T>> fields;

  METAPOOL_INLINE Acc<T> grad(const Pixel& of, int k) const {
    return widen(grad_out.plane(
        of.n, of.c)[k * stride_k + of.y * grad_out.stride_h + of.x * grad_out.stride_w]);
  }
};

// What the windows of candidate k send to a pixel.
template <Form kForm, typename T>
METAPOOL_INLINE Acc<T> gathered(const Sizes& sizes, const Given<T>& given, int k, Window window,
                                const uint8_t* positions, const Acc<T>* averages, const Pixel& at,
                                bool channels_last) {
  const Range rows = holders(at.y, window.radius_h, sizes.stride_h, sizes.h_out);
  const Range columns = holders(at.x, window.radius_w, sizes.stride_w, sizes.w_out);
  const Field<Acc<T>> field = field_of<kForm>(given.fields, at.n, at.c, k);
  const int width = 2 * window.radius_w + 1;
  // A window that has its maximum from this pixel, or that is this pixel.
  const auto own = [&] {
    const Map<const T>& x = given.x;
    return Acc<T>(widen(x.plane(at.n, at.c)[at.y * x.stride_h + at.x * x.stride_w]));
  };
  Acc<T> sum = 0;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    Acc<T> row = 0;
    for (int64_t x = columns.begin; x < columns.end; ++x) {
      const int64_t center_y = y * sizes.stride_h, center_x = x * sizes.stride_w;
      const Pixel of{at.n, at.c, y, x};
      const int64_t number = number_of(of, sizes.c, sizes.h_out, sizes.w_out, channels_last);
      if (window.kind == Kind::kAvg) {
        const auto average = [&] { return averages[number]; };
        row += sent<kForm>(field, given.grad(of, k), average) /
               area_of<Acc<T>>(sizes, window, center_y, center_x);
        continue;
      }
      const int64_t position =
          (at.y - center_y + window.radius_h) * width + at.x - center_x + window.radius_w;
      if (window.kind == Kind::kSkip || positions[number] == position) {
        row += sent<kForm>(field, given.grad(of, k), own);
      }
    }
    sum += row;
  }
  return sum;
}

template <typename T, Form kForm>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocks)
    general_grad_x_kernel(Sizes sizes, Given<T> given, Map<T> grad_x, Candidates candidates,
                          const uint8_t* positions, const Acc<T>* averages, bool channels_last) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (number >= sizes.n * sizes.c * sizes.h * sizes.w) return;
  const Pixel at = pixel_of(number, sizes.c, sizes.h, sizes.w, channels_last);
  Acc<T> sum = 0;
  for (int k = 0; k < candidates.count; ++k) {
    const Window window = decode_candidate(candidates.codes[k]);
    if (window.kind == Kind::kNone) continue;
    sum += gathered<kForm>(sizes, given, k, window, positions, averages, at, channels_last);
    const int64_t count = sizes.n * sizes.c * sizes.h_out * sizes.w_out;
    if (window.kind == Kind::kMax) positions += count;
    if (kForm == Form::kMoments && window.kind == Kind::kAvg) averages += count;
  }
  narrow(sum, grad_x.plane(at.n, at.c)[at.y * grad_x.stride_h + at.x * grad_x.stride_w]);
}

// The sum of what the threads of a block hold, in a fixed order, for thread 0.
METAPOOL_DEVICE double block_sum(double value, double* shared) {
  shared[threadIdx.x] = value;
  for (unsigned span = blockDim.x / 2; span > 0; span /= 2) {
    __syncthreads();
    if (threadIdx.x < span) shared[threadIdx.x] += shared[threadIdx.x + span];
  }
  __syncthreads();
  const double sum = shared[0];
  __syncthreads();
  return sum;
}

// The gradient of the weights has terms (planes, parts, K): block i sums those of plane i / parts
// over a part of its pixels.
template <typename T>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocks)
    general_terms_kernel(Sizes sizes, Map<const T> grad_out, Map<const T> x, Map<const T> values,
                         Candidates candidates, Acc<T>* terms, int64_t parts) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int64_t pixels = sizes.h_out * sizes.w_out, count = sizes.n * sizes.c * parts;
  // There may be more planes than blocks.
  for (int64_t number = blockIdx.x; number < count; number += gridDim.x) {
    const int64_t plane = number / parts, part = number % parts;
    for (int k = 0; k < candidates.count; ++k) {
      const Window window = decode_candidate(candidates.codes[k]);
      double sum = 0;  // terms.cuh says why
      for (int64_t i = part * blockDim.x + threadIdx.x; i < pixels; i += parts * blockDim.x) {
        const Pixel at{plane / sizes.c, plane % sizes.c, i / sizes.w_out, i % sizes.w_out};
        const Acc<T> grad =
            widen(grad_out.plane(at.n, at.c)[at.y * grad_out.stride_h + at.x * grad_out.stride_w]);
        sum += grad * pooled(x, values, sizes, window, at);
      }
      sum = block_sum(sum, reinterpret_cast<double*>(shared_memory));
      if (threadIdx.x == 0) terms[number * candidates.count + k] = static_cast<Acc<T>>(sum);
    }
  }
}

// Moments of pooled planes, or products with another map: block i looks at a part of plane i /
// parts.
template <typename T, Outcome kOutcome>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocks)
    general_moments_kernel(Sizes sizes, Map<const T> x, Map<const T> other, Weights<Acc<T>> shifts,
                           Candidates candidates, Found* found, int64_t parts) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  double* const shared = reinterpret_cast<double*>(shared_memory);
  const int64_t pixels = sizes.h_out * sizes.w_out, count = sizes.n * sizes.c * parts;
  for (int64_t number = blockIdx.x; number < count; number += gridDim.x) {
    const int64_t plane = number / parts, first = number % parts * blockDim.x;
    const auto pixel_at = [&](int64_t i) {
      return Pixel{plane / sizes.c, plane % sizes.c, i / sizes.w_out, i % sizes.w_out};
    };
    for (int k = 0; k < candidates.count; ++k) {
      const Window window = decode_candidate(candidates.codes[k]);
      const Acc<T> shift = kOutcome == Outcome::kProducts
                               ? shifts.at(plane / sizes.c, plane % sizes.c, k)
                               : near(pooled(x, x, sizes, window, pixel_at(first)));
      double sum = 0, products = 0, values = 0;
      for (int64_t i = first + threadIdx.x; i < pixels; i += parts * blockDim.x) {
        const Pixel at = pixel_at(i);
        const double deviation = static_cast<double>(pooled(x, x, sizes, window, at)) - shift;
        double factor = deviation;
        if constexpr (kOutcome == Outcome::kProducts) {
          factor = widen(other.plane(at.n, at.c)[at.y * other.stride_h + at.x * other.stride_w]);
        }
        sum += factor;
        products += deviation * factor;
        values += 1;
      }
      sum = block_sum(sum, shared);
      products = block_sum(products, shared);
      values = block_sum(values, shared);
      if (threadIdx.x > 0) continue;
      found[number * candidates.count + k] = kOutcome == Outcome::kProducts
                                                 ? Found{values, sum, products}
                                                 : found_of(values, shift, sum, products);
    }
  }
}

}  // namespace metapool::cuda
