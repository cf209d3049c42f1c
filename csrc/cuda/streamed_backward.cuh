// Backward of square windows of 3, 5 and 7 at stride 1, in every form, all gradients in one pass.
//
// When input row t has come, the windows around row t - 3 are complete. In shared memory every lane
// has the sums of the last eight rows, over its own columns and those that its windows reach, and
// adds there what its windows send. The maximum of a window is found along rows first, then down
// the column, and carries its place along. Row t - 6 is then complete: each of its columns takes
// what its own lane and the lanes beside it have for it. No two threads ever add to the same place.
//
// What averages of a mixture give is the forward of the incoming gradient. In the other forms each
// sends something else: that is added up down the column, and goes along a row, to the sums, when
// nothing more comes to it. Rows go through shared memory where lanes need columns beside their
// own.
//
// The place is found by comparisons that are wrong for NaN, of which the last counts, and unless it
// is found by keys for windows of nothing but -Inf, which equals what is beyond the map. A block
// that has met them runs again, carefully.
#pragma once

#include "backward_stream.cuh"

namespace metapool::cuda {

template <typename T, Form kForm, bool kAvg, bool kMax, int kColumns, Access kAccess, bool kCareful>
METAPOOL_DEVICE bool run_stream(const Sizes& sizes, const Cut& cut, const Slots& slots,
                                const Lane& lane, const Backward<T>& call, float* shared) {
  using Stream = BackwardStream<T, kForm, kAvg, kMax, kColumns, kAccess, kCareful>;
  constexpr bool kAlongPlanes = kAccess == Access::kStrided;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = lane.group * kColumns;
  const bool has_place = lane.in_block < cut.planes && lane.in_plane < cut.lanes;
  const int first_column = (has_place ? lane.in_plane * kColumns : 0) + kGuard<kAccess>;
  const int in_block = has_place ? lane.in_block : 0;
  const int column_stride = kAlongPlanes ? cut.planes : 1;
  const int plane_stride = kAlongPlanes ? 1 : cut.lanes * kColumns + kGuard<kAccess>;
  Stream stream{{slots,
                 lane,
                 call,
                 call.grad_out.plane(lane.n, lane.c) + column * call.grad_out.stride_w,
                 call.x.plane(lane.n, lane.c) + column * call.x.stride_w,
                 call.grad_x.data == nullptr
                     ? nullptr
                     : call.grad_x.plane(lane.n, lane.c) + column * call.grad_x.stride_w,
                 shared,
                 forget_origin(thread),
                 {},
                 forget_origin(in_block * plane_stride + first_column * column_stride),
                 column_stride,
                 has_place,
                 static_cast<int>(sizes.h),
                 columns_inside<kColumns, kReach>(lane, sizes.w)}};
#pragma unroll
  for (int k = -kNeighbours<kColumns>; k <= kNeighbours<kColumns>; ++k) {
    const bool exists = lane.in_plane + k >= 0 && lane.in_plane + k < cut.lanes;
    stream.neighbours[kNeighbours<kColumns> + k] =
        forget_origin(exists ? thread + k * (kAlongPlanes ? cut.planes : 1) : kBackwardThreads);
  }
  // The lanes beside one that is not on the map collect nothing from it, whatever the terms are.
  if (lane.is_on_map) {
#pragma unroll
    for (int slot = 0; slot < kNoneSlot; ++slot) {
      const int k = slots.candidate[slot];
      if (k >= 0) stream.fields[slot] = field_of<kForm>(call.fields, lane.n, lane.c, k);
    }
  }
  prepare_shared<typename Stream::Shared>(shared, Stream::shown_beyond());
  stream.run();
  if (stream.wants_terms()) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const double share = slot < kAvgSlots ? share_of_pixel<double>(slot) : 1.0;
      double& found = stream.found(slot);
      found = lane.is_owner ? found * share : 0.0;
    }
    write_terms<kBackwardThreads>(call.of_terms, slots, cut, lane, stream.found_of_all(),
                                  call.terms);
  }
  return stream.is_special();
}

template <typename T, bool kAvg, bool kMax, int kColumns, Access kAccess, Form kForm>
__global__ void __launch_bounds__(kBackwardThreads, kMax || kForm == Form::kMoments ? 2 : 3)
    streamed_bwd_kernel(const __grid_constant__ Sizes sizes, const __grid_constant__ Cut cut,
                        const __grid_constant__ Slots slots,
                        const __grid_constant__ Backward<T> call) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* const shared = reinterpret_cast<float*>(shared_memory);
  const Lane lane = lane_of(sizes, cut);
  const bool is_special = run_stream<T, kForm, kAvg, kMax, kColumns, kAccess, false>(
      sizes, cut, slots, lane, call, shared);
  if constexpr (kMax) {
    if (__syncthreads_or(is_special)) {
      run_stream<T, kForm, kAvg, kMax, kColumns, kAccess, true>(sizes, cut, slots, lane, call,
                                                                shared);
    }
  }
}

}  // namespace metapool::cuda
