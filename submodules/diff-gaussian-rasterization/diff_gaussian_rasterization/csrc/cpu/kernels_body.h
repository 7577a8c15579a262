// The CPU kernels, compiled once per instruction set (kernels_*.cpp set MEDGS_ISA, MEDGS_VECTOR_BYTES and the target).
// Raw pointers only: a template of the standard library instantiated here could be merged with another file's copy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../common/blending.h"
#include "../common/bounds.h"
#include "../common/folding.h"
#include "../common/similarity.h"
#include "../common/statistics.h"
#include "kernels.h"
#include "simd.h"

namespace medgs {
namespace MEDGS_ISA {

// ---- fold: W Gaussians at once, one a lane -------------------------------------------------------------------------

/// Lane l takes `base[(first + l) * stride]`; lanes past the end repeat the last Gaussian.
template <class S>
MEDGS_INLINE Vec<S> gather(const S* base, int64_t first, int64_t last, int64_t stride) {
  Vec<S> v;
  for (int l = 0; l < kLanes<S>; ++l) v[l] = base[(first + l < last ? first + l : last) * stride];
  return v;
}

template <class S>
MEDGS_INLINE FoldedGaussian<Vec<S>> load_gaussians(const FoldArguments<S>& in, int64_t first, int64_t last,
                                                   Vec<S>* path) {
  for (int64_t k = 0; k < 2 * in.degree; ++k) path[k] = gather(in.w1 + k, first, last, 2 * in.degree);
  return activate<Vec<S>, S>(gather(in.xyz, first, last, 3), gather(in.xyz + 2, first, last, 3),
                             gather(in.m, first, last, 1), gather(in.sigma, first, last, 1),
                             gather(in.scaling, first, last, 3), gather(in.scaling + 2, first, last, 3),
                             gather(in.rotation, first, last, 1));
}

template <class S>
void fold(const FoldArguments<S>& in, int threads) {
  constexpr int W = kLanes<S>;
  const S width = S(in.width), height = S(in.height);
  const S grid_width = S(ceil_div(in.width, int64_t(kVisibilityTile)) * kVisibilityTile);
  const S grid_height = S(ceil_div(in.height, int64_t(kVisibilityTile)) * kVisibilityTile);
  const int64_t blocks = ceil_div(in.gaussians, int64_t(W));
#pragma omp parallel for schedule(static) num_threads(threads_for(in.gaussians* in.views, threads))
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * W, last = in.gaussians - 1;
    const int lanes = int(in.gaussians - first < W ? in.gaussians - first : W);
    Vec<S> w[2 * kMaxDegree];
    const auto g = load_gaussians(in, first, last, w);
    const auto path = [&](int j, int axis) { return w[2 * j + axis]; };
    for (int64_t view = 0; view < in.views; ++view) {
      const auto c =
          cut<Vec<S>, S>(g, path, int(in.degree), in.times[view], in.signs[view], in.pixels_per_unit, width, height);
      const auto active = (c.time_weight > S(kMinTimeWeight)) & touches_tiles(c, grid_width, grid_height);
      const auto segmented = active & (c.scale_x > S(kMinSegmentationScale)) & (c.scale_z > S(kMinSegmentationScale));
      const int64_t row = view * in.gaussians + first;
      for (int l = 0; l < lanes; ++l) {
        S* mean = in.means2d + 2 * (row + l);
        S* conic = in.conics + 3 * (row + l);
        mean[0] = c.u[l];
        mean[1] = c.v[l];
        conic[0] = c.a[l];
        conic[1] = c.b[l];
        conic[2] = c.c[l];
        in.radii[row + l] = active[l] ? int32_t(bounded_radius(S(c.radius[l]))) : 0;
        in.active[row + l] = (active[l] ? kActive : 0) | (segmented[l] ? kActiveSegmentation : 0);
      }
    }
  }
}

template <class S>
void fold_backward(const FoldArguments<S>& in, int threads) {
  constexpr int W = kLanes<S>;
  const int64_t chunks = ceil_div(in.gaussians, kFoldChunk);
#pragma omp parallel for schedule(static) num_threads(threads_for(in.gaussians* in.views, threads))
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    S* v_times = in.v_times + chunk * in.views;
    for (int64_t view = 0; view < in.views; ++view) v_times[view] = 0;
    const int64_t end = (chunk + 1) * kFoldChunk < in.gaussians ? (chunk + 1) * kFoldChunk : in.gaussians;
    for (int64_t first = chunk * kFoldChunk; first < end; first += W) {
      const int lanes = int(end - first < W ? end - first : W);
      Vec<S> w[2 * kMaxDegree], v_w[2 * kMaxDegree];
      const auto g = load_gaussians(in, first, end - 1, w);
      for (int64_t k = 0; k < 2 * in.degree; ++k) v_w[k] = Vec<S>{};
      FoldedGradient<Vec<S>> v{};
      const auto path = [&](int j, int axis) { return w[2 * j + axis]; };
      for (int64_t view = 0; view < in.views; ++view) {
        const int64_t row = view * in.gaussians + first;
        // A dropped Gaussian gets zeros for its incoming gradients, so its lane adds nothing; its own numbers may be
        // infinite there, which is why the products are masked once more below.
        Vec<S> u{}, y{}, a{}, b{}, c{};
        Mask<S> seen{};
        for (int l = 0; l < lanes; ++l) {
          if (in.forward_radii[row + l] <= 0) continue;
          seen[l] = -1;
          u[l] = in.v_means2d[2 * (row + l)];
          y[l] = in.v_means2d[2 * (row + l) + 1];
          a[l] = in.v_conics[3 * (row + l)];
          b[l] = in.v_conics[3 * (row + l) + 1];
          c[l] = in.v_conics[3 * (row + l) + 2];
        }
        if (!any(seen)) continue;
        FoldedGradient<Vec<S>> share{};
        const auto masked = [&](Vec<S> x) { return seen ? x : Vec<S>{}; };
        const auto path_gradient = [&](int j, int axis, Vec<S> x) { v_w[2 * j + axis] += masked(x); };
        const auto v_time = cut_backward<Vec<S>, S>(g, path, int(in.degree), in.times[view], in.signs[view],
                                                    in.pixels_per_unit, u, y, a, b, c, share, path_gradient);
        v.x += masked(share.x);
        v.z += masked(share.z);
        v.m += masked(share.m);
        v.sigma += masked(share.sigma);
        v.scale_x += masked(share.scale_x);
        v.scale_z += masked(share.scale_z);
        v.rotation += masked(share.rotation);
        v_times[view] += sum<S>(masked(v_time));
      }
      finish<Vec<S>, S>(g, v);
      for (int l = 0; l < lanes; ++l) {
        const int64_t n = first + l;
        in.v_xyz[3 * n] = v.x[l];
        in.v_xyz[3 * n + 1] = 0;
        in.v_xyz[3 * n + 2] = v.z[l];
        in.v_scaling[3 * n] = v.scale_x[l];
        in.v_scaling[3 * n + 1] = 0;
        in.v_scaling[3 * n + 2] = v.scale_z[l];
        in.v_m[n] = v.m[l];
        in.v_sigma[n] = v.sigma[l];
        in.v_rotation[n] = v.rotation[l];
        for (int64_t k = 0; k < 2 * in.degree; ++k) in.v_w1[2 * in.degree * n + k] = v_w[k][l];
      }
    }
  }
}

/// Tiles that Gaussians [begin, end) of a view reach, W Gaussians at once.
template <class S>
void bound(const BoundsArguments<S>& in, int64_t begin, int64_t end) {
  const S width = S(in.width), height = S(in.height);
  for (int64_t first = begin; first < end; first += kLanes<S>) {
    const int64_t last = end - 1;
    PixelBounds<Vec<S>> p;
    const auto some = pixel_bounds<Vec<S>, S>(
        gather(in.means2d, first, last, 2), gather(in.means2d + 1, first, last, 2), gather(in.conics, first, last, 3),
        gather(in.conics + 1, first, last, 3), gather(in.conics + 2, first, last, 3), gather(in.limits, first, last, 1),
        width, height, p);
    for (int l = 0; l < kLanes<S> && first + l < end; ++l)
      in.rectangles[first + l] = some[l] && (in.active[first + l] & in.bits)
                                     ? tiles_of<kTile>(p.left[l], p.right[l], p.top[l], p.bottom[l])
                                     : TileRectangle{0, 0, 0, 0};
  }
}

// ---- blend: the 16 pixels of a tile at once, one per lane -----------------------------------------------------------

constexpr int kPixels = kTile * kTile;
template <class S>
constexpr int kParts = kPixels / kLanes<S>;  // vectors that hold one number of every pixel of the tile

/// 16 pixels, and where their tile's list is. A list serves a square of such tiles, its parts.
template <class S>
struct TileFrame {
  Vec<S> x[kParts<S>], y[kParts<S>];  // pixel centres
  Mask<S> inside[kParts<S>];          // pixels of the image (the last tiles may hang over)
  int64_t x0, y0;
  int columns, rows;

  MEDGS_INLINE TileFrame(int64_t tile, int64_t part, const BlendArguments<S>& in) {
    const int64_t side = in.tile / kTile;
    x0 = tile % in.tiles_x * in.tile + part % side * kTile;
    y0 = tile / in.tiles_x * in.tile + part / side * kTile;
    columns = int(in.width - x0 < kTile ? in.width - x0 : kTile);
    rows = int(in.height - y0 < kTile ? in.height - y0 : kTile);
    for (int i = 0; i < kPixels; ++i) {
      const int k = i / kLanes<S>, l = i % kLanes<S>;
      x[k][l] = S(x0 + i % kTile);
      y[k][l] = S(y0 + i / kTile);
      inside[k][l] = (i % kTile < columns && i / kTile < rows) ? -1 : 0;
    }
  }

  MEDGS_INLINE bool empty() const { return columns <= 0 || rows <= 0; }
  /// Pixel i of the tile in an image of the given start.
  MEDGS_INLINE int64_t at(int i, int64_t width) const { return (y0 + i / kTile) * width + x0 + i % kTile; }
};

/// Parts of a tile, and how many tiles one thread takes at once.
template <class S>
MEDGS_INLINE int parts_of(const BlendArguments<S>& in) {
  return int((in.tile / kTile) * (in.tile / kTile));
}
constexpr int kPartsAtOnce = 32;

constexpr int kAhead = 8;  // pairs between asking for a Gaussian's numbers and using them

/// Runs `body(pair, n, drawn, mean, conic, opacity, colour)` front to back over a tile's pairs until it returns false.
template <class S, class Body>
MEDGS_INLINE void for_each_pair(const BlendArguments<S>& in, int64_t render, int64_t tile, const Body& body) {
  const int64_t view = in.views[render], tiles = in.tiles_x * in.tiles_y;
  const int32_t* offsets = in.tile_offsets + view * (tiles + 1) + tile;
  const S* means = in.means2d + 2 * view * in.gaussians;
  const S* conics = in.conics + 3 * view * in.gaussians;
  const S* opacities = in.opacities + in.heads[render] * in.gaussians;
  const S* colours = in.colours + in.heads[render] * in.gaussians * in.stride;
  const uint8_t* active = in.active + view * in.gaussians;
  const uint8_t bit = uint8_t(in.bits[render]);
  const bool check = in.check_bits[render];
  for (int64_t pair = offsets[0]; pair < offsets[1]; ++pair) {
    const int64_t n = in.pair_gaussians[pair];
    const int64_t soon = in.pair_gaussians[pair + kAhead < offsets[1] ? pair + kAhead : pair];
    __builtin_prefetch(means + 2 * soon);
    __builtin_prefetch(conics + 3 * soon);
    __builtin_prefetch(opacities + soon);
    __builtin_prefetch(colours + soon * in.stride);
    const bool drawn = !check || (active[n] & bit);
    if (!body(pair, n, drawn, means + 2 * n, conics + 3 * n, opacities[n], colours + n * in.stride)) break;
  }
}

/// C is the number of channels, or kMostChannels, which serves any number up to it. A number that is known when the
/// template is read: else loops over channels are unrolled too late for registers.
#define MEDGS_CHANNELS (C == kMostChannels ? int(in.channels) : C)
#define MEDGS_RECORD (C == kMostChannels ? record_size(in.channels) : R)

/// The plane of channel c among the images of a render, or their gradients; null where there are none.
template <class S, class T>
MEDGS_INLINE T* plane_of(const BlendArguments<S>& in, T* images, T* last, bool apart, int64_t render, int c) {
  if (apart && c == in.channels - 1) return last;
  return images ? images + (render * in.stride + c) * in.width * in.height : nullptr;
}

template <class S, int C, bool Counting>
void blend_channels(const BlendArguments<S>& in, int threads) {
  constexpr int K = kParts<S>;
  const int64_t tiles = in.tiles_x * in.tiles_y, area = in.width * in.height;
  const int parts = parts_of(in), chunk = parts < kPartsAtOnce ? kPartsAtOnce / parts : 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads_for(in.renders* area, threads))
  for (int64_t job = 0; job < in.renders * tiles; ++job) {
    const int64_t render = job / tiles, tile = job % tiles;
    const int64_t start = in.tile_offsets[in.views[render] * (tiles + 1) + tile];
    for (int part = 0; part < parts; ++part) {
      const TileFrame<S> frame(tile, part, in);
      if (frame.empty()) continue;
      Vec<S> image[C][K], transmittance[K];
      Mask<S> running[K], stop[K];
      for (int k = 0; k < K; ++k) {
        transmittance[k] = Vec<S>{} + S(1);
        running[k] = frame.inside[k];
        stop[k] = Mask<S>{};
        for (int c = 0; c < MEDGS_CHANNELS; ++c) image[c][k] = Vec<S>{};
      }
      for_each_pair(
          in, render, tile,
          [&](int64_t pair, int64_t n, bool drawn, const S* mean, const S* conic, S opacity, const S* colour) {
            if (!drawn) return true;
            bool saturated = false;
            for (int k = 0; k < K; ++k) {
              const auto g = contribution<Vec<S>, S>(frame.x[k], frame.y[k], mean[0], mean[1], conic[0], conic[1],
                                                     conic[2], opacity);
              const Vec<S> next = transmittance[k] * (S(1) - g.alpha);
              const Mask<S> ends = running[k] & g.hit & (next < S(kMinTransmittance));
              running[k] &= ~ends;
              const Mask<S> used = running[k] & g.hit;
              if constexpr (Counting) {
                const Mask<S> touches = used & (transmittance[k] > S(kTouchedTransmittance));
                int32_t pixels = 0;
                for (int l = 0; l < kLanes<S>; ++l) pixels -= int32_t(touches[l]);
                if (pixels > 0)
#pragma omp atomic
                  in.touched[n] += pixels;
              }
              const Vec<S> weight = used ? g.alpha * transmittance[k] : Vec<S>{};
              for (int c = 0; c < MEDGS_CHANNELS; ++c) image[c][k] += colour[c] * weight;
              transmittance[k] = used ? next : transmittance[k];
              stop[k] = used ? Mask<S>{} + typename Integer<S>::type(pair - start + 1) : stop[k];
              saturated |= any(ends);
            }
            if (!saturated) return true;
            for (int k = 0; k < K; ++k)
              if (any(running[k])) return true;
            return false;
          });
      for (int i = 0; i < kPixels; ++i) {
        const int k = i / kLanes<S>, l = i % kLanes<S>;
        if (!frame.inside[k][l]) continue;
        const int64_t at = frame.at(i, in.width);
        in.transmittance[render * area + at] = transmittance[k][l];
        in.stops[render * area + at] = int32_t(stop[k][l]);
        for (int c = 0; c < MEDGS_CHANNELS; ++c)
          plane_of(in, in.images, in.last_image, in.last_image != nullptr, render, c)[at] =
              image[c][k][l] + transmittance[k][l] * in.backgrounds[render * in.stride + c];
      }
    }
  }
}

/// Front to back again, with what is still behind a pixel in one number; see power_gradient. Each pair writes one
/// record of its own, which the caller sums per Gaussian: no atomics, and the same bits whatever the number of threads.
template <class S, int C, bool Absolute>
void blend_backward_channels(const BlendArguments<S>& in, int threads) {
  constexpr int K = kParts<S>, R = kRecordSize<C, Absolute>;
  const int64_t tiles = in.tiles_x * in.tiles_y, area = in.width * in.height;
  const int parts = parts_of(in), chunk = parts < kPartsAtOnce ? kPartsAtOnce / parts : 1;
  const bool apart = in.last_image != nullptr;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads_for(in.renders* area, threads))
  for (int64_t job = 0; job < in.renders * tiles; ++job) {
    const int64_t render = job / tiles, tile = job % tiles;
    const int64_t start = in.tile_offsets[in.views[render] * (tiles + 1) + tile];
    for (int part = 0; part < parts; ++part) {
      const TileFrame<S> frame(tile, part, in);
      if (frame.empty()) continue;
      Vec<S> v_image[C][K], transmittance[K], behind[K];
      Mask<S> stop[K];
      int64_t deepest = 0;
      for (int i = 0; i < kPixels; ++i) {
        const int k = i / kLanes<S>, l = i % kLanes<S>;
        stop[k][l] = 0;
        behind[k][l] = 0;
        transmittance[k][l] = 1;
        for (int c = 0; c < MEDGS_CHANNELS; ++c) v_image[c][k][l] = 0;
        if (!frame.inside[k][l]) continue;
        const int64_t at = frame.at(i, in.width);
        S rest = in.v_transmittance ? in.v_transmittance[render * area + at] * in.transmittance[render * area + at] : 0;
        for (int c = 0; c < MEDGS_CHANNELS; ++c) {
          const S* incoming = plane_of(in, in.v_images, in.v_last_image, apart, render, c);
          if (!incoming) continue;
          v_image[c][k][l] = incoming[at];
          rest += v_image[c][k][l] * plane_of(in, in.images, in.last_image, apart, render, c)[at];
        }
        behind[k][l] = rest;
        stop[k][l] = in.stops[render * area + at];
        deepest = in.stops[render * area + at] > deepest ? in.stops[render * area + at] : deepest;
      }
      for_each_pair(in, render, tile,
                    [&](int64_t pair, int64_t, bool drawn, const S* mean, const S* conic, S opacity, const S* colour) {
                      S* record =
                          in.records + (in.render_layers[render] * in.pairs + in.pair_slots[pair]) * MEDGS_RECORD;
                      Vec<S> total[R];
                      Mask<S> touched{};
                      const bool reached = pair - start < deepest;
                      if (drawn && reached) {
                        for (int r = 0; r < MEDGS_RECORD; ++r) total[r] = Vec<S>{};
                        for (int k = 0; k < K; ++k) {
                          const auto g = contribution<Vec<S>, S>(frame.x[k], frame.y[k], mean[0], mean[1], conic[0],
                                                                 conic[1], conic[2], opacity);
                          const Mask<S> used = g.hit & (stop[k] > typename Integer<S>::type(pair - start));
                          touched |= used;
                          const Vec<S> weight = used ? g.alpha * transmittance[k] : Vec<S>{};
                          Vec<S> v_weight{};
                          for (int c = 0; c < MEDGS_CHANNELS; ++c) {
                            v_weight += colour[c] * v_image[c][k];
                            total[6 + c] += weight * v_image[c][k];
                          }
                          behind[k] -= weight * v_weight;
                          const Vec<S> v_power = power_gradient<S>(g, used, transmittance[k], v_weight, behind[k]);
                          add_moments(g, v_power, total);
                          if constexpr (Absolute) add_absolute(g, v_power, conic[0], conic[1], conic[2], total + 6 + C);
                          transmittance[k] = used ? transmittance[k] * (S(1) - g.alpha)
                                                  : transmittance[k];  // the forward pass's own rounding
                        }
                      }
                      // The first part writes the record, the others add to it.
                      if (!any(touched)) {
                        if (part > 0) return reached;
                        for (int r = 0; r < MEDGS_RECORD; ++r) record[r] = 0;
                        return true;
                      }
                      S more[R];
                      S* sums = part == 0 ? record : more;
                      if constexpr (C <= 4) {
                        for (int r = 8; r < MEDGS_RECORD; ++r) sums[r] = sum<S>(total[r]);
                        sum8<S>(total, sums);
                      } else {
                        for (int r = 0; r < MEDGS_RECORD; r += 8) sum8<S>(total + r, sums + r);
                      }
                      if (part > 0)
                        for (int r = 0; r < MEDGS_RECORD; ++r) record[r] += more[r];
                      return true;
                    });
    }
  }
}

/// Calls `run` with the number of channels as a compile-time constant: itself where it is small, or 10.
template <class Run>
void with_channels(int64_t channels, const Run& run) {
  if (channels == 1) return run(std::integral_constant<int, 1>{});
  if (channels == 2) return run(std::integral_constant<int, 2>{});
  if (channels == 3) return run(std::integral_constant<int, 3>{});
  if (channels == 4) return run(std::integral_constant<int, 4>{});
  if (channels == 10) return run(std::integral_constant<int, 10>{});
  run(std::integral_constant<int, kMostChannels>{});
}

template <class S>
void blend(const BlendArguments<S>& in, int threads) {
  if (in.touched) return blend_channels<S, 4, true>(in, threads);
  with_channels(in.channels, [&](auto c) { blend_channels<S, c.value, false>(in, threads); });
}

template <class S>
void blend_backward(const BlendArguments<S>& in, int threads) {
  if (in.v_absolute) return blend_backward_channels<S, 4, true>(in, threads);
  with_channels(in.channels, [&](auto c) { blend_backward_channels<S, c.value, false>(in, threads); });
}

/// Sums the records of every pair of a Gaussian, in the order of the slots, and turns the moments into gradients. The
/// first slice of the channels writes every entry of them, the others add to what all channels share.
template <class S, int C, bool Absolute>
void sum_records_channels(const BlendArguments<S>& in, int64_t heads, int threads) {
  constexpr int R = kRecordSize<C, Absolute>;
  using Eight = typename Simd<S, 8>::type;
#pragma omp parallel for schedule(static) num_threads(threads_for(in.gaussians* in.view_count, threads))
  for (int64_t place = 0; place < in.gaussians; ++place) {
    const int64_t n = in.order ? in.order[place] : place;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = head * in.gaussians + n;
      S v_opacity = 0, v_colour[C] = {};
      for (int64_t view = 0; view < in.view_count; ++view) {
        const int64_t slots = view * in.gaussians + place, row = view * in.gaussians + n;
        const int64_t first = in.gaussian_offsets[slots], last = in.gaussian_offsets[slots + 1];
        constexpr int kMore = R > 8 ? R - 8 : 1;
        Eight sum{};
        S more[kMore] = {};
        if (first < last) {
          for (int64_t r = 0; r < in.renders; ++r) {
            if (in.views[r] != view || in.heads[r] != head) continue;
            const S* record = in.records + (in.render_layers[r] * in.pairs + first) * MEDGS_RECORD;
            for (int64_t slot = first; slot < last; ++slot, record += MEDGS_RECORD) {
              Eight eight;
              std::memcpy(&eight, record, sizeof eight);
              sum += eight;
              for (int k = 8; k < MEDGS_RECORD; ++k) more[k - 8] += record[k];
            }
          }
        }
        const S* conic = in.conics + 3 * row;
        S* v_mean = in.v_means2d + 2 * (head * in.view_count * in.gaussians + row);
        S* v_conic = in.v_conics + 3 * row;
        const S by_mean[2] = {first < last ? conic[0] * sum[0] + conic[1] * sum[1] : S(0),
                              first < last ? conic[1] * sum[0] + conic[2] * sum[1] : S(0)};
        const S by_conic[3] = {S(0.5) * sum[2], sum[3], S(0.5) * sum[4]};
        for (int i = 0; i < 2; ++i) v_mean[i] = in.first_slice ? by_mean[i] : v_mean[i] + by_mean[i];
        for (int i = 0; i < 3; ++i) v_conic[i] = (head > 0 || !in.first_slice ? v_conic[i] : S(0)) - by_conic[i];
        v_opacity += sum[5];
        for (int c = 0; c < MEDGS_CHANNELS; ++c) v_colour[c] += c < 2 ? sum[6 + c % 2] : more[c < 2 ? 0 : c - 2];
        if constexpr (Absolute)
          for (int i = 0; i < 2; ++i) in.v_absolute[2 * n + i] = more[C - 2 + i];
      }
      const S by_opacity = v_opacity != S(0) ? v_opacity / in.opacities[at] : S(0);
      in.v_opacities[at] = in.first_slice ? by_opacity : in.v_opacities[at] + by_opacity;
      for (int c = 0; c < MEDGS_CHANNELS; ++c) in.v_colours[at * in.stride + c] = v_colour[c];
    }
  }
}

template <class S>
void sum_records(const BlendArguments<S>& in, int64_t heads, int threads) {
  if (in.v_absolute) return sum_records_channels<S, 4, true>(in, heads, threads);
  with_channels(in.channels, [&](auto c) { sum_records_channels<S, c.value, false>(in, heads, threads); });
}

template <class S>
void activate(const S* raw, int64_t count, S* opacities) {
  for (int64_t i = 0; i < count; i += kLanes<S>) {
    const int64_t left = count - i < kLanes<S> ? count - i : kLanes<S>;
    Vec<S> x{};
    std::memcpy(&x, raw + i, left * sizeof(S));
    x = S(1) / (S(1) + math::exp(-x));
    std::memcpy(opacities + i, &x, left * sizeof(S));
  }
}

// ---- similarity: W pixels of a row at once --------------------------------------------------------------------------

template <class S>
MEDGS_INLINE Vec<S> load(const S* from) {
  Vec<S> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class S>
MEDGS_INLINE void store(S* to, Vec<S> v, int64_t count) {
  std::memcpy(to, &v, (count < kLanes<S> ? count : kLanes<S>)*sizeof(S));
}

/// Of the calling thread in its team.
inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

/// M rows-of-a-band buffers, blurred along the row: `fill(m, y, line)` writes row y of map m, and rows outside the
/// image are zero, as is what lies beside the row.
template <class S, int M, class Fill>
MEDGS_INLINE void blur_rows(const SimilarityArguments<S>& in, int64_t y0, int64_t rows, int64_t padded, S* line, S* out,
                            const Fill& fill) {
  const int64_t length = padded + 2 * kHalo + kLanes<S>;
  for (int64_t i = 0; i < rows + 2 * kHalo; ++i) {
    const int64_t y = y0 + i - kHalo;
    const bool inside = y >= 0 && y < in.height;
    if (inside) fill(y, line + kHalo, length);
    for (int m = 0; m < M; ++m) {
      S* row = out + (m * (kBand + 2 * kHalo) + i) * padded;
      if (!inside) {
        std::memset(row, 0, padded * sizeof(S));
        continue;
      }
      for (int64_t x = 0; x < padded; x += kLanes<S>) {
        Vec<S> sum{};
        for (int k = 0; k < kWindow; ++k) sum += in.window[k] * load(line + m * length + x + k);
        std::memcpy(row + x, &sum, sizeof sum);
      }
    }
  }
}

/// Map m of such a buffer at row i of the band and column x, blurred down the columns too.
template <class S>
MEDGS_INLINE Vec<S> blur_down(const SimilarityArguments<S>& in, const S* rows, int m, int64_t i, int64_t x,
                              int64_t padded) {
  Vec<S> sum{};
  for (int k = 0; k < kWindow; ++k) sum += in.window[k] * load(rows + (m * (kBand + 2 * kHalo) + i + k) * padded + x);
  return sum;
}

template <class S>
bool similarity(const SimilarityArguments<S>& in, int threads) {
  const int64_t padded = ceil_div(in.width, int64_t(kLanes<S>)) * kLanes<S>, length = padded + 2 * kHalo + kLanes<S>;
  const int64_t bands = ceil_div(in.height, int64_t(kBand)), area = in.width * in.height;
  const int64_t scratch = 5 * ((kBand + 2 * kHalo) * padded + length);
  const int team = threads_for(in.planes * area, threads);
  S* const lines = static_cast<S*>(std::malloc(team * scratch * sizeof(S)));
  if (lines == nullptr) return false;
#pragma omp parallel num_threads(team)
  {
    S* line = lines + thread_number() * scratch;
    S* rows = line + 5 * length;
    std::memset(line, 0, 5 * length * sizeof(S));
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < in.planes * bands; ++job) {
      const int64_t plane = job / bands, y0 = job % bands * kBand;
      const int64_t count = in.height - y0 < kBand ? in.height - y0 : kBand;
      const S *image = in.images + plane * area, *target = in.targets + plane * area;
      blur_rows<S, 5>(in, y0, count, padded, line, rows, [&](int64_t y, S* to, int64_t step) {
        for (int64_t x = 0; x < in.width; ++x) {
          const S a = image[y * in.width + x], b = target[y * in.width + x];
          to[x] = a;
          to[step + x] = b;
          to[2 * step + x] = a * a;
          to[3 * step + x] = b * b;
          to[4 * step + x] = a * b;
        }
      });
      double difference = 0, total = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = plane * area + (y0 + i) * in.width;
        for (int64_t x = 0; x < in.width; ++x) difference += std::fabs(in.images[row + x] - in.targets[row + x]);
        for (int64_t x = 0; x < padded; x += kLanes<S>) {
          Vec<S> mean[5], by[3];
          for (int m = 0; m < 5; ++m) mean[m] = blur_down(in, rows, m, i, x, padded);
          const Vec<S> value =
              similarity_at(mean[0], mean[1], mean[2], mean[3], mean[4], in.c1, in.c2, by[0], by[1], by[2]);
          const int64_t left = in.width - x;
          for (int l = 0; l < kLanes<S> && l < left; ++l) total += value[l];
          if (in.gradient)
            for (int m = 0; m < 3; ++m) store(in.maps + m * in.planes * area + row + x, by[m], left);
        }
      }
      in.sums[2 * job] = S(difference);
      in.sums[2 * job + 1] = S(total);
    }
    // The window is symmetric, so the transpose of the blur is the blur.
    if (in.gradient) {
#pragma omp for schedule(dynamic)
      for (int64_t job = 0; job < in.planes * bands; ++job) {
        const int64_t plane = job / bands, y0 = job % bands * kBand;
        const int64_t count = in.height - y0 < kBand ? in.height - y0 : kBand;
        blur_rows<S, 3>(in, y0, count, padded, line, rows, [&](int64_t y, S* to, int64_t step) {
          for (int m = 0; m < 3; ++m)
            std::memcpy(to + m * step, in.maps + (m * in.planes + plane) * area + y * in.width, in.width * sizeof(S));
        });
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = plane * area + (y0 + i) * in.width;
          for (int64_t x = 0; x < padded; x += kLanes<S>) {
            const int64_t left = in.width - x;
            Vec<S> image{}, target{};
            std::memcpy(&image, in.images + row + x, (left < kLanes<S> ? left : kLanes<S>)*sizeof(S));
            std::memcpy(&target, in.targets + row + x, (left < kLanes<S> ? left : kLanes<S>)*sizeof(S));
            const Vec<S> gradient = blur_down(in, rows, 0, i, x, padded) +
                                    S(2) * image * blur_down(in, rows, 1, i, x, padded) +
                                    target * blur_down(in, rows, 2, i, x, padded);
            store(in.gradient + row + x, gradient, left);
          }
        }
      }
    }
  }
  std::free(lines);
  S difference = 0, total = 0;
  for (int64_t part = 0; part < in.parts; ++part) {
    difference += in.sums[2 * part];
    total += in.sums[2 * part + 1];
  }
  *in.l1 = difference / S(in.planes * area);
  *in.ssim = total / S(in.planes * area);
  return true;
}

// ---- what a training step needs beside renders ----------------------------------------------------------------------

template <class S>
void adam(const AdamTensor<S>& t, const AdamConstants<S>& c, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads_for(t.size, threads))
  for (int64_t i = 0; i < t.size; ++i) adam_step_at(t, c, i);
}

template <class S>
void sigma_outside(const SigmaArguments<S>& in, int threads) {
  const int64_t chunk = ceil_div(in.gaussians, in.parts);
#pragma omp parallel for schedule(static) num_threads(threads_for(in.gaussians, threads))
  for (int64_t part = 0; part < in.parts; ++part) {
    Vec<S> below{}, above{}, count_below{}, count_above{};
    const int64_t end = (part + 1) * chunk < in.gaussians ? (part + 1) * chunk : in.gaussians;
    for (int64_t i = part * chunk; i < end; i += kLanes<S>) {
      Vec<S> raw{};
      Mask<S> exists{};
      for (int l = 0; l < kLanes<S> && i + l < end; ++l) {
        raw[l] = in.raw[i + l];
        exists[l] = -1;
      }
      const Vec<S> sigma = math::exp(raw);
      const Mask<S> low = exists & (sigma < in.low), high = exists & (sigma > in.high);
      below += low ? in.low - sigma : Vec<S>{};
      above += high ? sigma - in.high : Vec<S>{};
      count_below += low ? Vec<S>{} + S(1) : Vec<S>{};
      count_above += high ? Vec<S>{} + S(1) : Vec<S>{};
      const Vec<S> gradient = low ? -sigma : (high ? sigma : Vec<S>{});
      store(in.gradient + i, gradient, end - i);
    }
    S* sums = in.sums + 4 * part;
    sums[0] = sum<S>(below);
    sums[1] = sum<S>(count_below);
    sums[2] = sum<S>(above);
    sums[3] = sum<S>(count_above);
  }
  S total[4] = {};
  for (int64_t part = 0; part < in.parts; ++part)
    for (int k = 0; k < 4; ++k) total[k] += in.sums[4 * part + k];
  S below, above;
  *in.loss = sigma_loss(total, below, above);
  for (int64_t i = 0; i < in.gaussians; ++i) in.gradient[i] *= in.gradient[i] < 0 ? below : above;
}

#define MEDGS_STRING_OF(x) #x
#define MEDGS_STRING(x) MEDGS_STRING_OF(x)
const Kernels<float> kernels_float = {
    MEDGS_STRING(MEDGS_ISA), fold<float>,        fold_backward<float>, bound<float>,      blend<float>,
    blend_backward<float>,   sum_records<float>, activate<float>,      similarity<float>, adam<float>,
    sigma_outside<float>};
const Kernels<double> kernels_double = {
    MEDGS_STRING(MEDGS_ISA), fold<double>,           fold_backward<double>, bound<double>,
    blend<double>,           blend_backward<double>, sum_records<double>,   activate<double>,
    similarity<double>,      adam<double>,           sigma_outside<double>};

}  // namespace MEDGS_ISA
}  // namespace medgs
