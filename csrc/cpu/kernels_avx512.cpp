#define SLM_ISA isa_avx512
#define SLM_TILE_T 4

#include "kernels.h"

#include "vec_avx512.h"

#include "kernels.inc"

#include "one_token.inc"

#include "search.inc"

#include "code_search.inc"

#include "read.inc"

#include "linear.inc"

const slm::Kernels* slm::kernels_avx512() { return &slm::SLM_ISA::table; }
