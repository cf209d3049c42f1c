// Backward: which kernels take a problem, and their launches.
#include "launch.h"

#include "general.cuh"
#include "slots.h"
#include "streamed_backward.cuh"
#include "terms.cuh"

namespace metapool::cuda {

namespace {

constexpr int64_t kAlignment = 256;

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

// Calls body with the form as a type.
template <typename Body>
void with_form(Form form, Body body) {
  switch (form) {
    case Form::kMix:
      return body(std::integral_constant<Form, Form::kMix>());
    case Form::kStack:
      return body(std::integral_constant<Form, Form::kStack>());
    case Form::kMoments:
      return body(std::integral_constant<Form, Form::kMoments>());
  }
}

// Columns of a lane of the streamed kernels, on the current device.
int columns_of(const Problem& problem) {
  bool may_have_many = false;
  with_type(problem.dtype, [&](auto element) {
    with_form(problem.form, [&](auto form) {
      may_have_many = kMayHaveMany<decltype(element), decltype(form)::value>;
    });
  });
  if (!may_have_many) return kFewColumns;
  int device = 0, shared = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory");
  constexpr int kMost = BackwardShared<Form::kMix, true, true, kManyColumns>::kBytes;
  return shared < kMost ? kFewColumns : kManyColumns;
}

// How the columns of all maps of a call can be read.
template <typename T>
Access access_of(const Problem& problem, const BackwardArgs& args, int columns) {
  Access access = common(access_of(map_of<T>(args.x), problem.w, columns),
                         access_of(map_of<T>(args.grad_out), problem.w, columns));
  if (args.grad_x.data != nullptr) {
    access = common(access, access_of(map_of<T>(args.grad_x), problem.w, columns));
  }
  const bool is_aligned = problem.form != Form::kStack || args.grad_out_stride_k % columns == 0;
  return is_aligned ? access : common(access, Access::kDense);
}

Access access_of(const Problem& problem, const BackwardArgs& args, int columns) {
  Access access = Access::kStrided;
  with_type(problem.dtype,
            [&](auto element) { access = access_of<decltype(element)>(problem, args, columns); });
  return access;
}

Cut streamed_cut(const Problem& problem, const BackwardArgs& args, int columns) {
  const bool along_planes = access_of(problem, args, columns) == Access::kStrided;
  return cut_of(sizes_of(problem), kBackwardThreads, columns, overlap_of(columns), along_planes);
}

// Terms of the gradient of the weights, as the streamed kernels write them.
Terms streamed_terms(const Problem& problem, const BackwardArgs& args, const Cut& cut) {
  const int count = static_cast<int>(problem.candidates.size());
  if (!args.grad_weights_per_n && !args.grad_weights_per_c) {
    return {1, 1, cut.blocks, count, false, false};
  }
  return {problem.n,
          problem.c,
          cut.tiles * cut.strips,
          count,
          args.grad_weights_per_n,
          args.grad_weights_per_c};
}

Terms general_terms(const Problem& problem, const BackwardArgs& args) {
  return {problem.n,
          problem.c,
          general_parts(sizes_of(problem)),
          static_cast<int>(problem.candidates.size()),
          args.grad_weights_per_n,
          args.grad_weights_per_c};
}

int64_t accumulated_bytes(const Problem& problem) {
  return problem.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
}

int64_t term_bytes(const Problem& problem, const BackwardArgs& args, const Terms& terms) {
  if (args.grad_weights == nullptr) return 0;
  return aligned(terms.n * terms.c * terms.parts * terms.candidates * accumulated_bytes(problem));
}

// Of each candidate of a kind so many bytes for each output pixel.
int64_t bytes_of(const Problem& problem, const BackwardArgs& args, Kind kind, int64_t each) {
  if (args.grad_x.data == nullptr) return 0;
  const Sizes sizes = sizes_of(problem);
  int64_t count = 0;
  for (const int64_t code : problem.candidates) count += decode_candidate(code).kind == kind;
  return aligned(count * sizes.n * sizes.c * sizes.h_out * sizes.w_out * each);
}

int64_t position_bytes(const Problem& problem, const BackwardArgs& args) {
  return bytes_of(problem, args, Kind::kMax, sizeof(uint8_t));
}

int64_t average_bytes(const Problem& problem, const BackwardArgs& args) {
  if (problem.form != Form::kMoments) return 0;
  return bytes_of(problem, args, Kind::kAvg, accumulated_bytes(problem));
}

// A call of the streamed kernels, and where its poolings are among theirs.
struct Call {
  const Problem& problem;
  const BackwardArgs& args;
  float* scratch;
  cudaStream_t stream;
  Slots slots;
  int columns;
};

template <typename T, Form kForm, bool kAvg, bool kMax, int kColumns, Access kAccess>
void launch_streamed(const Call& of) {
  const BackwardArgs& args = of.args;
  const Cut cut = streamed_cut(of.problem, args, kColumns);
  const Terms terms = streamed_terms(of.problem, args, cut);
  const bool wants_weights = args.grad_weights != nullptr;
  const Map<const T> grad_out = map_of<T>(args.grad_out);
  Backward<T> call{grad_out,
                   map_of<T>(args.x),
                   {},
                   fields_of<float>(args),
                   map_of<T>(args.grad_x),
                   wants_weights ? of.scratch : nullptr,
                   terms};
  for (int slot = 0; slot < kNoneSlot; ++slot) {
    call.places[slot] = of.slots.candidate[slot] * args.grad_out_stride_k -
                        (rows_behind(slot) - 1) * grad_out.stride_h;
  }
  const auto kernel = &streamed_bwd_kernel<T, kAvg, kMax, kColumns, kAccess, kForm>;
  constexpr int kShared = BackwardShared<kForm, kAvg, kMax, kColumns>::kBytes;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
        "shared memory");
  METAPOOL_LAUNCH(kernel, cut.blocks, kBackwardThreads, kShared, of.stream, sizes_of(of.problem),
                  cut, of.slots, call);
  check(cudaGetLastError(), "backward");
  if (wants_weights) {
    launch_total(terms, of.scratch, static_cast<float*>(args.grad_weights), of.stream);
  }
}

template <typename T, Form kForm, bool kAvg, bool kMax, int kColumns>
void launch_columns(const Call& of) {
  switch (access_of<T>(of.problem, of.args, kColumns)) {
    case Access::kVector:
      return launch_streamed<T, kForm, kAvg, kMax, kColumns, Access::kVector>(of);
    case Access::kDense:
      return launch_streamed<T, kForm, kAvg, kMax, kColumns, Access::kDense>(of);
    case Access::kStrided:
      return launch_streamed<T, kForm, kAvg, kMax, kColumns, Access::kStrided>(of);
  }
}

template <typename T, Form kForm, bool kAvg, bool kMax>
void launch_kinds(const Call& of) {
  if constexpr (kMayHaveMany<T, kForm>) {
    if (of.columns == kManyColumns) {
      return launch_columns<T, kForm, kAvg, kMax, kManyColumns>(of);
    }
  }
  launch_columns<T, kForm, kAvg, kMax, kFewColumns>(of);
}

template <typename T, Form kForm>
void launch_slots(const Call& of) {
  with_kinds(of.slots, [&](auto has_avg, auto has_max) {
    launch_kinds<T, kForm, decltype(has_avg)::value, decltype(has_max)::value>(of);
  });
}

template <typename T, Form kForm>
void launch_general(const Problem& problem, const BackwardArgs& args, char* scratch,
                    cudaStream_t stream) {
  const Sizes sizes = sizes_of(problem);
  const Candidates candidates = candidates_of(problem);
  const Map<const T> grad_out = map_of<T>(args.grad_out), x = map_of<T>(args.x);
  const bool channels_last = is_channels_last(x);
  const int64_t planes = sizes.n * sizes.c;
  if (args.grad_x.data != nullptr) {
    uint8_t* const positions = reinterpret_cast<uint8_t*>(scratch);
    Acc<T>* const averages = reinterpret_cast<Acc<T>*>(scratch + position_bytes(problem, args));
    const auto find = [&](auto* found, int64_t bytes, const char* what) {
      if (bytes == 0) return;
      METAPOOL_LAUNCH((&windows_kernel<T, std::remove_pointer_t<decltype(found)>>),
                      ceil_div(planes * sizes.h_out * sizes.w_out, kGeneralThreads),
                      kGeneralThreads, 0, stream, sizes, x, candidates, found, channels_last);
      check(cudaGetLastError(), what);
    };
    find(positions, position_bytes(problem, args), "places of maxima");
    if constexpr (kForm == Form::kMoments) {
      find(averages, average_bytes(problem, args), "averages");
    }
    const int64_t stride_k = kForm == Form::kStack ? args.grad_out_stride_k : 0;
    const Given<T> given{grad_out, x, stride_k, fields_of<Acc<T>>(args)};
    METAPOOL_LAUNCH((&general_grad_x_kernel<T, kForm>),
                    ceil_div(planes * sizes.h * sizes.w, kGeneralThreads), kGeneralThreads, 0,
                    stream, sizes, given, map_of<T>(args.grad_x), candidates, positions, averages,
                    channels_last);
    check(cudaGetLastError(), "gradient of x");
  }
  if (args.grad_weights != nullptr) {
    const Terms terms = general_terms(problem, args);
    Acc<T>* const scratch_terms =
        reinterpret_cast<Acc<T>*>(scratch + position_bytes(problem, args));
    const int64_t blocks = planes * terms.parts < kMostBlocks ? planes * terms.parts : kMostBlocks;
    METAPOOL_LAUNCH((&general_terms_kernel<T>), blocks, kGeneralThreads,
                    kGeneralThreads * sizeof(double), stream, sizes, grad_out, x,
                    map_of<T>(args.values), candidates, scratch_terms, terms.parts);
    check(cudaGetLastError(), "gradient of the weights");
    launch_total(terms, scratch_terms, static_cast<Acc<T>*>(args.grad_weights), stream);
  }
}

template <typename T, Form kForm>
void launch(const Problem& problem, const BackwardArgs& args, char* scratch, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    Call of{problem, args, reinterpret_cast<float*>(scratch), stream, {}, columns_of(problem)};
    if (is_streamed(problem, args, of.slots)) return launch_slots<T, kForm>(of);
  }
  launch_general<T, kForm>(problem, args, scratch, stream);
}

}  // namespace

int64_t bwd_scratch_bytes(const Problem& problem, const BackwardArgs& args) {
  check_problem(problem);
  if (problem.n == 0) return 0;
  Slots slots;
  if (is_streamed(problem, args, slots)) {
    return term_bytes(
        problem, args,
        streamed_terms(problem, args, streamed_cut(problem, args, columns_of(problem))));
  }
  return position_bytes(problem, args) + average_bytes(problem, args) +
         term_bytes(problem, args, general_terms(problem, args));
}

void launch_meta_pool_bwd(const Problem& problem, const BackwardArgs& args, void* scratch,
                          Stream stream) {
  check_problem(problem);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (problem.n == 0) {
    if (args.grad_weights == nullptr) return;
    const int64_t count = (args.grad_weights_per_n ? 0 : 1) *
                          (args.grad_weights_per_c ? problem.c : 1) *
                          static_cast<int64_t>(problem.candidates.size());
    if (count > 0) {
      check(cudaMemsetAsync(args.grad_weights, 0, count * accumulated_bytes(problem), on),
            "gradient of the weights");
    }
    return;
  }
  with_type(problem.dtype, [&](auto element) {
    with_form(problem.form, [&](auto form) {
      launch<decltype(element), decltype(form)::value>(problem, args, static_cast<char*>(scratch),
                                                       on);
    });
  });
}

}  // namespace metapool::cuda
