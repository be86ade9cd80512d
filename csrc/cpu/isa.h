#pragma once

#include "kernels.h"

namespace slm {

// The kernels of the best instruction set this processor has, or the one that SLM_FAST_ISA asks for.
// Throws std::invalid_argument if SLM_FAST_ISA is unknown or not supported here.
const Kernels& kernels();

}  // namespace slm
