// Forward: which kernel takes a problem, and its launch.
#include "launch.h"

#include "general.cuh"
#include "slots.h"
#include "streamed_forward.cuh"

namespace metapool::cuda {

namespace {

// A problem that the streamed kernels take.
struct Streamed {
  const Problem& problem;
  const ForwardArgs& args;
  Slots slots;
  cudaStream_t stream;
};

template <typename T, bool kAvg, bool kMax, Outcome kOutcome, Access kAccess>
void launch_streamed(const Streamed& of) {
  constexpr int kColumns = kForwardColumns<kOutcome>;
  const Sizes sizes = sizes_of(of.problem);
  const Map<const T> x = map_of<T>(of.args.x);
  const Map<T> out = map_of<T>(of.args.out);
  Apart<T> apart;
  for (int slot = 0; slot < kSlots; ++slot) {
    apart.places[slot] =
        of.slots.candidate[slot] * of.args.out_stride_k - delay_of(slot) * out.stride_h;
  }
  const Cut cut = cut_of(sizes, kForwardThreads, kColumns, 0, is_channels_last(x));
  METAPOOL_LAUNCH((&streamed_fwd_kernel<T, kAvg, kMax, kColumns, kAccess, kOutcome>), cut.blocks,
                  kForwardThreads, 0, of.stream, sizes, cut, x, weights_of<float>(of.args.weights),
                  weights_of<float>(of.args.constants), out, of.slots, apart);
}

template <typename T, bool kAvg, bool kMax, Outcome kOutcome>
void launch_outcome(const Streamed& of) {
  constexpr int kColumns = kForwardColumns<kOutcome>;
  Access access = common(access_of(map_of<T>(of.args.x), of.problem.w, kColumns),
                         access_of(map_of<T>(of.args.out), of.problem.w, kColumns));
  if (of.args.out_stride_k % kColumns != 0) access = common(access, Access::kDense);
  switch (access) {
    case Access::kVector:
      return launch_streamed<T, kAvg, kMax, kOutcome, Access::kVector>(of);
    case Access::kDense:
      return launch_streamed<T, kAvg, kMax, kOutcome, Access::kDense>(of);
    case Access::kStrided:
      return launch_streamed<T, kAvg, kMax, kOutcome, Access::kStrided>(of);
  }
}

template <typename T, bool kAvg, bool kMax>
void launch_kinds(const Streamed& of) {
  if (of.problem.form == Form::kStack) {
    launch_outcome<T, kAvg, kMax, Outcome::kStack>(of);
  } else {
    launch_outcome<T, kAvg, kMax, Outcome::kMix>(of);
  }
}

template <typename T, Outcome kOutcome>
void launch_general(const Problem& problem, const ForwardArgs& args, cudaStream_t stream) {
  const Sizes sizes = sizes_of(problem);
  const Map<T> out = map_of<T>(args.out);
  const int64_t count = sizes.n * sizes.c * sizes.h_out * sizes.w_out;
  METAPOOL_LAUNCH((&general_fwd_kernel<T, kOutcome>), ceil_div(count, kGeneralThreads),
                  kGeneralThreads, 0, stream, sizes, map_of<T>(args.x), map_of<T>(args.values),
                  weights_of<Acc<T>>(args.weights), weights_of<Acc<T>>(args.constants), out,
                  args.out_stride_k, candidates_of(problem), is_channels_last(out));
}

template <typename T>
void launch(const Problem& problem, const ForwardArgs& args, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    Streamed of{problem, args, {}, stream};
    if (same_map(args.values, args.x) && find_slots(problem, of.slots)) {
      const Kinds kinds = kinds_of(of.slots);
      if (!kinds.has_max) return launch_kinds<T, true, false>(of);
      if (!kinds.has_avg) return launch_kinds<T, false, true>(of);
      return launch_kinds<T, true, true>(of);
    }
  }
  if (problem.form == Form::kStack) {
    launch_general<T, Outcome::kStack>(problem, args, stream);
  } else {
    launch_general<T, Outcome::kMix>(problem, args, stream);
  }
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
