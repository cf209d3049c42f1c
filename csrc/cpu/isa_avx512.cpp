// The kernels for x86-64 with AVX-512 (F, BW, DQ, VL).
#define METAPOOL_ISA avx512
#include "kernels.h"

namespace metapool::cpu {

namespace {

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

const Isa kIsaAvx512 = {"avx512", has_avx512, &avx512::kKernels};

}  // namespace metapool::cpu
