// Mean squared distance to the three nearest neighbours, exactly: the steps, in the order in which bindings.cpp runs
// them.
//
// The points are sorted along a Morton curve and cut into runs of `kPointsPerBox`, each with its bounding box. A point
// first looks through its own box, then through every box that is nearer than its third nearest neighbour so far.
// The order decides how many boxes that is, never the result.
//
// Device pointers throughout; scalar_t is float or double. No torch header: plain nvcc compiles knn.cu anywhere.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace simple_knn {

constexpr int64_t kPointsPerBox = 256;

inline int64_t box_count(int64_t n) { return (n + kPointsPerBox - 1) / kPointsPerBox; }

// Places along the curve: 21 bits an axis over the extent of the points.
template <typename scalar_t>
void launch_morton_codes(const scalar_t* points,   // [n, 3]
                         const scalar_t* lowest,   // [3]
                         const scalar_t* highest,  // [3]
                         int64_t n,
                         int64_t* codes,  // [n]
                         cudaStream_t stream);

template <typename scalar_t>
void launch_bounding_boxes(const scalar_t* sorted,  // [n, 3] points in the order of their codes
                           int64_t n,
                           scalar_t* boxes,  // [box_count(n), 6] lowest corner, highest corner
                           cudaStream_t stream);

template <typename scalar_t>
void launch_mean_squared_distances(const scalar_t* sorted,  // [n, 3]
                                   const int64_t* order,    // [n] the index among `points` of each sorted point
                                   const scalar_t* boxes,   // [box_count(n), 6]
                                   int64_t n,
                                   scalar_t* means,  // [n] in the order of `points`
                                   cudaStream_t stream);

}  // namespace simple_knn
