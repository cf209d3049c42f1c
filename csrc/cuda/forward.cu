// Forward: which kernel takes a problem, and its launch.
#include "launch.h"

#include "general.cuh"
#include "slots.h"
#include "streamed_forward.cuh"

namespace metapool::cuda {

namespace {

// A call, and where its poolings are among those that are streamed.
struct Call {
  const Problem& problem;
  const ForwardArgs& args;
  Found* scratch;
  cudaStream_t stream;
  Slots slots;

  int candidates() const { return static_cast<int>(problem.candidates.size()); }
};

Outcome outcome_of(const Problem& problem, const ForwardArgs& args) {
  if (problem.form == Form::kMix) return Outcome::kMix;
  if (problem.form == Form::kStack) return Outcome::kStack;
  return args.other.data == nullptr ? Outcome::kMoments : Outcome::kProducts;
}

// Calls body with the outcome as a type.
template <typename Body>
void with_outcome(Outcome outcome, Body body) {
  switch (outcome) {
    case Outcome::kMix:
      return body(std::integral_constant<Outcome, Outcome::kMix>());
    case Outcome::kStack:
      return body(std::integral_constant<Outcome, Outcome::kStack>());
    case Outcome::kMoments:
      return body(std::integral_constant<Outcome, Outcome::kMoments>());
    case Outcome::kProducts:
      return body(std::integral_constant<Outcome, Outcome::kProducts>());
  }
}

template <Outcome kOutcome>
Cut streamed_cut(const Problem& problem, const ForwardArgs& args) {
  return cut_of(sizes_of(problem), kForwardThreads, kForwardColumns<kOutcome>, 0,
                is_channels_last(map_of<char>(args.x)));
}

template <Outcome kOutcome>
void launch_moments(const Call& of, int64_t parts) {
  const int64_t planes = of.problem.n * of.problem.c;
  METAPOOL_LAUNCH((&moments_kernel<kOutcome>), ceil_div(planes * of.candidates(), kMomentThreads),
                  kMomentThreads, 0, of.stream, of.scratch, of.args.moments, planes, parts,
                  of.candidates());
}

template <typename T, bool kAvg, bool kMax, Outcome kOutcome, Access kAccess>
void launch_streamed(const Call& of) {
  const ForwardArgs& args = of.args;
  const Map<T> out = map_of<T>(args.out);
  const Cut cut = streamed_cut<kOutcome>(of.problem, args);
  Apart<T> apart{
      {}, map_of<T>(args.other), of.scratch, int64_t{cut.tiles} * cut.strips, of.candidates()};
  for (int slot = 0; slot < kSlots; ++slot) {
    apart.places[slot] =
        of.slots.candidate[slot] * args.out_stride_k - delay_of(slot) * out.stride_h;
  }
  const bool has_shifts = kOutcome == Outcome::kProducts;
  METAPOOL_LAUNCH(
      (&streamed_fwd_kernel<T, kAvg, kMax, kForwardColumns<kOutcome>, kAccess, kOutcome>),
      cut.blocks, kForwardThreads, kForwardShared<kOutcome>, of.stream, sizes_of(of.problem), cut,
      map_of<T>(args.x), weights_of<float>(has_shifts ? args.shifts : args.weights),
      weights_of<float>(args.constants), out, of.slots, apart);
  if constexpr (kOutcome >= Outcome::kMoments) {
    check(cudaGetLastError(), "moments");
    launch_moments<kOutcome>(of, apart.parts);
  }
}

// How the columns of all maps of a call can be read.
template <typename T, Outcome kOutcome>
Access access_of(const Call& of) {
  constexpr int kColumns = kForwardColumns<kOutcome>;
  const auto of_map = [&](const auto& view) {
    return access_of(map_of<T>(view), of.problem.w, kColumns);
  };
  const Access access = of_map(of.args.x);
  if (kOutcome == Outcome::kMoments) return access;
  if (kOutcome == Outcome::kProducts) return common(access, of_map(of.args.other));
  const bool is_aligned = of.args.out_stride_k % kColumns == 0;
  return common(common(access, of_map(of.args.out)), is_aligned ? access : Access::kDense);
}

template <typename T, bool kAvg, bool kMax>
void launch_kinds(const Call& of) {
  with_outcome(outcome_of(of.problem, of.args), [&](auto outcome) {
    constexpr Outcome kOutcome = decltype(outcome)::value;
    switch (access_of<T, kOutcome>(of)) {
      case Access::kVector:
        return launch_streamed<T, kAvg, kMax, kOutcome, Access::kVector>(of);
      case Access::kDense:
        return launch_streamed<T, kAvg, kMax, kOutcome, Access::kDense>(of);
      case Access::kStrided:
        return launch_streamed<T, kAvg, kMax, kOutcome, Access::kStrided>(of);
    }
  });
}

template <typename T, Outcome kOutcome>
void launch_general(const Call& of) {
  const Sizes sizes = sizes_of(of.problem);
  const ForwardArgs& args = of.args;
  if constexpr (kOutcome >= Outcome::kMoments) {
    const int64_t parts = general_parts(sizes), blocks = sizes.n * sizes.c * parts;
    METAPOOL_LAUNCH((&general_moments_kernel<T, kOutcome>),
                    blocks < kMostBlocks ? blocks : kMostBlocks, kGeneralThreads,
                    kGeneralThreads * sizeof(double), of.stream, sizes, map_of<T>(args.x),
                    map_of<T>(args.other), weights_of<Acc<T>>(args.shifts),
                    candidates_of(of.problem), of.scratch, parts);
    check(cudaGetLastError(), "moments");
    launch_moments<kOutcome>(of, parts);
  } else {
    const Map<T> out = map_of<T>(args.out);
    const int64_t count = sizes.n * sizes.c * sizes.h_out * sizes.w_out;
    METAPOOL_LAUNCH((&general_fwd_kernel<T, kOutcome>), ceil_div(count, kGeneralThreads),
                    kGeneralThreads, 0, of.stream, sizes, map_of<T>(args.x), map_of<T>(args.values),
                    weights_of<Acc<T>>(args.weights), weights_of<Acc<T>>(args.constants), out,
                    args.out_stride_k, candidates_of(of.problem), is_channels_last(out));
  }
}

template <typename T>
void launch(Call& of) {
  if constexpr (!std::is_same_v<T, double>) {
    if (is_streamed(of.problem, of.args, of.slots)) {
      return with_kinds(of.slots, [&](auto has_avg, auto has_max) {
        launch_kinds<T, decltype(has_avg)::value, decltype(has_max)::value>(of);
      });
    }
  }
  with_outcome(outcome_of(of.problem, of.args),
               [&](auto outcome) { launch_general<T, decltype(outcome)::value>(of); });
}

}  // namespace

int64_t fwd_scratch_bytes(const Problem& problem, const ForwardArgs& args) {
  check_problem(problem);
  if (problem.n == 0 || problem.form != Form::kMoments) return 0;
  int64_t parts = general_parts(sizes_of(problem));
  Slots slots;
  if (is_streamed(problem, args, slots)) {
    const Cut cut = streamed_cut<Outcome::kMoments>(problem, args);
    parts = int64_t{cut.tiles} * cut.strips;
  }
  const auto count = static_cast<int64_t>(problem.candidates.size());
  return problem.n * problem.c * parts * count * static_cast<int64_t>(sizeof(Found));
}

void launch_meta_pool_fwd(const Problem& problem, const ForwardArgs& args, void* scratch,
                          Stream stream) {
  check_problem(problem);
  if (problem.n == 0) return;
  Call of{problem, args, static_cast<Found*>(scratch), static_cast<cudaStream_t>(stream), {}};
  with_type(problem.dtype, [&](auto element) { launch<decltype(element)>(of); });
  check(cudaGetLastError(), "forward");
}

}  // namespace metapool::cuda
