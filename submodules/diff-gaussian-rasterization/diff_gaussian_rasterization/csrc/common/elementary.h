// The elementary functions behind the common headers, for whoever compiles them: of scalars in a CUDA file, of vectors
// in the CPU kernels.
#pragma once

#if defined(__CUDACC__)
#include "../cuda/scalar.cuh"
#else
#include "../cpu/simd.h"
#endif
