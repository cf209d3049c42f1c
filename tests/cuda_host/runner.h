// Runs a grid: every CUDA thread is a fibre that is resumed until its next barrier, and blocks run
// one after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fibre.h"
#include "vocabulary.h"

namespace cuda_host {

constexpr int64_t kSharedMost = 227 * 1024;
constexpr int64_t kGuard = 16 * 1024;  // bytes beyond a block's shared memory that are looked at
constexpr int64_t kSharedArray = kSharedMost + kGuard;
constexpr unsigned char kGuardByte = 0xa5;

}  // namespace cuda_host

namespace metapool::cuda {
// What `extern __shared__` inside a function of this namespace refers to.
alignas(16) inline thread_local unsigned char shared_memory[cuda_host::kSharedArray];
}  // namespace metapool::cuda

namespace cuda_host {

// Where a barrier was written. Two calls in one line look the same.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

struct Thread {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  bool ended = false;
  Site site{"", 0};
  int value = 0;  // what it hands to __syncthreads_or
};

// The block's shared memory: NaN at first, and guarded beyond the bytes that were asked for.
class SharedMemory {
 public:
  explicit SharedMemory(int64_t bytes) : end_(metapool::cuda::shared_memory + bytes) {
    protect(false);
    std::memset(metapool::cuda::shared_memory, 0xff, bytes);
    std::memset(end_, kGuardByte, kGuard);
    protect(true);
  }
  ~SharedMemory() { protect(false); }
  SharedMemory(const SharedMemory&) = delete;

  // How many bytes beyond the end something was written, or -1.
  int64_t written_beyond() {
    protect(false);
    if (*end_ == kGuardByte && std::memcmp(end_, end_ + 1, kGuard - 1) == 0) return -1;
    return std::find_if(end_, end_ + kGuard, [](int byte) { return byte != kGuardByte; }) - end_;
  }

 private:
  void protect([[maybe_unused]] bool on) {
#ifdef __SANITIZE_ADDRESS__
    auto& all = metapool::cuda::shared_memory;
    __asan_unpoison_memory_region(all, sizeof all);
    if (on) __asan_poison_memory_region(end_, all + sizeof all - end_);
#endif
  }

  unsigned char* end_;
};

// Runs one launch at a time. What a failed launch left of its fibres is dropped by the next one.
class Runner {
 public:
  using Body = std::function<void()>;

  void run(const char* kernel, unsigned grid, unsigned block, int64_t shared, const Body& body);
  int wait(Site site, int value);

  std::mutex mutex;
  std::map<const void*, int64_t> shared_asked;  // by kernel

 private:
  void start_over(unsigned block);
  bool run_to_barrier();
  void resume(unsigned index);
  void check_barrier();
  static void fibre();
  void enter_fibre(void* fake_stack);
  void leave_fibre(void** fake_stack);
  [[noreturn]] void fail(const std::string& what) const;

  const char* kernel_ = "";
  const Body* body_ = nullptr;
  std::string order_name_;
  std::minstd_rand random_;
  std::vector<unsigned> order_;
  std::vector<Thread> threads_ = std::vector<Thread>(1024);
  std::vector<char*> free_stacks_;
  size_t stacks_ = 0;
  Thread* current_ = nullptr;
  Context launcher_;
  const void* launcher_stack_ = nullptr;
  size_t launcher_size_ = 0;
  std::exception_ptr error_;
  int any_ = 0;
};

inline Runner runner;

// Bytes of shared memory that a block may ask for: those of Hopper, or METAPOOL_HOST_SHARED of
// them.
inline int64_t shared_most() {
  const char* bytes = std::getenv("METAPOOL_HOST_SHARED");
  return bytes == nullptr ? kSharedMost : std::stoll(bytes);
}

inline void Runner::run(const char* kernel, unsigned grid, unsigned block, int64_t shared,
                        const Body& body) {
  const char* order = std::getenv("METAPOOL_HOST_ORDER");
  order_name_ = order ? order : "forward";
  if (order_name_ != "forward" && order_name_ != "reversed" && order_name_ != "random") {
    throw std::runtime_error("METAPOOL_HOST_ORDER is neither forward, reversed nor random");
  }
  kernel_ = kernel;
  body_ = &body;
  random_.seed(1);
  blockDim.x = block;
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x != grid; ++blockIdx.x) {
    SharedMemory memory(shared);
    start_over(block);
    while (run_to_barrier()) {
    }
    const int64_t beyond = memory.written_beyond();
    if (beyond >= 0) {
      fail("wrote " + std::to_string(beyond) + " bytes beyond its shared memory of " +
           std::to_string(shared));
    }
  }
}

inline void Runner::start_over(unsigned block) {
  for (Thread& thread : threads_) {
    thread.ended = false;
    if (!thread.stack) continue;
    forget_variables(thread.stack, kStack);
    free_stacks_.push_back(std::exchange(thread.stack, nullptr));
  }
  order_.resize(block);
  std::iota(order_.begin(), order_.end(), 0u);
  if (order_name_ == "reversed") std::reverse(order_.begin(), order_.end());
}

// Whether there is anything left to run.
inline bool Runner::run_to_barrier() {
  if (order_name_ == "random") std::shuffle(order_.begin(), order_.end(), random_);
  for (unsigned index : order_) resume(index);
  check_barrier();
  return !threads_[0].ended;
}

inline void Runner::resume(unsigned index) {
  Thread& thread = threads_[index];
  // A thread has a stack from its start to its end: without barriers all of them share one.
  if (!thread.stack) {
    if (free_stacks_.empty()) free_stacks_.push_back(new_stack(stacks_++));
    thread.stack = free_stacks_.back();
    free_stacks_.pop_back();
    forget_variables(thread.stack, kPage);  // those of fibre(), which never returns
    make_context(thread.context, thread.stack, fibre);
  }
  current_ = &thread;
  threadIdx.x = index;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack, kStack);
#endif
  switch_context(&launcher_, &thread.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  if (thread.ended) free_stacks_.push_back(std::exchange(thread.stack, nullptr));
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

inline void Runner::check_barrier() {
  const auto where = [this](unsigned index) {
    const Thread& thread = threads_[index];
    const std::string at = std::string(thread.site.file) + ":" + std::to_string(thread.site.line);
    return "thread " + std::to_string(index) + (thread.ended ? " returned" : " waits at " + at);
  };
  any_ = 0;
  for (unsigned index = 0; index != order_.size(); ++index) {
    const Thread &first = threads_[0], &thread = threads_[index];
    any_ |= thread.value != 0;
    if (thread.ended != first.ended || (!thread.ended && !(thread.site == first.site))) {
      fail("divergent barrier: " + where(0) + ", " + where(index));
    }
  }
}

// A fibre's whole life.
inline void Runner::fibre() {
  runner.enter_fibre(nullptr);
  try {
    (*runner.body_)();
  } catch (...) {
    runner.error_ = std::current_exception();
  }
  runner.current_->ended = true;
  runner.leave_fibre(nullptr);
  __builtin_unreachable();
}

inline int Runner::wait(Site site, int value) {
  Thread& thread = *current_;
  thread.site = site;
  thread.value = value;
  leave_fibre(&thread.fake_stack);
  enter_fibre(thread.fake_stack);
  return any_;
}

inline void Runner::enter_fibre([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &launcher_stack_, &launcher_size_);
#endif
}

// Back to the launcher. No place for a fake stack means for good.
inline void Runner::leave_fibre([[maybe_unused]] void** fake_stack) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, launcher_stack_, launcher_size_);
#endif
  switch_context(&current_->context, &launcher_);
}

inline void Runner::fail(const std::string& what) const {
  throw std::runtime_error(std::string("kernel ") + kernel_ + ", block " +
                           std::to_string(blockIdx.x) + ": " + what);
}

}  // namespace cuda_host
