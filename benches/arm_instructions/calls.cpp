// A call of the kernels, as often as asked for: CANDIDATES DTYPE LAYOUT DIRECTION CALLS. What two
// calls execute more than one is what one takes.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../../tests/native_calls.h"

int main(int count, char** words) {
  using namespace metapool;
  using namespace metapool::calls;
  if (count != 6) return 2;
  const std::string dtype = words[2], layout = words[3], direction = words[4];
  Setup setup{words[1], 8, 32, 28, 28};
  if (setup.why == "strips") setup.candidates = kStrips;
  setup.dtype = dtype == "float16"    ? DType::kFloat16
                : dtype == "bfloat16" ? DType::kBFloat16
                                      : DType::kFloat32;
  setup.channels_last = layout == "channels_last";
  setup.data = Data::kFine;
  const Inputs inputs(setup);
  for (int call = 0; call < std::atoi(words[5]); ++call) {
    direction == "forward" ? forward(inputs) : backward(inputs);
  }
  std::printf("%lld\n", static_cast<long long>(setup.n * setup.c * setup.h * setup.w));
}
