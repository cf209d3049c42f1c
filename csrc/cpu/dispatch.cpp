// Checks a problem, plans it, picks the instruction set, and cuts the work into tasks whose number
// and order of summation depend on the problem alone, never on the threads.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <new>
#include <stdexcept>
#include <tuple>

#include "../problem.h"
#include "plan.h"

namespace metapool {

namespace {

using cpu::Isa;
using cpu::kPackedLanes;
using cpu::Plan;
using cpu::PoolItem;

// Below this width a row leaves most vector lanes empty, and planes are packed side by side
// however few they are; beyond the other, packed rows no longer fit the second cache.
constexpr int64_t kNarrowWidth = 24, kWideWidth = 256;
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

// A plan and the arrays that it points into.
struct OwnedPlan {
  Plan plan{};
  std::vector<int> pools, order, max_widths;
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
  plan.form = problem.form;
  plan.n = problem.n;
  plan.c = problem.c;
  plan.h = problem.h;
  plan.w = problem.w;
  // From the size of the map on, every stride means one window at the first pixel.
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
  std::map<std::tuple<Kind, int, int>, std::vector<int>> members;  // of each distinct window
  for (int k = 0; k < static_cast<int>(codes.size()); ++k) {
    const Window window = decode_candidate(codes[k]);
    const bool pools = window.kind == Kind::kAvg || window.kind == Kind::kMax;
    members[{window.kind, pools ? window.radius_w : 0, pools ? window.radius_h : 0}].push_back(k);
  }
  pools.resize(codes.size());
  for (const auto& [window, ks] : members) {
    const auto [kind, radius_w, radius_h] = window;
    PoolItem item{radius_h, radius_w, plan.num_pools++, static_cast<int>(order.size()), 0};
    for (const int k : ks) {
      pools[k] = item.index;
      order.push_back(k);
    }
    // Where poolings are not mixed each has the weight one: what it is sent is added up first.
    item.end = plan.form == Form::kMix ? static_cast<int>(order.size()) : item.begin + 1;
    if (kind == Kind::kNone) plan.none = item;
    if (kind == Kind::kSkip) plan.skip = item;
    if (kind == Kind::kAvg) avg.push_back(item);
    if (kind == Kind::kMax) max.push_back(item);
    plan.radius_h = std::max(plan.radius_h, radius_h);
    plan.radius_w = std::max(plan.radius_w, radius_w);
  }
  for (const PoolItem& item : max) {
    if (max_widths.empty() || max_widths.back() != item.radius_w)
      max_widths.push_back(item.radius_w);
  }
  plan.max_widths = span(max_widths);
  plan.pools = span(pools);
  plan.order = span(order);
  plan.avg = span(avg);
  plan.max = span(max);
}

void OwnedPlan::cut(const MapView& x, int64_t rows) {
  const int64_t planes = plan.n * plan.c;
  const bool narrow = plan.w < kNarrowWidth;
  const bool many = planes >= kPackedLanes / 2 && plan.w <= kWideWidth;
  const bool channels_adjacent = x.stride_c == 1 && plan.c > 1 && x.stride_w != 1;
  plan.lanes = planes > 1 && (narrow || many || channels_adjacent) ? kPackedLanes : 1;
  plan.groups = (planes + plan.lanes - 1) / plan.lanes;
  // A strip computes the rows of its halo again, so it is kept several times as high.
  const int64_t smallest_strip = std::max<int64_t>(8, 8 * plan.radius_h);
  const int64_t wanted = plan.groups > 0 ? (kWantedTasks + plan.groups - 1) / plan.groups : 1;
  plan.strips = std::clamp<int64_t>(rows / smallest_strip, 1, wanted);
}

// A workspace, aligned for the widest vectors.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t bytes)
      : data_(static_cast<char*>(::operator new(bytes, std::align_val_t(64)))) {}
  ~AlignedBuffer() { ::operator delete(data_, std::align_val_t(64)); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  char* data() const { return data_; }

 private:
  char* data_;
};

// Calls body(begin, end, workspace) for ranges of tasks that make all of them up.
template <typename Body>
void for_task_ranges(const Plan& plan, int64_t workspace_bytes, const ParallelFor& parallel_for,
                     const Body& body) {
  const int64_t elements = plan.lanes * plan.h * plan.w / plan.strips;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements));
  parallel_for(plan.groups * plan.strips, grain, [&](int64_t begin, int64_t end) {
    const AlignedBuffer workspace(std::max<int64_t>(workspace_bytes, 1));
    body(begin, end, workspace.data());
  });
}

// Adds the tasks' shares up, in double and in a fixed order, into the gradient of the weights.
template <typename Acc>
void reduce_shares(const Plan& plan, const Acc* shares, const BackwardArgs& args) {
  const int64_t k_count = plan.num_pools;
  const int64_t rows_n = args.grad_weights_per_n ? plan.n : 1;
  const int64_t rows_c = args.grad_weights_per_c ? plan.c : 1;
  std::vector<double> sums(rows_n * rows_c * k_count);
  const auto add = [&](int64_t row, const Acc* share) {
    for (int64_t k = 0; k < k_count; ++k) {
      sums[row * k_count + k] += static_cast<double>(share[k]);
    }
  };
  const bool summed = rows_n * rows_c == 1;
  for (int64_t i = 0; summed && i < plan.groups * plan.strips; ++i) add(0, shares + i * k_count);
  int64_t n = 0, c = 0;
  for (int64_t group = 0; !summed && group < plan.groups; ++group) {
    for (int lane = 0; lane < plan.lanes && n < plan.n; ++lane) {
      for (int64_t strip = 0; strip < plan.strips; ++strip) {
        const int64_t task = group * plan.strips + strip;
        add((rows_n > 1 ? n : 0) * rows_c + (rows_c > 1 ? c : 0),
            shares + (task * plan.lanes + lane) * k_count);
      }
      if (++c == plan.c) {
        c = 0;
        ++n;
      }
    }
  }
  Acc* const grad_weights = static_cast<Acc*>(args.grad_weights);
  for (int64_t row = 0; row < rows_n * rows_c; ++row) {
    for (int k = 0; k < plan.pools.count; ++k) {
      grad_weights[row * plan.pools.count + k] =
          static_cast<Acc>(sums[row * k_count + plan.pools.data[k]]);
    }
  }
}

template <typename Acc>
void run_backward(const Plan& plan, const cpu::Kernels& kernels, const BackwardArgs& args,
                  const ParallelFor& parallel_for) {
  const bool wants_weights = args.grad_weights != nullptr;
  const int64_t rows = plan.groups * plan.strips * plan.share_rows;
  std::vector<Acc> shares(wants_weights ? rows * plan.num_pools : 0);
  for_task_ranges(plan, kernels.backward_bytes(plan, args), parallel_for,
                  [&](int64_t begin, int64_t end, char* workspace) {
                    kernels.backward(plan, args, begin, end, workspace,
                                     wants_weights ? shares.data() : nullptr);
                  });
  if (wants_weights) reduce_shares(plan, shares.data(), args);
}

// What a candidate's values are shifted by in products with another map.
double shift_of(const Plan& plan, const ForwardArgs& args, int64_t plane, int64_t k) {
  const WeightView& view = args.shifts;
  const int64_t at =
      plane / plan.c * view.stride_n + plane % plan.c * view.stride_c + k * view.stride_k;
  return plan.dtype == DType::kFloat64
             ? static_cast<const double*>(view.data)[at]
             : static_cast<double>(static_cast<const float*>(view.data)[at]);
}

// Puts what was found of planes together from their strips, in a fixed order: means and squared
// deviations, or sums.
void combine_moments(const Plan& plan, const ForwardArgs& args, const double* shares) {
  const bool has_other = args.other.data != nullptr;
  const int candidates = plan.pools.count;
  std::fill_n(args.moments, 2 * plan.n * plan.c * candidates, 0.0);
  for (int64_t group = 0; group < plan.groups; ++group) {
    double count = 0;
    for (int64_t part = 0; part < plan.strips; ++part) {
      const int64_t index = group * plan.strips + part;
      const cpu::Task task = cpu::task_at(plan, plan.h_out, index);
      const auto more = static_cast<double>((task.row_end - task.row_begin) * plan.w_out);
      const double weight = more / (count + more), spread = count * more / (count + more);
      for (int64_t lane = 0; lane < task.lanes; ++lane) {
        double* found = args.moments + 2 * (task.plane + lane) * candidates;
        for (int k = 0; k < candidates; ++k, found += 2) {
          const double* const share =
              shares + 2 * ((index * plan.lanes + lane) * plan.num_pools + plan.pools.data[k]);
          if (has_other) {
            found[0] += share[0];
            found[1] += share[1];
            continue;
          }
          const double apart = share[0] - found[0];
          found[1] += share[1] + apart * apart * spread;
          found[0] += apart * weight;
        }
      }
      count += more;
    }
  }
  if (!has_other || plan.num_pools == candidates) return;
  // Candidates that name one pooling share its sums, and these the shift of the first.
  for (int64_t plane = 0; plane < plan.n * plan.c; ++plane) {
    for (int k = 0; k < candidates; ++k) {
      int first = 0;
      while (plan.pools.data[first] != plan.pools.data[k]) ++first;
      if (first == k) continue;
      double* const found = args.moments + 2 * (plane * candidates + k);
      const double apart = shift_of(plan, args, plane, first) - shift_of(plan, args, plane, k);
      found[1] += apart * found[0];
    }
  }
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
  check_problem(problem);
  const cpu::Kernels& kernels = *chosen_isa().kernels;
  const int64_t rows = output_size(problem.h, problem.stride_h);
  OwnedPlan owned(problem, args.x, rows);
  owned.plan.separate_values = !owned.max.empty() && !same_map(args.x, args.values);
  const Plan& plan = owned.plan;
  const bool counts = plan.form == Form::kMoments;
  std::vector<double> shares(counts ? 2 * plan.groups * plan.strips * plan.lanes * plan.num_pools
                                    : 0);
  double* const moments = counts ? shares.data() : nullptr;
  for_task_ranges(plan, kernels.forward_bytes(plan, args), parallel_for,
                  [&](int64_t begin, int64_t end, char* workspace) {
                    kernels.forward(plan, args, begin, end, workspace, moments);
                  });
  if (counts) combine_moments(plan, args, shares.data());
}

void meta_pool_bwd(const Problem& problem, const BackwardArgs& args,
                   const ParallelFor& parallel_for) {
  check_problem(problem);
  const cpu::Kernels& kernels = *chosen_isa().kernels;
  OwnedPlan owned(problem, args.x, problem.h);
  owned.plan.separate_values = !owned.max.empty() && !same_map(args.x, args.values);
  const bool summed =
      (!args.grad_weights_per_n || problem.n == 1) && (!args.grad_weights_per_c || problem.c == 1);
  owned.plan.share_rows = summed ? 1 : owned.plan.lanes;
  if (problem.dtype == DType::kFloat64) {
    run_backward<double>(owned.plan, kernels, args, parallel_for);
  } else {
    run_backward<float>(owned.plan, kernels, args, parallel_for);
  }
}

}  // namespace metapool
