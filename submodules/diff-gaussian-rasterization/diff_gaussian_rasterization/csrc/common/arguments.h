// What the kernels of `fold` and `blend` take, on the CPU and on CUDA: raw pointers of one device, and sizes.
#pragma once

#include <cstdint>

namespace medgs {

constexpr int kMostChannels = 18;  // that one walk over the lists blends: with the six moments three groups of eight

/// Numbers in the record that `blend_backward` writes for one pair of Gaussian and tile: five moments and one sum of
/// w = dL/d(-q/2) over the tile's pixels, (sum w dx, w dy, w dx^2, w dx dy, w dy^2, w), then dL/dcolour. Eight are
/// reduced together: few channels have one group and single numbers, many have whole groups. With `absolute` the sums
/// of |dL/dmean| over the pixels follow, one an axis.
constexpr int record_size(int64_t channels, bool absolute = false) {
  const int numbers = 6 + int(channels) + (absolute ? 2 : 0);
  return channels <= 2 ? 8 : channels <= 4 ? numbers : (numbers + 7) / 8 * 8;
}
template <int C, bool Absolute = false>
constexpr int kRecordSize = record_size(C, Absolute);

/// The channels that a GPU's kernel is compiled for, at least as many as asked: the surplus are zeros.
constexpr int64_t compiled_channels(int64_t channels) {
  return channels <= 4 ? channels : channels <= 10 ? 10 : kMostChannels;
}

constexpr int kMaxRenders = 64;  // renders and views in one call

/// Tiles [x0, x1) x [y0, y1); empty when x1 <= x0. The largest image has 32768 pixels a side.
struct TileRectangle {
  uint16_t x0, x1, y0, y1;
};

template <class S>
struct FoldArguments {
  int64_t gaussians, views, degree;                    // N, V, P
  const S *xyz, *w1, *m, *sigma, *scaling, *rotation;  // (N,3) (N,2P) (N) (N) (N,3) (N), raw
  const S *times, *signs;                              // (V) (V)
  S pixels_per_unit;
  int64_t width, height;
  // forward
  S *means2d, *conics;  // (V,N,2) px, (V,N,3)
  int32_t* radii;       // (V,N) px
  uint8_t* active;      // (V,N) bits
  // backward
  const int32_t* forward_radii;                              // (V,N)
  const S *v_means2d, *v_conics;                             // (V,N,2) (V,N,3)
  S *v_xyz, *v_w1, *v_m, *v_sigma, *v_scaling, *v_rotation;  // as the parameters
  S* v_times;  // (chunks, V): partial sums over kFoldChunk Gaussians each, of which each device has its own
};

/// What decides which tiles the Gaussians of one view reach.
template <class S>
struct BoundsArguments {
  const S *means2d, *conics;  // (N,2) (N,3)
  const uint8_t* active;      // (N)
  const S* limits;            // (N): largest q that is seen
  uint8_t bits;               // of `active` that any render of the view draws
  int64_t width, height;
  TileRectangle* rectangles;  // (N)
};

template <class S>
struct BlendArguments {
  int64_t gaussians, view_count, renders, width, height, tile, tiles_x, tiles_y;  // tile: px a side, of the lists
  int64_t channels, stride;                    // C of this walk, and of colours, backgrounds and images in memory
  bool first_slice;                            // of the channels: what all share is written, else added to
  const int64_t *views, *heads, *bits;         // (R) each, on the host: see `blend` in ops.py
  const int64_t* render_layers;                // (R), on the host: how many renders of the same view come before
  const bool* check_bits;                      // (R): do some pairs of the view lack the render's bit?
  const S *means2d, *conics;                   // (V,N,2) (V,N,3)
  const uint8_t* active;                       // (V,N)
  const S *opacities, *colours;                // (heads,N) (heads,N,C); of all with C the walk's first channel
  const S* backgrounds;                        // (R,C)
  const int32_t* order;                        // (N), of a single view: front to back, or null: by index
  const int32_t* tile_offsets;                 // (V, tiles + 1): each tile's range of pairs
  const int32_t *pair_gaussians, *pair_slots;  // (pairs): front to back within a tile
  S *images, *transmittance;                   // (R,C,H,W) (R,H,W)
  S* last_image;                               // (H,W): the last channel of a single render, if not among the images
  int32_t* stops;                              // (R,H,W): pairs of its tile in front of where a pixel stops
  int64_t pairs, layers;                       // room for pairs; most renders of one view
  // CUDA: the lists are cut into segments
  int64_t segments;
  const int32_t* segment_tiles;  // (segments): tile of each, counted over all views, or -1
  int64_t slots;                 // room for the segments of tiles that have several
  S* starts;                     // (layers, slots, C + 1, pixels): transmittance and colour in front of each of those
  int32_t* touched;              // (N): pixels that a Gaussian is drawn at while transmittance exceeds 1/2, or null
  // backward; what is null counts as zeros
  const S *v_images, *v_last_image, *v_transmittance;  // (R,C,H,W) (H,W) (R,H,W)
  const int32_t* gaussian_offsets;                     // (V N + 1): the slots of each Gaussian of each view
  S *v_means2d, *v_conics;                             // (heads,V,N,2) (V,N,3)
  S *v_opacities, *v_colours;                          // (heads,N) (heads,N,C)
  S* v_absolute;  // (N,2), of a single view and head of 4 channels: sums of |dL/dmean|, or null
  S* records;     // (layers, pairs, record_size(C))
};

/// What lies between `project` and blending: footprints to what is blended, and gradients back.
template <class S>
struct SplatArguments {
  int64_t gaussians;
  bool inverse;                                           // depth is blended as 1 / z
  S half_width, half_height;                              // px in an NDC unit
  const S *depths, *colours, *compensations, *opacities;  // (N) (N,3) (N) (N)
  const int32_t* radii;                                   // (N)
  S *alphas, *features;                                   // (N) (N,4): opacity; colour and depth
  uint8_t* active;                                        // (N)
  // backward
  const S *v_means2d, *v_absolute, *v_alphas, *v_features;             // (N,2) (N,2) (N) (N,4)
  S *v_depths, *v_colours, *v_compensations, *v_opacities, *v_screen;  // v_screen: (N, columns), or null
  int64_t columns;
};

/// L1 and structural similarity of images and what they should be, and the gradient of the latter.
constexpr int kWindow = 11;  // taps of the Gaussian window (Wang et al. 2004)
constexpr int kHalo = kWindow / 2;

template <class S>
struct SimilarityArguments {
  int64_t planes, width, height;  // B C planes of one image each
  const S *images, *targets;      // (planes, height, width)
  S window[kWindow];              // one axis of the separable window, of sum 1
  S c1, c2;                       // the constants that keep the quotients finite
  S* maps;                        // (3, planes, height, width): dSSIM/d(mean x, mean x^2, mean xy); scratch
  int64_t parts;
  S* sums;       // (parts, 2): sums of |x - y| and of SSIM over parts of the planes
  S *l1, *ssim;  // () each: their means over all pixels
  S* gradient;   // (planes, height, width): d(sum of SSIM)/d images, or null
};

/// One tensor of an Adam step, with its rate over 1 - beta1^t, and 1 / sqrt(1 - beta2^t).
template <class S>
struct AdamTensor {
  int64_t size;
  S *parameter, *first_moment, *second_moment;
  const S* gradient;
  S rate, correction;
};

template <class S>
struct AdamConstants {
  S beta1, beta2, rest1, rest2, epsilon;  // rest = 1 - beta, subtracted in double precision
};

/// The statistics of density control, added to in place.
template <class S>
struct ObserveArguments {
  int64_t gaussians, views;
  uint8_t bit;                                                             // of `active` that makes a Gaussian visible
  S half_width, half_height;                                               // px in an NDC unit
  const int32_t* radii;                                                    // (V,N) px
  const uint8_t* active;                                                   // (V,N)
  const S *screen_gradients, *m_gradients;                                 // (V,N,2) by px, (N)
  S *max_radii, *xyz_gradient_accum, *m_gradient_accum, *denom, *m_denom;  // (N) each
};

/// Mean of (low - sigma) below `low` plus mean of (sigma - high) above `high`, sigma = exp(raw).
template <class S>
struct SigmaArguments {
  int64_t gaussians, parts;
  S low, high;
  const S* raw;  // (N)
  S* sums;       // (parts, 4): sum and count below, sum and count above
  S* loss;       // ()
  S* gradient;   // (N): of the loss by raw
};

}  // namespace medgs
