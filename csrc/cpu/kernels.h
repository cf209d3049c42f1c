// The entry points of one instruction set. An isa_*.cpp defines METAPOOL_ISA, the namespace that
// keeps its copy of the algorithms apart, and includes this file; setup.py gives it its flags.
#pragma once

#include "backward.h"
#include "forward.h"
#include "streamed_backward.h"
#include "streamed_forward.h"
#include "streamed_moments.h"

namespace metapool::cpu::METAPOOL_ISA {

// The kernels for one combination of the three choices that they are compiled for.
template <typename Accumulator, int kLanes, bool kValue>
struct Variant {
  using Acc = Accumulator;
  static constexpr bool kIsPacked = kLanes > 1, kHasValues = kValue;
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

// Whether a variant can leave square windows to the streamed kernels. Where those meet
// numbers that they cannot handle, it does the task again.
template <typename Variant>
constexpr bool kHasStreamed =
    Variant::kIsPacked && !Variant::kHasValues && sizeof(typename Variant::Acc) == sizeof(float);

inline bool suits_streamed_forward(const Plan& plan) {
  return plan.form == Form::kMix && suits_streams(plan, kStreamedRadius);
}
inline bool suits_streamed_moments(const Plan& plan) {
  return plan.form == Form::kMoments && suits_streams(plan, kStreamedRadius);
}
inline bool suits_streamed_backward(const Plan& plan) {
  const bool repeats = plan.form == Form::kStack && plan.num_pools < plan.pools.count;
  const bool too_wide =
      plan.w > ScatteredMaxima::kMostColumns && ScatteredMaxima::radii_of(plan) != 0;
  const int largest = plan.form == Form::kMoments ? kStreamedRadius : kMaxRadius;
  return suits_streams(plan, largest) && !repeats && !too_wide;
}

inline int64_t forward_bytes(const Plan& plan, const ForwardArgs& args) {
  Arena counting(nullptr);
  with_variant(plan, [&](auto variant) {
    using V = decltype(variant);
    typename V::ForwardKernel(plan, args, counting);
    if constexpr (kHasStreamed<V>) {
      if (suits_streamed_forward(plan)) StreamedForward(plan, args, counting);
      if (suits_streamed_moments(plan)) StreamedMoments(plan, args, counting);
    }
  });
  return counting.used();
}

inline void forward(const Plan& plan, const ForwardArgs& args, int64_t begin, int64_t end,
                    char* workspace, double* moments) {
  with_variant(plan, [&](auto variant) {
    using V = decltype(variant);
    const auto task = [&](int64_t i) { return task_at(plan, plan.h_out, i < end ? i : end - 1); };
    const auto share = [&](int64_t i) {
      return moments == nullptr ? nullptr : moments + i * plan.lanes * plan.num_pools * 2;
    };
    Arena arena(workspace);
    if constexpr (kHasStreamed<V>) {
      const auto stream = [&](auto streamed) {
        for (int64_t i = begin; i < end; ++i) {
          if (streamed.run(task(i), task(i + 1), share(i))) continue;
          Arena rest = arena;
          typename V::ForwardKernel(plan, args, rest).run(task(i), task(i + 1), share(i));
        }
      };
      if (suits_streamed_forward(plan)) return stream(StreamedForward(plan, args, arena));
      if (suits_streamed_moments(plan)) return stream(StreamedMoments(plan, args, arena));
    }
    typename V::ForwardKernel kernel(plan, args, arena);
    for (int64_t i = begin; i < end; ++i) kernel.run(task(i), task(i + 1), share(i));
  });
}

inline int64_t backward_bytes(const Plan& plan, const BackwardArgs& args) {
  Arena counting(nullptr);
  with_variant(plan, [&](auto variant) {
    using V = decltype(variant);
    typename V::BackwardKernel(plan, args, counting);
    if constexpr (kHasStreamed<V>) {
      if (suits_streamed_backward(plan)) StreamedBackward(plan, args, counting);
    }
  });
  return counting.used();
}

inline void backward(const Plan& plan, const BackwardArgs& args, int64_t begin, int64_t end,
                     char* workspace, void* shares) {
  with_variant(plan, [&](auto variant) {
    using V = decltype(variant);
    using Acc = typename V::Acc;
    const auto task = [&](int64_t i) { return task_at(plan, plan.h, i < end ? i : end - 1); };
    const auto share = [&](int64_t i) {
      return shares == nullptr ? nullptr
                               : static_cast<Acc*>(shares) + i * plan.share_rows * plan.num_pools;
    };
    Arena arena(workspace);
    if constexpr (kHasStreamed<V>) {
      if (suits_streamed_backward(plan)) {
        StreamedBackward streamed(plan, args, arena);
        for (int64_t i = begin; i < end; ++i) {
          if (streamed.run(task(i), task(i + 1), share(i))) continue;
          Arena rest = arena;
          typename V::BackwardKernel(plan, args, rest).run(task(i), task(i + 1), share(i));
        }
        return;
      }
    }
    typename V::BackwardKernel kernel(plan, args, arena);
    for (int64_t i = begin; i < end; ++i) kernel.run(task(i), task(i + 1), share(i));
  });
}

constexpr Kernels kKernels = {forward_bytes, forward, backward_bytes, backward};

}  // namespace metapool::cpu::METAPOOL_ISA
