// Forward: which kernel takes a problem, and its launch.
#include "launch.h"

#include "general.cuh"
#include "slots.h"
#include "streamed_forward.cuh"

namespace metapool::cuda {

namespace {

constexpr int kColumns = 4;

template <typename T, bool kAvg, bool kMax, Access kAccess>
void launch_streamed(const Problem& problem, const ForwardArgs& args, const Slots& slots,
                     cudaStream_t stream) {
  const Sizes sizes = sizes_of(problem);
  const Map<const T> x = map_of<T>(args.x);
  const Cut cut = cut_of(sizes, kForwardThreads, kColumns, 0, is_channels_last(x));
  METAPOOL_LAUNCH((&streamed_fwd_kernel<T, kAvg, kMax, kColumns, kAccess>), cut.blocks,
                  kForwardThreads, 0, stream, sizes, cut, x, weights_of<float>(args.weights),
                  map_of<T>(args.out), slots);
}

template <typename T, bool kAvg, bool kMax>
void launch_kinds(const Problem& problem, const ForwardArgs& args, const Slots& slots,
                  cudaStream_t stream) {
  switch (common(access_of(map_of<T>(args.x), problem.w, kColumns),
                 access_of(map_of<T>(args.out), problem.w, kColumns))) {
    case Access::kVector:
      return launch_streamed<T, kAvg, kMax, Access::kVector>(problem, args, slots, stream);
    case Access::kDense:
      return launch_streamed<T, kAvg, kMax, Access::kDense>(problem, args, slots, stream);
    case Access::kStrided:
      return launch_streamed<T, kAvg, kMax, Access::kStrided>(problem, args, slots, stream);
  }
}

template <typename T>
void launch_general(const Problem& problem, const ForwardArgs& args, cudaStream_t stream) {
  const Sizes sizes = sizes_of(problem);
  const Map<T> out = map_of<T>(args.out);
  const int64_t count = sizes.n * sizes.c * sizes.h_out * sizes.w_out;
  METAPOOL_LAUNCH((&general_fwd_kernel<T>), ceil_div(count, kGeneralThreads), kGeneralThreads, 0,
                  stream, sizes, map_of<T>(args.x), map_of<T>(args.values),
                  weights_of<Acc<T>>(args.weights), out, candidates_of(problem),
                  is_channels_last(out));
}

template <typename T>
void launch(const Problem& problem, const ForwardArgs& args, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    Slots slots;
    if (same_map(args.values, args.x) && find_slots(problem, slots)) {
      const Kinds kinds = kinds_of(slots);
      if (!kinds.has_max) return launch_kinds<T, true, false>(problem, args, slots, stream);
      if (!kinds.has_avg) return launch_kinds<T, false, true>(problem, args, slots, stream);
      return launch_kinds<T, true, true>(problem, args, slots, stream);
    }
  }
  launch_general<T>(problem, args, stream);
}

}  // namespace

void launch_meta_pool_fwd(const Problem& problem, const ForwardArgs& args, Stream stream) {
  check_problem(problem);
  if (problem.n == 0) return;
  with_type(problem.dtype, [&](auto element) {
    launch<decltype(element)>(problem, args, static_cast<cudaStream_t>(stream));
  });
  check(cudaGetLastError(), "forward");
}

}  // namespace metapool::cuda
