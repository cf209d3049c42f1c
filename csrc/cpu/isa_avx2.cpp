// The kernels for x86-64 with AVX2.
#define METAPOOL_ISA avx2
#include "kernels.h"

namespace metapool::cpu {

namespace {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }

}  // namespace

const Isa kIsaAvx2 = {"avx2", has_avx2, &avx2::kKernels};

}  // namespace metapool::cpu
