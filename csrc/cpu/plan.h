// A problem taken apart for the CPU kernels, once per call: candidates grouped by kind and sorted
// so that each window extends the one before it, and the planes cut into tasks.
#pragma once

#include <cstdint>

#include "../meta_pool.h"
#include "../window.h"

namespace metapool::cpu {

// A plain array: standard containers would leave weak symbols compiled for the wrong
// instruction set behind.
template <typename T>
struct Span {
  const T* data = nullptr;
  int count = 0;
  METAPOOL_INLINE const T* begin() const { return data; }
  METAPOOL_INLINE const T* end() const { return data + count; }
};

// One of the distinct poolings. Candidates that name the same one share it; each has its weight.
struct PoolItem {
  int radius_h = 0, radius_w = 0;
  int index = -1;          // among all distinct poolings; -1 where it is not among the candidates
  int begin = 0, end = 0;  // the positions in Plan::order of its candidates that have a weight
};

// Planes (one channel of one image each) that a kernel handles side by side; 1 puts the vector
// lanes along a row instead.
constexpr int kPackedLanes = 16;

struct Plan {
  Form form;
  int64_t n, c, h, w, h_out, w_out, stride_h, stride_w;
  bool count_include_pad;
  DType dtype;
  Span<int> pools;  // for each candidate the index of its pooling
  Span<int> order;  // all candidates, those of one pooling together
  int num_pools;    // distinct ones
  PoolItem skip, none;
  Span<PoolItem> avg, max;  // by radius_w, then radius_h
  Span<int> max_widths;     // the distinct radius_w of `max`, ascending
  int radius_h, radius_w;   // the largest
  bool separate_values;     // the maxima are picked by another map than the one that is pooled

  int lanes;       // 1 or kPackedLanes
  int share_rows;  // of the gradient of the weights that a task writes: one in all or one per lane
  int64_t groups;  // of `lanes` planes
  int64_t strips;  // of rows, so that few planes still make enough tasks
};

// Whether candidate k is the first that names its pooling.
METAPOOL_INLINE bool is_first(const Plan& plan, int k) {
  for (int other = 0; other < k; ++other) {
    if (plan.pools.data[other] == plan.pools.data[k]) return false;
  }
  return true;
}

// One task: planes [plane, plane + lanes) and the rows [row_begin, row_end), which are output
// rows in a forward and input rows in a backward. Strips begin at even rows, so that rows pair up
// in the same way however a plane is cut.
struct Task {
  int64_t plane;
  int lanes;
  int64_t row_begin, row_end;
};

METAPOOL_INLINE int64_t strip_begin(const Plan& plan, int64_t rows, int64_t strip) {
  return strip == plan.strips ? rows : rows * strip / plan.strips / 2 * 2;
}

METAPOOL_INLINE Task task_at(const Plan& plan, int64_t rows, int64_t index) {
  const int64_t plane = index / plan.strips * plan.lanes, strip = index % plan.strips;
  const int64_t left = plan.n * plan.c - plane;
  return {plane, left < plan.lanes ? static_cast<int>(left) : plan.lanes,
          strip_begin(plan, rows, strip), strip_begin(plan, rows, strip + 1)};
}

// The kernels as one instruction set compiled them: each runs tasks [begin, end) in a workspace
// that is aligned to 64 bytes and as large as the *_bytes say.
struct Kernels {
  int64_t (*forward_bytes)(const Plan&, const ForwardArgs&);
  // moments: [tasks][lanes][num_pools][2], each task's mean and sum of squared deviations; null but
  // for Form::kMoments.
  void (*forward)(const Plan&, const ForwardArgs&, int64_t begin, int64_t end, char* workspace,
                  double* moments);
  int64_t (*backward_bytes)(const Plan&, const BackwardArgs&);
  // shares: [tasks][share_rows][num_pools] in the accumulation type, each task's part of the
  // gradient of the weights; null where that is not wanted.
  void (*backward)(const Plan&, const BackwardArgs&, int64_t begin, int64_t end, char* workspace,
                   void* shares);
};

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

// Slowest first; each is defined by its isa_*.cpp.
extern const Isa kIsaBaseline;
#if defined(METAPOOL_HAS_AVX2)
extern const Isa kIsaAvx2;
#endif
#if defined(METAPOOL_HAS_AVX512)
extern const Isa kIsaAvx512;
#endif

}  // namespace metapool::cpu
