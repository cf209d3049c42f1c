// The entry points of one instruction set. An isa_*.cpp defines METAPOOL_ISA, the namespace that
// keeps its copy of the algorithms apart, and includes this file; setup.py gives it its flags.
#pragma once

#include "backward.h"
#include "forward.h"

namespace metapool::cpu::METAPOOL_ISA {

// The kernels for one combination of the three choices that they are compiled for.
template <typename Accumulator, int kLanes, bool kValue>
struct Variant {
  using Acc = Accumulator;
  using ForwardKernel = Forward<Acc, kLanes, kValue>;
  using BackwardKernel = Backward<Acc, kLanes, kValue>;
};

template <typename Acc, int kLanes, typename Body>
METAPOOL_INLINE void with_values(const Plan& plan, Body body) {
  plan.separate_values ? body(Variant<Acc, kLanes, true>{}) : body(Variant<Acc, kLanes, false>{});
}

template <typename Acc, typename Body>
METAPOOL_INLINE void with_lanes(const Plan& plan, Body body) {
  plan.lanes == 1 ? with_values<Acc, 1>(plan, body) : with_values<Acc, kPackedLanes>(plan, body);
}

// Calls body(variant) with the Variant that a plan asks for.
template <typename Body>
METAPOOL_INLINE void with_variant(const Plan& plan, Body body) {
  plan.dtype == DType::kFloat64 ? with_lanes<double>(plan, body) : with_lanes<float>(plan, body);
}

inline int64_t forward_bytes(const Plan& plan, const ForwardArgs& args) {
  Arena counting(nullptr);
  with_variant(
      plan, [&](auto variant) { typename decltype(variant)::ForwardKernel(plan, args, counting); });
  return counting.used();
}

inline void forward(const Plan& plan, const ForwardArgs& args, int64_t begin, int64_t end,
                    char* workspace) {
  with_variant(plan, [&](auto variant) {
    Arena arena(workspace);
    typename decltype(variant)::ForwardKernel kernel(plan, args, arena);
    for (int64_t i = begin; i < end; ++i) {
      kernel.run(task_at(plan, plan.h_out, i), task_at(plan, plan.h_out, i + 1 < end ? i + 1 : i));
    }
  });
}

inline int64_t backward_bytes(const Plan& plan, const BackwardArgs& args) {
  Arena counting(nullptr);
  with_variant(plan, [&](auto variant) {
    typename decltype(variant)::BackwardKernel(plan, args, counting);
  });
  return counting.used();
}

inline void backward(const Plan& plan, const BackwardArgs& args, int64_t begin, int64_t end,
                     char* workspace, void* shares) {
  with_variant(plan, [&](auto variant) {
    using Acc = typename decltype(variant)::Acc;
    Arena arena(workspace);
    typename decltype(variant)::BackwardKernel kernel(plan, args, arena);
    for (int64_t i = begin; i < end; ++i) {
      Acc* const share = static_cast<Acc*>(shares);
      kernel.run(task_at(plan, plan.h, i), task_at(plan, plan.h, i + 1 < end ? i + 1 : i),
                 share == nullptr ? nullptr : share + i * plan.lanes * plan.num_pools);
    }
  });
}

constexpr Kernels kKernels = {forward_bytes, forward, backward_bytes, backward};

}  // namespace metapool::cpu::METAPOOL_ISA
