// What a pooling window means: candidate codes, padding, divisors, and which of two elements wins.
// Shared by every native backend. Everything is inlined by force, so that no copy compiled for one
// instruction set is linked into another.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define METAPOOL_INLINE __host__ __device__ __forceinline__
#else
#define METAPOOL_INLINE inline __attribute__((always_inline))
#endif

namespace metapool {

// The values are those of metapool_kernels/candidates.py.
enum class Kind : int { kNone = 0, kSkip = 1, kAvg = 2, kMax = 3 };

constexpr int kMaxRadius = 7;

struct Window {
  Kind kind;
  int radius_h;
  int radius_w;
};

// Whether `code` (kind << 8 | kh << 4 | kw) stands for a candidate: windows odd, 1 to 15.
METAPOOL_INLINE constexpr bool is_candidate_code(int64_t code) {
  const int64_t kind = code >> 8;
  return kind >= 0 && kind <= 3 && (code >> 4 & 1) == 1 && (code & 1) == 1;
}

METAPOOL_INLINE constexpr Window decode_candidate(int64_t code) {
  return {static_cast<Kind>(code >> 8), static_cast<int>(code >> 4 & 15) / 2,
          static_cast<int>(code & 15) / 2};
}

// Windows are padded by their radius, so all of them give the same output size.
METAPOOL_INLINE constexpr int64_t output_size(int64_t size, int64_t stride) {
  return (size - 1) / stride + 1;
}

METAPOOL_INLINE constexpr int64_t first_valid(int64_t center, int radius) {
  return center > radius ? center - radius : 0;
}

METAPOOL_INLINE constexpr int64_t last_valid(int64_t center, int radius, int64_t size) {
  return center + radius < size ? center + radius : size - 1;
}

METAPOOL_INLINE constexpr int64_t clamp_line(int64_t line, int64_t size) {
  return line < 0 ? 0 : line < size ? line : size - 1;
}

// How many of the window's positions along one axis an average is divided by.
METAPOOL_INLINE constexpr int64_t divisor(int64_t center, int radius, int64_t size,
                                          bool count_include_pad) {
  return count_include_pad ? 2 * radius + 1
                           : last_valid(center, radius, size) - first_valid(center, radius) + 1;
}

// The rule for the maximum, with `left` before `right` in row-major order: the first maximum
// wins, and where there is NaN, the last NaN. It is associative, so windows may be combined from
// parts as long as the order of the parts is kept.
// Works for numbers and, lane by lane, for vectors of them.
template <typename T>
METAPOOL_INLINE constexpr auto right_wins(T left, T right) {
  return (right > left) | (right != right);
}

}  // namespace metapool
