#include "knn.h"

namespace simple_knn {
namespace {

constexpr int kThreads = 256;
constexpr int kAxes = 3;
constexpr int kNeighbours = 3;

// Spreads the low 21 bits of x to every third bit.
__device__ uint64_t spread_bits(uint64_t x) {
  x &= 0x1fffff;
  x = (x | x << 32) & 0x1f00000000ffff;
  x = (x | x << 16) & 0x1f0000ff0000ff;
  x = (x | x << 8) & 0x100f00f00f00f00f;
  x = (x | x << 4) & 0x10c30c30c30c30c3;
  x = (x | x << 2) & 0x1249249249249249;
  return x;
}

// The fused form is written out, so that the compiler rounds a point's distance and a box's in the same way: each step
// is monotonic, hence a box is never found farther away than a point in it, and skipping by box distance loses nothing.
template <typename scalar_t>
__device__ scalar_t squared_norm(scalar_t dx, scalar_t dy, scalar_t dz) {
  return fma(dx, dx, fma(dy, dy, dz * dz));
}

// How far x lies outside of [lowest, highest], 0 within.
template <typename scalar_t>
__device__ scalar_t gap(scalar_t x, scalar_t lowest, scalar_t highest) {
  return max(max(lowest - x, x - highest), scalar_t(0));
}

// Keeps the three smallest distances, ascending.
template <typename scalar_t>
__device__ void insert(scalar_t (&best)[kNeighbours], scalar_t distance) {
  if (distance >= best[2]) {
    return;
  }
  best[2] = max(best[1], min(best[2], distance));
  const scalar_t second = max(best[0], min(best[1], distance));
  best[0] = min(best[0], distance);
  best[1] = second;
}

template <typename scalar_t>
__global__ void morton_codes(const scalar_t* points, const scalar_t* lowest, const scalar_t* highest, int64_t n,
                             int64_t* codes) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) {
    return;
  }
  uint64_t code = 0;
  for (int axis = 0; axis < kAxes; ++axis) {
    const scalar_t extent = highest[axis] - lowest[axis];  // 0 for points in a plane
    const scalar_t place = extent > 0 ? (points[kAxes * i + axis] - lowest[axis]) / extent : scalar_t(0);
    code |= spread_bits(uint64_t(place * scalar_t(0x1fffff))) << axis;
  }
  codes[i] = int64_t(code);
}

// One thread per box: a box is short, and the search that follows is far longer.
template <typename scalar_t>
__global__ void bounding_boxes(const scalar_t* sorted, int64_t n, scalar_t* boxes) {
  const int64_t box = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t begin = box * kPointsPerBox;
  const int64_t end = min(begin + kPointsPerBox, n);
  if (begin >= n) {
    return;
  }
  for (int axis = 0; axis < kAxes; ++axis) {
    scalar_t lowest = sorted[kAxes * begin + axis];
    scalar_t highest = lowest;
    for (int64_t i = begin + 1; i < end; ++i) {
      lowest = min(lowest, sorted[kAxes * i + axis]);
      highest = max(highest, sorted[kAxes * i + axis]);
    }
    boxes[2 * kAxes * box + axis] = lowest;
    boxes[2 * kAxes * box + kAxes + axis] = highest;
  }
}

// One thread per point. The threads of a warp are neighbours in space, so they mostly open the same boxes.
template <typename scalar_t>
__global__ void mean_squared_distances(const scalar_t* sorted, const int64_t* order, const scalar_t* boxes, int64_t n,
                                       scalar_t* means) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) {
    return;
  }
  const scalar_t x = sorted[kAxes * i];
  const scalar_t y = sorted[kAxes * i + 1];
  const scalar_t z = sorted[kAxes * i + 2];
  const scalar_t unset = scalar_t(INFINITY);
  scalar_t best[kNeighbours] = {unset, unset, unset};

  const auto search = [&](int64_t box) {
    const int64_t end = min((box + 1) * kPointsPerBox, n);
    for (int64_t j = box * kPointsPerBox; j < end; ++j) {
      if (j != i) {
        insert(best, squared_norm(x - sorted[kAxes * j], y - sorted[kAxes * j + 1], z - sorted[kAxes * j + 2]));
      }
    }
  };

  const int64_t own = i / kPointsPerBox;
  const int64_t count = (n + kPointsPerBox - 1) / kPointsPerBox;
  search(own);
  for (int64_t box = 0; box < count; ++box) {
    const scalar_t* bounds = boxes + 2 * kAxes * box;
    const scalar_t distance =
        squared_norm(gap(x, bounds[0], bounds[3]), gap(y, bounds[1], bounds[4]), gap(z, bounds[2], bounds[5]));
    if (box != own && distance < best[2]) {
      search(box);
    }
  }

  // Fewer than four points leave fewer than three neighbours: the mean of those there are, 0 for a lone point.
  const int found = n > kNeighbours ? kNeighbours : int(n) - 1;
  scalar_t sum = 0;
  for (int k = 0; k < found; ++k) {
    sum += best[k];
  }
  means[order[i]] = found > 0 ? sum / scalar_t(found) : scalar_t(0);
}

inline unsigned int grid(int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); }

}  // namespace

template <typename scalar_t>
void launch_morton_codes(const scalar_t* points, const scalar_t* lowest, const scalar_t* highest, int64_t n,
                         int64_t* codes, cudaStream_t stream) {
  morton_codes<<<grid(n), kThreads, 0, stream>>>(points, lowest, highest, n, codes);
}

template <typename scalar_t>
void launch_bounding_boxes(const scalar_t* sorted, int64_t n, scalar_t* boxes, cudaStream_t stream) {
  bounding_boxes<<<grid(box_count(n)), kThreads, 0, stream>>>(sorted, n, boxes);
}

template <typename scalar_t>
void launch_mean_squared_distances(const scalar_t* sorted, const int64_t* order, const scalar_t* boxes, int64_t n,
                                   scalar_t* means, cudaStream_t stream) {
  mean_squared_distances<<<grid(n), kThreads, 0, stream>>>(sorted, order, boxes, n, means);
}

#define INSTANTIATE(scalar_t)                                                                                       \
  template void launch_morton_codes(const scalar_t*, const scalar_t*, const scalar_t*, int64_t, int64_t*,           \
                                    cudaStream_t);                                                                  \
  template void launch_bounding_boxes(const scalar_t*, int64_t, scalar_t*, cudaStream_t);                           \
  template void launch_mean_squared_distances(const scalar_t*, const int64_t*, const scalar_t*, int64_t, scalar_t*, \
                                              cudaStream_t);

INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace simple_knn
