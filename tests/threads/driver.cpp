// What ThreadSanitizer watches: the CPU kernels on several threads, and several calls at once on
// the same maps. All results have to be those of one thread, bit for bit. The kernels are here
// without torch and Python, which are not compiled for the sanitizer.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/meta_pool.h"

namespace {

using metapool::DType;
using metapool::ParallelFor;
using metapool::RangeBody;

constexpr int64_t code(int kind, int kh, int kw) { return kind << 8 | kh << 4 | kw; }
constexpr int64_t avg(int kh, int kw) { return code(2, kh, kw); }
constexpr int64_t max(int kh, int kw) { return code(3, kh, kw); }
constexpr int64_t kSkip = code(1, 1, 1), kNone = code(0, 1, 1);

using Candidates = std::vector<int64_t>;
const Candidates kSquares = {kSkip,     max(3, 3), max(5, 5), max(7, 7),
                             avg(3, 3), avg(5, 5), avg(7, 7)};
const Candidates kStrips = {avg(1, 7), avg(7, 1), max(1, 7), max(7, 1), kNone};
const Candidates kLargest = {max(15, 15), avg(15, 15), max(15, 15)};

struct Setup {
  const char* why;
  int64_t n, c, h, w;
  DType dtype = DType::kFloat32;
  bool channels_last = false;
  Candidates candidates = kSquares;
  bool weights_per_n = false, weights_per_c = false;
  int64_t stride = 1;
  bool has_nan = false, has_values = false;
};

const Setup kSetups[] = {
    {"many planes, streamed", 4, 48, 14, 14, DType::kFloat32, false, kSquares, true, true},
    {"the same, channels last, weights shared", 4, 48, 14, 14, DType::kBFloat16, true},
    {"a plane in strips", 1, 1, 130, 37},
    {"packed planes in strips, streamed", 1, 16, 120, 21, DType::kFloat32, false, kSquares, false,
     true},
    {"channels last in strips", 2, 3, 70, 30, DType::kFloat32, true, kSquares, true, true},
    {"a rest of planes, bfloat16", 5, 13, 3, 5, DType::kBFloat16},
    {"NaN sends streamed tasks to the others", 3, 30, 9, 8, DType::kFloat32, false, kSquares, false,
     true, 1, true},
    {"NaN in strips of a plane", 1, 2, 90, 26, DType::kBFloat16, false, kSquares, true, true, 1,
     true},
    {"float64, the largest windows", 2, 20, 13, 17, DType::kFloat64, false, kLargest, true, true},
    {"strips of windows at stride 2", 2, 40, 13, 17, DType::kFloat32, true, kStrips, false, true,
     2},
    {"a plane in strips at stride 2", 1, 1, 200, 33, DType::kFloat32, false, kStrips, false, false,
     2},
    {"other values than those that pick", 2, 20, 13, 9, DType::kFloat32, false, kSquares, true,
     true, 1, false, true},
};

// Numbers that repeat from run to run, many of them equal as after ReLU6.
class Noise {
 public:
  explicit Noise(uint64_t seed) : state_(seed) {}
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int>(state_ >> 58) - 32) / 16;
  }

 private:
  uint64_t state_;
};

int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

void write(float value, DType dtype, char* to) {
  const double wide = value;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t upper = static_cast<uint16_t>(bits >> 16);  // all of a bfloat16
  const void* const from = dtype == DType::kFloat64   ? static_cast<const void*>(&wide)
                           : dtype == DType::kFloat32 ? static_cast<const void*>(&value)
                                                      : static_cast<const void*>(&upper);
  std::memcpy(to, from, element_bytes(dtype));
}

// A dense map. Before a kernel writes it, all bits are ones: NaN in every dtype.
struct Map {
  Map(const Setup& setup, int64_t h, int64_t w)
      : bytes(setup.n * setup.c * h * w * element_bytes(setup.dtype), '\xff') {
    const int64_t c = setup.c;
    strides[0] = c * h * w;
    strides[1] = setup.channels_last ? 1 : h * w;
    strides[2] = setup.channels_last ? w * c : w;
    strides[3] = setup.channels_last ? c : 1;
  }

  void fill(Noise& noise, const Setup& setup) {
    const int64_t step = element_bytes(setup.dtype);
    for (size_t at = 0; at < bytes.size(); at += step) {
      const float value = noise.next();
      write(setup.has_nan && at / step % 41 == 7 ? std::nanf("") : value, setup.dtype, &bytes[at]);
    }
  }

  metapool::MapView view() const {
    return {bytes.data(), strides[0], strides[1], strides[2], strides[3]};
  }
  metapool::MutableMapView view() {
    return {bytes.data(), strides[0], strides[1], strides[2], strides[3]};
  }

  std::vector<char> bytes;
  int64_t strides[4];
};

// A call's arguments, which every thread reads.
struct Inputs {
  explicit Inputs(const Setup& s)
      : setup(s),
        h_out((s.h - 1) / s.stride + 1),
        w_out((s.w - 1) / s.stride + 1),
        x(s, s.h, s.w),
        values(s, s.h, s.w),
        grad_out(s, h_out, w_out) {
    Noise noise(static_cast<uint64_t>(s.h * 1000 + s.w));
    for (Map* map : {&x, &values, &grad_out}) map->fill(noise, s);
    problem.n = s.n;
    problem.c = s.c;
    problem.h = s.h;
    problem.w = s.w;
    problem.stride_h = problem.stride_w = s.stride;
    problem.dtype = s.dtype;
    problem.candidates = s.candidates;
    const int64_t k = static_cast<int64_t>(s.candidates.size());
    const int64_t per_c = s.weights_per_c ? s.c : 1, per_n = s.weights_per_n ? s.n : 1;
    const DType wide = s.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    weights.resize(per_n * per_c * k * element_bytes(wide));
    for (size_t at = 0; at < weights.size(); at += element_bytes(wide)) {
      write(noise.next(), wide, &weights[at]);
    }
    weight_view = {weights.data(), per_n > 1 ? per_c * k : 0, per_c > 1 ? k : 0, 1};
  }
  Inputs(const Inputs&) = delete;

  const Setup& setup;
  const int64_t h_out, w_out;
  metapool::Problem problem;
  Map x, values, grad_out;
  std::vector<char> weights;
  metapool::WeightView weight_view;
};

// All bytes that a forward and a backward write.
std::vector<char> run(const Inputs& inputs, const ParallelFor& parallel_for) {
  const Setup& setup = inputs.setup;
  const metapool::MapView x = inputs.x.view();
  const metapool::MapView values = setup.has_values ? inputs.values.view() : x;
  Map out(setup, inputs.h_out, inputs.w_out), grad_x(setup, setup.h, setup.w);
  metapool::meta_pool_fwd(inputs.problem, {x, values, inputs.weight_view, out.view()},
                          parallel_for);
  std::vector<char> grad_weights(inputs.weights.size(), '\xff');
  metapool::meta_pool_bwd(inputs.problem,
                          {inputs.grad_out.view(), x, values, inputs.weight_view, grad_x.view(),
                           grad_weights.data(), setup.weights_per_n, setup.weights_per_c},
                          parallel_for);
  std::vector<char> all = std::move(out.bytes);
  all.insert(all.end(), grad_x.bytes.begin(), grad_x.bytes.end());
  all.insert(all.end(), grad_weights.begin(), grad_weights.end());
  return all;
}

void on_this_thread(int64_t count, int64_t, const RangeBody& body) {
  if (count > 0) body(0, count);
}

// Neighbouring tasks on different threads, each task a part of its own whatever the grain is, so
// that small maps are cut as large ones would be. Nothing orders the threads between start and
// end: a lock or a queue here would hide a race in the kernels.
ParallelFor on_threads(int threads) {
  return [threads](int64_t count, int64_t, const RangeBody& body) {
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([=, &body] {
        for (int64_t i = t; i < count; i += threads) body(i, i + 1);
      });
    }
    for (std::thread& worker : workers) worker.join();
  };
}

// Results of that many calls at once, each cut by `parallel_for`.
std::vector<std::vector<char>> at_once(const Inputs& inputs, int calls,
                                       const ParallelFor& parallel_for) {
  std::vector<std::vector<char>> results(calls);
  std::vector<std::thread> callers;
  std::atomic<int> missing{calls};
  for (int i = 0; i < calls; ++i) {
    callers.emplace_back([&, i] {
      --missing;
      while (missing > 0) std::this_thread::yield();
      results[i] = run(inputs, parallel_for);
    });
  }
  for (std::thread& caller : callers) caller.join();
  return results;
}

int failures = 0;

void expect_equal(const std::vector<char>& got, const std::vector<char>& expected,
                  const Setup& setup, const std::string& how) {
  if (got == expected) return;
  std::printf("other bits with %s: %s\n", how.c_str(), setup.why);
  ++failures;
}

void check(const Setup& setup) {
  const Inputs inputs(setup);
  const std::vector<char> expected = run(inputs, on_this_thread);
  for (const int threads : {2, 3, 8}) {
    expect_equal(run(inputs, on_threads(threads)), expected, setup,
                 std::to_string(threads) + " threads");
  }
  for (const std::vector<char>& got : at_once(inputs, 3, on_threads(2))) {
    expect_equal(got, expected, setup, "calls at once");
  }
}

}  // namespace

int main() {
  // Nothing has asked for an instruction set so far: these calls choose it, all at once.
  const Inputs first(kSetups[0]);
  const std::vector<std::vector<char>> results = at_once(first, 8, on_this_thread);
  for (const std::vector<char>& got : results) {
    expect_equal(got, results[0], kSetups[0], "first calls");
  }
  for (const Setup& setup : kSetups) check(setup);
  std::printf("%s: %zu problems, %d failures\n", metapool::active_isa().c_str(),
              sizeof(kSetups) / sizeof(*kSetups), failures);
  return failures == 0 ? 0 : 1;
}
