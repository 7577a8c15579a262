// What the torch side of every CUDA operator needs: the current stream, the device guard, and checked launches.
#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "../common/checks.h"
#include "launch.h"
