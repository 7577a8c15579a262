// The kernels for whatever the compiler's default target is: SSE2 on x86-64, NEON on 64-bit Arm.
#define MEDGS_VECTOR_BYTES 16
#include "kernels_body.h"
