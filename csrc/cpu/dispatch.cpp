// Checks a problem, plans it, picks the instruction set, and cuts the work into tasks whose number
// and order of summation depend on the problem alone, never on the threads.
#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "plan.h"

namespace metapool {

namespace {

using cpu::Isa;
using cpu::kPackedLanes;
using cpu::Plan;
using cpu::PoolItem;
using cpu::Task;

// Below this width a row leaves most vector lanes empty, and planes are packed side by side.
constexpr int64_t kNarrowWidth = 24;
// Fewer tasks than this and the planes are cut into strips of rows.
constexpr int64_t kWantedTasks = 16;
// Elements of work below which another thread costs more than it brings.
constexpr int64_t kGrainElements = 32768;

std::vector<const Isa*> usable_isas() {
  std::vector<const Isa*> usable;
  for (const Isa* isa : {
           &cpu::kIsaBaseline,
#if defined(METAPOOL_HAS_AVX2)
           &cpu::kIsaAvx2,
#endif
#if defined(METAPOOL_HAS_AVX512)
           &cpu::kIsaAvx512,
#endif
       }) {
    if (isa->supported()) usable.push_back(isa);
  }
  return usable;
}

const Isa* choose_isa() {
  const std::vector<const Isa*> usable = usable_isas();
  const char* const forced = std::getenv("METAPOOL_ISA");
  if (forced == nullptr || *forced == '\0') return usable.back();
  std::string message = "METAPOOL_ISA should be one of";
  for (const Isa* isa : usable) {
    if (isa->name == std::string(forced)) return isa;
    message += std::string(" '") + isa->name + "'";
  }
  throw std::invalid_argument(message + " on this machine, got '" + forced + "'");
}

const Isa& chosen_isa() {
  static const Isa* const chosen = choose_isa();  // tried again at the next call where it throws
  return *chosen;
}

void check(const Problem& problem) {
  const auto require = [](bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
  };
  require(problem.n >= 0 && problem.c > 0 && problem.h > 0 && problem.w > 0,
          "x should have non-zero channels, height and width");
  require(problem.stride_h > 0 && problem.stride_w > 0, "stride should be positive");
  require(!problem.candidates.empty(), "candidates is empty");
  for (const int64_t code : problem.candidates) {
    require(is_candidate_code(code), "unknown candidate code");
    require(decode_candidate(code).kind != Kind::kSkip ||
                (problem.stride_h == 1 && problem.stride_w == 1),
            "skip_connect needs stride 1");
  }
}

// A plan and the arrays that it points into.
struct OwnedPlan {
  Plan plan{};
  std::vector<int> skips, nones, max_widths;
  std::vector<PoolItem> avg, max;

  OwnedPlan(const Problem& problem, const MapView& x, int64_t rows);
  OwnedPlan(const OwnedPlan&) = delete;

 private:
  void group_candidates(const std::vector<int64_t>& codes);
  void cut(const MapView& x, int64_t rows);
};

template <typename T>
cpu::Span<T> span(const std::vector<T>& items) {
  return {items.data(), static_cast<int>(items.size())};
}

OwnedPlan::OwnedPlan(const Problem& problem, const MapView& x, int64_t rows) {
  plan.n = problem.n;
  plan.c = problem.c;
  plan.h = problem.h;
  plan.w = problem.w;
  // From the size of the map on, every stride means one window at the first pixel. Rows are laid
  // out by the stride, so it may not grow beyond that.
  plan.stride_h = std::min(problem.stride_h, problem.h);
  plan.stride_w = std::min(problem.stride_w, problem.w);
  plan.h_out = output_size(problem.h, problem.stride_h);
  plan.w_out = output_size(problem.w, problem.stride_w);
  plan.count_include_pad = problem.count_include_pad;
  plan.dtype = problem.dtype;
  group_candidates(problem.candidates);
  cut(x, rows);
}

void OwnedPlan::group_candidates(const std::vector<int64_t>& codes) {
  for (int k = 0; k < static_cast<int>(codes.size()); ++k) {
    const Window window = decode_candidate(codes[k]);
    const PoolItem item{window.radius_h, window.radius_w, k};
    if (window.kind == Kind::kNone) nones.push_back(k);
    if (window.kind == Kind::kSkip) skips.push_back(k);
    if (window.kind == Kind::kAvg) avg.push_back(item);
    if (window.kind == Kind::kMax) max.push_back(item);
    if (window.kind == Kind::kAvg || window.kind == Kind::kMax) {
      plan.radius_h = std::max(plan.radius_h, window.radius_h);
      plan.radius_w = std::max(plan.radius_w, window.radius_w);
    }
  }
  std::stable_sort(avg.begin(), avg.end(), [](const PoolItem& a, const PoolItem& b) {
    return a.radius_h != b.radius_h ? a.radius_h < b.radius_h : a.radius_w < b.radius_w;
  });
  std::stable_sort(max.begin(), max.end(), [](const PoolItem& a, const PoolItem& b) {
    return a.radius_w != b.radius_w ? a.radius_w < b.radius_w : a.radius_h < b.radius_h;
  });
  for (const PoolItem& item : max) {
    if (max_widths.empty() || max_widths.back() != item.radius_w)
      max_widths.push_back(item.radius_w);
  }
  plan.num_candidates = static_cast<int>(codes.size());
  plan.skips = span(skips);
  plan.nones = span(nones);
  plan.avg = span(avg);
  plan.max = span(max);
  plan.max_widths = span(max_widths);
}

void OwnedPlan::cut(const MapView& x, int64_t rows) {
  const int64_t planes = plan.n * plan.c;
  const bool channels_adjacent = x.stride_c == 1 && plan.c > 1 && x.stride_w != 1;
  plan.lanes = planes > 1 && (channels_adjacent || plan.w < kNarrowWidth) ? kPackedLanes : 1;
  plan.groups = (planes + plan.lanes - 1) / plan.lanes;
  // A strip computes the rows of its halo again, so it is kept several times as high.
  const int64_t smallest_strip = std::max<int64_t>(8, 8 * plan.radius_h);
  const int64_t wanted = plan.groups > 0 ? (kWantedTasks + plan.groups - 1) / plan.groups : 1;
  plan.strips = std::clamp<int64_t>(rows / smallest_strip, 1, wanted);
}

Task task_at(const Plan& plan, int64_t rows, int64_t index) {
  const int64_t plane = index / plan.strips * plan.lanes;
  const int64_t strip = index % plan.strips;
  const int64_t lanes = std::min<int64_t>(plan.lanes, plan.n * plan.c - plane);
  return {plane, static_cast<int>(lanes), strip, rows * strip / plan.strips,
          rows * (strip + 1) / plan.strips};
}

// A zeroed workspace, aligned for the widest vectors.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t bytes)
      : data_(static_cast<char*>(::operator new(bytes, std::align_val_t(64)))) {
    std::fill_n(data_, bytes, char{0});
  }
  ~AlignedBuffer() { ::operator delete(data_, std::align_val_t(64)); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  char* data() const { return data_; }

 private:
  char* data_;
};

// Calls body(task, workspace) for every task, each thread with a workspace of its own.
template <typename Body>
void for_each_task(const Plan& plan, int64_t rows, int64_t workspace_bytes,
                   const ParallelFor& parallel_for, const Body& body) {
  const int64_t elements = plan.lanes * plan.h * plan.w / plan.strips;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements));
  parallel_for(plan.groups * plan.strips, grain, [&](int64_t begin, int64_t end) {
    const AlignedBuffer buffer(std::max<int64_t>(workspace_bytes, 1));
    for (int64_t index = begin; index < end; ++index)
      body(task_at(plan, rows, index), buffer.data());
  });
}

// Adds the tasks' shares up, in double and in a fixed order, into the gradient of the weights.
template <typename Acc>
void reduce_weight_sums(const Plan& plan, const std::vector<double>& shares,
                        const BackwardArgs& args) {
  const int64_t k_count = plan.num_candidates;
  const int64_t rows_n = args.grad_weights_per_n ? plan.n : 1;
  const int64_t rows_c = args.grad_weights_per_c ? plan.c : 1;
  std::vector<double> sums(rows_n * rows_c * k_count, 0.0);
  for (int64_t plane = 0; plane < plan.n * plan.c; ++plane) {
    const int64_t row_n = args.grad_weights_per_n ? plane / plan.c : 0;
    const int64_t row_c = args.grad_weights_per_c ? plane % plan.c : 0;
    double* const to = sums.data() + (row_n * rows_c + row_c) * k_count;
    for (int64_t strip = 0; strip < plan.strips; ++strip) {
      const int64_t task = plane / plan.lanes * plan.strips + strip;
      const double* const from = shares.data() + task * k_count * plan.lanes + plane % plan.lanes;
      for (int64_t k = 0; k < k_count; ++k) to[k] += from[k * plan.lanes];
    }
  }
  std::copy(sums.begin(), sums.end(), static_cast<Acc*>(args.grad_weights));
}

bool same_map(const MapView& a, const MapView& b) {
  return a.data == b.data && a.stride_n == b.stride_n && a.stride_c == b.stride_c &&
         a.stride_h == b.stride_h && a.stride_w == b.stride_w;
}

}  // namespace

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa* isa : usable_isas()) names.emplace_back(isa->name);
  return names;
}

std::string active_isa() { return chosen_isa().name; }

void meta_pool_fwd(const Problem& problem, const ForwardArgs& args,
                   const ParallelFor& parallel_for) {
  check(problem);
  const cpu::Kernels& kernels = *chosen_isa().kernels;
  const int64_t rows = output_size(problem.h, problem.stride_h);
  OwnedPlan owned(problem, args.x, rows);
  owned.plan.separate_values = !owned.max.empty() && !same_map(args.x, args.values);
  const Plan& plan = owned.plan;
  for_each_task(
      plan, rows, kernels.forward_bytes(plan, args), parallel_for,
      [&](const Task& task, char* workspace) { kernels.forward(plan, args, task, workspace); });
}

void meta_pool_bwd(const Problem& problem, const BackwardArgs& args,
                   const ParallelFor& parallel_for) {
  check(problem);
  const cpu::Kernels& kernels = *chosen_isa().kernels;
  OwnedPlan owned(problem, args.x, problem.h);
  owned.plan.separate_values = !owned.max.empty() && !same_map(args.x, args.values);
  const Plan& plan = owned.plan;
  const int64_t share = static_cast<int64_t>(plan.num_candidates) * plan.lanes;
  const bool wants_weights = args.grad_weights != nullptr;
  std::vector<double> shares(wants_weights ? plan.groups * plan.strips * share : 0, 0.0);
  for_each_task(plan, problem.h, kernels.backward_bytes(plan, args), parallel_for,
                [&](const Task& task, char* workspace) {
                  const int64_t index = task.plane / plan.lanes * plan.strips + task.strip;
                  double* const sums = wants_weights ? shares.data() + index * share : nullptr;
                  kernels.backward(plan, args, task, workspace, sums);
                });
  if (!wants_weights) return;
  if (plan.dtype == DType::kFloat64) {
    reduce_weight_sums<double>(plan, shares, args);
  } else {
    reduce_weight_sums<float>(plan, shares, args);
  }
}

}  // namespace metapool
