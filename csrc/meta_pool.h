// The native contract: plain structs in, no framework. Callers validate what memory safety needs
// and allocate every output.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace metapool {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

// A (N, C, H, W) map. Strides count elements and may be anything, also 0 for what is only read.
struct MapView {
  const void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

// Whether two maps of one size are the same elements in the same order. That they begin at the same
// address is not enough: one may be the transpose of the other.
inline bool same_map(const MapView& a, const MapView& b) {
  return a.data == b.data && a.stride_n == b.stride_n && a.stride_c == b.stride_c &&
         a.stride_h == b.stride_h && a.stride_w == b.stride_w;
}

struct MutableMapView {
  void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

// Weights over (N, C, K) in the accumulation dtype: double for kFloat64, float otherwise.
// A stride of 0 broadcasts.
struct WeightView {
  const void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_k = 0;
};

// What becomes of the poolings: their weighted sum, all of them side by side, or their moments,
// which normalising takes.
enum class Form : int { kMix, kStack, kMoments };

struct Problem {
  Form form = Form::kMix;
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t stride_h = 1, stride_w = 1;
  bool count_include_pad = true;
  DType dtype = DType::kFloat32;    // of every map
  std::vector<int64_t> candidates;  // codes, see window.h; K of them
};

// kMix: out = constants + sum_k weights_k * P_k(values); the maxima are picked by x. `values` may
// be x itself. Without data the constants, (N, C), are zero.
//
// kStack: P_k(values) for each k, `out` being the first of K maps that lie `out_stride_k` elements
// apart. There are no weights.
//
// kMoments: of each plane of P_k(x) the mean and the sum of squared deviations from it, dense
// (n, c, K, 2); or, where there is an `other` map of the size of out, its sum and that of its
// products with P_k(x) - shifts_k. There are neither weights nor out, and `values` is x.
struct ForwardArgs {
  MapView x, values;
  WeightView weights;
  MutableMapView out;
  int64_t out_stride_k = 0;
  WeightView constants;
  MapView other;
  WeightView shifts;
  double* moments = nullptr;
};

// Gradients of <grad_out, forward> for `values` and `weights`. A null data pointer in grad_x or
// grad_weights says that it is not wanted. grad_weights is dense (n or 1, c or 1, K): broadcast
// axes are summed over. Outputs must not overlap inputs. In kStack grad_out is the first of K maps,
// and there are no weights and no gradient of them. In kMoments, where `values` is x and only
// grad_x is computed, candidate k is sent weights_k * grad_out + offsets_k + slopes_k * (P_k(x) -
// shifts_k).
struct BackwardArgs {
  MapView grad_out, x, values;
  WeightView weights;
  MutableMapView grad_x;
  void* grad_weights = nullptr;
  bool grad_weights_per_n = false, grad_weights_per_c = false;
  int64_t grad_out_stride_k = 0;
  WeightView offsets, slopes, shifts;
};

// Runs body(begin, end) over parts of [0, count), in any order and on any threads; no part but
// the last may be shorter than `grain`.
using RangeBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const RangeBody& body)>;

// Both throw std::invalid_argument before anything is written. They give the same bits whatever
// `parallel_for` does and whichever instruction set is chosen.
void meta_pool_fwd(const Problem& problem, const ForwardArgs& args,
                   const ParallelFor& parallel_for);
void meta_pool_bwd(const Problem& problem, const BackwardArgs& args,
                   const ParallelFor& parallel_for);

// Instruction sets that were built in and that this machine has, slowest first, and the one in
// use: the last of them, or the one that the environment variable METAPOOL_ISA names.
std::vector<std::string> isa_names();
std::string active_isa();

}  // namespace metapool
