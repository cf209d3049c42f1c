// The kernels for every machine of the architecture (SSE2 on x86-64, NEON on AArch64).
#define METAPOOL_ISA baseline
#include "kernels.h"

namespace metapool::cpu {

namespace {

bool always() { return true; }

}  // namespace

const Isa kIsaBaseline = {"baseline", always, &baseline::kKernels};

}  // namespace metapool::cpu
