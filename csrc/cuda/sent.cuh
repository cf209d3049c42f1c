// What windows send back to the pixels that they hold, by form.
#pragma once

#include "maps.cuh"

namespace metapool::cuda {

// The fields of a call, see BackwardArgs.
template <typename A>
struct Fields {
  Weights<A> weights, offsets, slopes, shifts;
};

template <typename A>
Fields<A> fields_of(const BackwardArgs& args) {
  return {weights_of<A>(args.weights), weights_of<A>(args.offsets), weights_of<A>(args.slopes),
          weights_of<A>(args.shifts)};
}

// Of one candidate and channel: of a mixture the weight alone, side by side nothing.
template <typename A>
struct Field {
  A weight, offset, slope, shift;
};

template <Form kForm, typename A>
METAPOOL_INLINE Field<A> field_of(const Fields<A>& fields, int64_t n, int64_t c, int k) {
  Field<A> field{};
  if constexpr (kForm != Form::kStack) field.weight = fields.weights.at(n, c, k);
  if constexpr (kForm == Form::kMoments) {
    field.offset = fields.offsets.at(n, c, k);
    field.slope = fields.slopes.at(n, c, k);
    field.shift = fields.shifts.at(n, c, k);
  }
  return field;
}

// What a window sends. `pooled` is called for its value where that matters: without a slope it may
// be no number.
template <Form kForm, typename A, typename Pooled>
METAPOOL_INLINE A sent(const Field<A>& field, A grad, const Pooled& pooled) {
  if constexpr (kForm == Form::kStack) return grad;
  if constexpr (kForm == Form::kMix) return field.weight * grad;
  const A given = field.weight * grad + field.offset;
  return field.slope == 0 ? given : given + field.slope * (pooled() - field.shift);
}

}  // namespace metapool::cuda
