// Calls of the CPU kernels without torch and Python, for programs that these cannot be linked into:
// maps that repeat from run to run, and all that a forward and a backward write.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../csrc/meta_pool.h"

namespace metapool::calls {

constexpr int64_t code(int kind, int kh, int kw) { return kind << 8 | kh << 4 | kw; }
constexpr int64_t avg(int kh, int kw) { return code(2, kh, kw); }
constexpr int64_t max(int kh, int kw) { return code(3, kh, kw); }
constexpr int64_t kSkip = code(1, 1, 1), kNone = code(0, 1, 1);

using Candidates = std::vector<int64_t>;
inline const Candidates kSquares = {kSkip,     max(3, 3), max(5, 5), max(7, 7),
                                    avg(3, 3), avg(5, 5), avg(7, 7)};
inline const Candidates kStrips = {avg(1, 7), avg(7, 1), max(1, 7), max(7, 1), kNone};
inline const Candidates kLargest = {max(15, 15), avg(15, 15), max(15, 15)};

// What maps hold: few numbers, many of them equal as after ReLU6; the same and some NaN; the same
// and infinities, NaN and zeros of both signs; numbers that use all bits of a float.
enum class Data { kTies, kNan, kSpecial, kFine };

struct Setup {
  std::string why;
  int64_t n = 1, c = 1, h = 1, w = 1;
  DType dtype = DType::kFloat32;
  bool channels_last = false;
  Candidates candidates = kSquares;
  bool weights_per_n = false, weights_per_c = false;
  int64_t stride = 1;
  Data data = Data::kTies;
  bool has_values = false;
  Form form = Form::kMix;
  int64_t column_step = 1;  // where columns are not channels: more than 1 leaves elements out
  bool count_include_pad = true;
};

// Numbers that repeat from run to run.
class Noise {
 public:
  explicit Noise(uint64_t seed) : state_(seed) {}
  float next(Data data = Data::kTies) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    const int place = static_cast<int>(state_ >> 40 & 63);
    if (data == Data::kFine)
      return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-29f;
    if (data != Data::kTies && place == 7) return std::nanf("");
    if (data == Data::kSpecial && place == 8) return HUGE_VALF;
    if (data == Data::kSpecial && place <= 11 && place >= 9) return -HUGE_VALF;
    if (data == Data::kSpecial && place >= 48) return place % 2 == 0 ? 0.f : -0.f;
    return static_cast<float>(static_cast<int>(state_ >> 58) - 32) / 16;
  }

 private:
  uint64_t state_;
};

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
inline DType weight_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// The bits of a float16, cut off below its smallest normal number and behind its last digit.
inline uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (value != value) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  return static_cast<uint16_t>(rest < 0x38800000u ? sign : sign | (rest - 0x38000000u) >> 13);
}

inline void write(float value, DType dtype, char* to) {
  const double wide = value;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t half =
      dtype == DType::kFloat16 ? half_bits(value) : static_cast<uint16_t>(bits >> 16);
  const void* const from = dtype == DType::kFloat64   ? static_cast<const void*>(&wide)
                           : dtype == DType::kFloat32 ? static_cast<const void*>(&value)
                                                      : static_cast<const void*>(&half);
  std::memcpy(to, from, element_bytes(dtype));
}

// As many maps behind each other as asked for. Before a kernel writes them, all bits are ones: NaN
// in every dtype.
struct Maps {
  Maps(const Setup& s, int64_t h, int64_t w, int64_t count = 1) : data_(s.data), dtype_(s.dtype) {
    const int64_t columns = s.channels_last ? s.c : s.column_step;
    strides[0] = s.c * h * w * (s.channels_last ? 1 : s.column_step);
    strides[1] = s.channels_last ? 1 : h * w * columns;
    strides[2] = w * columns;
    strides[3] = columns;
    each = s.n * strides[0];
    bytes.assign(count * each * element_bytes(dtype_), '\xff');
  }

  void fill(Noise& noise) {
    const int64_t step = element_bytes(dtype_);
    for (size_t at = 0; at < bytes.size(); at += step) write(noise.next(data_), dtype_, &bytes[at]);
  }

  MapView view() const { return {bytes.data(), strides[0], strides[1], strides[2], strides[3]}; }
  MutableMapView view() { return {bytes.data(), strides[0], strides[1], strides[2], strides[3]}; }

  std::vector<char> bytes;
  int64_t strides[4];
  int64_t each;  // elements from map to map

 private:
  Data data_;
  DType dtype_;
};

// A call's arguments, which every thread may read.
struct Inputs {
  explicit Inputs(const Setup& s)
      : setup(s),
        h_out((s.h - 1) / s.stride + 1),
        w_out((s.w - 1) / s.stride + 1),
        x(s, s.h, s.w),
        values(s, s.h, s.w),
        grad_out(s, h_out, w_out, maps_out()) {
    Noise noise(static_cast<uint64_t>(s.h * 1000 + s.w));
    for (Maps* maps : {&x, &values, &grad_out}) maps->fill(noise);
    problem.form = s.form;
    problem.n = s.n;
    problem.c = s.c;
    problem.h = s.h;
    problem.w = s.w;
    problem.stride_h = problem.stride_w = s.stride;
    problem.count_include_pad = s.count_include_pad;
    problem.dtype = s.dtype;
    problem.candidates = s.candidates;
    for (std::vector<char>* numbers : {&weights, &offsets, &slopes, &shifts}) {
      numbers->resize(per_n() * per_c() * candidates() * weight_bytes());
      for (size_t at = 0; at < numbers->size(); at += weight_bytes()) {
        write(noise.next(), weight_dtype(s.dtype), &(*numbers)[at]);
      }
    }
  }
  Inputs(const Inputs&) = delete;

  int64_t candidates() const { return static_cast<int64_t>(setup.candidates.size()); }
  int64_t maps_out() const { return setup.form == Form::kStack ? candidates() : 1; }
  int64_t weight_bytes() const { return element_bytes(weight_dtype(setup.dtype)); }
  WeightView view(const std::vector<char>& numbers) const {
    return {numbers.data(), per_n() > 1 ? per_c() * candidates() : 0,
            per_c() > 1 ? candidates() : 0, 1};
  }

  const Setup& setup;
  const int64_t h_out, w_out;
  Problem problem;
  Maps x, values, grad_out;
  std::vector<char> weights, offsets, slopes, shifts;

 private:
  int64_t per_n() const { return setup.weights_per_n ? setup.n : 1; }
  int64_t per_c() const { return setup.weights_per_c ? setup.c : 1; }
};

inline void on_this_thread(int64_t count, int64_t, const RangeBody& body) {
  if (count > 0) body(0, count);
}

// What a forward writes: a map for each candidate where they stay apart; of moments those of planes
// and those with another map.
inline std::vector<char> forward(const Inputs& inputs,
                                 const ParallelFor& parallel_for = on_this_thread) {
  const Setup& setup = inputs.setup;
  const MapView x = inputs.x.view();
  ForwardArgs args;
  args.x = x;
  args.values = setup.has_values ? inputs.values.view() : x;
  if (setup.form == Form::kMoments) {
    const int64_t size = setup.n * setup.c * inputs.candidates() * 2;
    std::vector<double> moments(2 * size, std::nan(""));
    args.moments = moments.data();
    meta_pool_fwd(inputs.problem, args, parallel_for);
    args.moments += size;
    args.other = inputs.grad_out.view();
    args.shifts = inputs.view(inputs.shifts);
    meta_pool_fwd(inputs.problem, args, parallel_for);
    const char* const from = reinterpret_cast<const char*>(moments.data());
    return {from, from + moments.size() * sizeof(double)};
  }
  Maps out(setup, inputs.h_out, inputs.w_out, inputs.maps_out());
  if (setup.form == Form::kMix) args.weights = inputs.view(inputs.weights);
  args.out = out.view();
  args.out_stride_k = out.each;
  meta_pool_fwd(inputs.problem, args, parallel_for);
  return std::move(out.bytes);
}

// What a backward writes: the gradient of x and, where candidates are mixed, that of the weights.
inline std::vector<char> backward(const Inputs& inputs,
                                  const ParallelFor& parallel_for = on_this_thread) {
  const Setup& setup = inputs.setup;
  const MapView x = inputs.x.view();
  BackwardArgs args;
  args.grad_out = inputs.grad_out.view();
  args.x = x;
  args.values = setup.has_values ? inputs.values.view() : x;
  Maps grad_x(setup, setup.h, setup.w);
  std::vector<char> grad_weights;
  args.grad_x = grad_x.view();
  args.grad_out_stride_k = inputs.grad_out.each;
  if (setup.form != Form::kStack) args.weights = inputs.view(inputs.weights);
  if (setup.form == Form::kMix) {
    grad_weights.assign(inputs.weights.size(), '\xff');
    args.grad_weights = grad_weights.data();
    args.grad_weights_per_n = setup.weights_per_n;
    args.grad_weights_per_c = setup.weights_per_c;
  } else if (setup.form == Form::kMoments) {
    args.offsets = inputs.view(inputs.offsets);
    args.slopes = inputs.view(inputs.slopes);
    args.shifts = inputs.view(inputs.shifts);
  }
  meta_pool_bwd(inputs.problem, args, parallel_for);
  std::vector<char> all = std::move(grad_x.bytes);
  all.insert(all.end(), grad_weights.begin(), grad_weights.end());
  return all;
}

}  // namespace metapool::calls
