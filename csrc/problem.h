// What every native backend refuses, before anything is written.
#pragma once

#include <stdexcept>

#include "meta_pool.h"
#include "window.h"

namespace metapool {

// Throws std::invalid_argument.
inline void check_problem(const Problem& problem) {
  const auto require = [](bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
  };
  require(problem.n >= 0 && problem.c > 0 && problem.h > 0 && problem.w > 0,
          "x should have non-zero channels, height and width");
  require(problem.stride_h > 0 && problem.stride_w > 0, "stride should be positive");
  require(!problem.candidates.empty(), "candidates is empty");
  for (const int64_t code : problem.candidates) {
    require(is_candidate_code(code), "unknown candidate code");
    require(decode_candidate(code).kind != Kind::kSkip ||
                (problem.stride_h == 1 && problem.stride_w == 1),
            "skip_connect needs stride 1");
  }
}

}  // namespace metapool
