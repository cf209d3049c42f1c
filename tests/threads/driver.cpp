// What ThreadSanitizer watches: the CPU kernels on several threads, and several calls at once on
// the same maps. All results have to be those of one thread, bit for bit. The kernels are here
// without torch and Python, which are not compiled for the sanitizer.
#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "../native_calls.h"

namespace {

using namespace metapool::calls;
using metapool::DType;
using metapool::ParallelFor;
using metapool::RangeBody;

const Setup kSetups[] = {
    {"many planes, streamed", 4, 48, 14, 14, DType::kFloat32, false, kSquares, true, true},
    {"the same, channels last, weights shared", 4, 48, 14, 14, DType::kBFloat16, true},
    {"a plane in strips", 1, 1, 130, 37},
    {"packed planes in strips, streamed", 1, 16, 120, 21, DType::kFloat32, false, kSquares, false,
     true},
    {"channels last in strips", 2, 3, 70, 30, DType::kFloat32, true, kSquares, true, true},
    {"a rest of planes, bfloat16", 5, 13, 3, 5, DType::kBFloat16},
    {"NaN sends streamed tasks to the others", 3, 30, 9, 8, DType::kFloat32, false, kSquares, false,
     true, 1, Data::kNan},
    {"NaN in strips of a plane", 1, 2, 90, 26, DType::kBFloat16, false, kSquares, true, true, 1,
     Data::kNan},
    {"float64, the largest windows", 2, 20, 13, 17, DType::kFloat64, false, kLargest, true, true},
    {"strips of windows at stride 2", 2, 40, 13, 17, DType::kFloat32, true, kStrips, false, true,
     2},
    {"a plane in strips at stride 2", 1, 1, 200, 33, DType::kFloat32, false, kStrips, false, false,
     2},
    {"other values than those that pick", 2, 20, 13, 9, DType::kFloat32, false, kSquares, true,
     true, 1, Data::kTies, true},
};

// All bytes that a forward and a backward write.
std::vector<char> run(const Inputs& inputs, const ParallelFor& parallel_for) {
  std::vector<char> all = forward(inputs, parallel_for);
  const std::vector<char> more = backward(inputs, parallel_for);
  all.insert(all.end(), more.begin(), more.end());
  return all;
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
  std::printf("other bits with %s: %s\n", how.c_str(), setup.why.c_str());
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
