// Which problems the streamed kernels take, and candidates as kernels take them.
#pragma once

#include "../problem.h"
#include "general.cuh"
#include "lanes.cuh"

namespace metapool::cuda {

inline Candidates candidates_of(const Problem& problem) {
  if (problem.candidates.size() > kMaxCandidates) {
    throw std::invalid_argument("the CUDA kernels take at most " + std::to_string(kMaxCandidates) +
                                " candidates, got " + std::to_string(problem.candidates.size()));
  }
  Candidates candidates;
  candidates.count = static_cast<int>(problem.candidates.size());
  for (int k = 0; k < candidates.count; ++k) {
    candidates.codes[k] = static_cast<int16_t>(problem.candidates[k]);
  }
  return candidates;
}

// The slot of a candidate, or -1.
inline int slot_of(Window window) {
  if (window.kind == Kind::kNone) return kNoneSlot;
  if (window.kind == Kind::kSkip) return 0;
  if (window.radius_h != window.radius_w || window.radius_h > kReach) return -1;
  if (window.kind == Kind::kAvg) return window.radius_h > 0 ? window.radius_h : -1;
  return window.radius_h > 0 ? kAvgSlots + window.radius_h - 1 : -1;
}

// Puts candidates into slots; whether all of them found one for themselves.
inline bool find_slots(const Problem& problem, Slots& slots) {
  for (int& candidate : slots.candidate) candidate = -1;
  if (problem.stride_h != 1 || problem.stride_w != 1 || !problem.count_include_pad ||
      problem.h > kMostRows) {
    return false;
  }
  for (size_t k = 0; k < problem.candidates.size(); ++k) {
    const int slot = slot_of(decode_candidate(problem.candidates[k]));
    if (slot < 0 || slots.candidate[slot] >= 0) return false;
    slots.candidate[slot] = static_cast<int>(k);
  }
  return true;
}

// The streamed kernels take it, or else the general ones.
template <typename Args>
bool is_streamed(const Problem& problem, const Args& args, Slots& slots) {
  return problem.dtype != DType::kFloat64 && same_map(args.values, args.x) &&
         find_slots(problem, slots);
}

// Calls body(has_avg, has_max) with them as types.
template <typename Body>
void with_kinds(const Slots& slots, Body body) {
  bool any_avg = false, any_max = false;
  for (int r = 0; r < kAvgSlots; ++r) any_avg |= has_avg(slots, r);
  for (int r = 1; r <= kMaxSlots; ++r) any_max |= has_max(slots, r);
  if (!any_max) return body(std::true_type(), std::false_type());
  if (!any_avg) return body(std::false_type(), std::true_type());
  body(std::true_type(), std::true_type());
}

}  // namespace metapool::cuda
