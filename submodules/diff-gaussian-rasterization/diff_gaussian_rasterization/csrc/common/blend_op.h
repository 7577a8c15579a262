// The operators `blend` and `splat` on tensors, the same on every device but for the kernels. `Device` is what runs
// them:
//   tile_of(inputs, tile_offsets)            side of the tiles that lists of that size are for, px
//   bin<S>(inputs, capacity)                 the pairs of Gaussian and tile
//   room(inputs, pairs, channels)            numbers that it keeps of the forward pass for one slice of the channels
//   blend(in, pairs), blend_backward(in, pairs)   one slice of the channels
//   sum_records(in, heads)                   the records of each Gaussian, to gradients
//   check_lists(...)                         of the backward pass: what a look into the lists may cost on the device
//   activate(...), activate_backward(...)    raw opacities and colours to those that are blended
//   prepare(in), split(in), sort_by_depth(...)    of `splat`, see splatting.h
//
// Any number of channels: up to kMostChannels are blended in one walk over the lists, more in several walks, each over
// a slice of them. Everything is linear in the channels, so the slices' gradients add up.
#pragma once

#include "checks.h"
#include "splatting.h"

namespace medgs {

/// Pairs of Gaussian and tile. A pair's slot is its place Gaussian by Gaussian (view, then index or order), so that the
/// records of one Gaussian lie together; its place in the tile lists is tile by tile (view, then tile), front to back.
struct Pairs {
  int64_t tile;             // px a side
  Tensor tile_offsets;      // (V, tiles + 1) int32
  Tensor gaussians, slots;  // (pairs) int32, in tile order
  Tensor gaussian_offsets;  // (V N + 1) int32: slots of each Gaussian of each view

  int64_t count() const { return slots.size(0); }
};

using BlendOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // as the schema
using BlendGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using SplatOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using SplatGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// What both directions take, checked, contiguous and active.
struct BlendInputs {
  Tensor means2d, conics, active, opacities, colours;
  std::optional<Tensor> order;  // (N), of a single view
  Shape views, heads, bits;
  int64_t view_count, gaussians, head_count, channels, width, height;
  std::vector<int64_t> view_bits;  // (V): bits that some render of the view asks for: other pairs are not made
  std::vector<int64_t> layer;      // (R): the k-th render of a view uses layer k of what is kept for each pair
  std::unique_ptr<bool[]> check;   // (R): a render whose bit is all that its view was binned for need not look again

  /// Of `blend`; opacities and colours as they are given.
  BlendInputs(const Tensor& means2d_, const Tensor& conics_, const Tensor& active_, const Tensor& opacities_,
              const Tensor& colours_, const Shape& views_, const Shape& heads_, const Shape& bits_, int64_t width_,
              int64_t height_)
      : means2d(means2d_),
        conics(conics_),
        active(active_),
        opacities(opacities_),
        colours(colours_),
        views(views_),
        heads(heads_),
        bits(bits_),
        width(width_),
        height(height_) {
    check_real(means2d_, "means2d");
    MEDGS_CHECK_VALUE(means2d_.dim() == 3, "means2d must have shape (V, N, 2), got ", shape_of(means2d_));
    MEDGS_CHECK_VALUE(colours_.dim() == 3, "colours must have shape (heads, N, C), got ", shape_of(colours_));
    const int64_t v = view_count = means2d_.size(0), n = gaussians = means2d_.size(1);
    const int64_t h = head_count = colours_.size(0), c = channels = colours_.size(2);
    const int64_t r = renders();
    MEDGS_CHECK_VALUE(v * n < (int64_t(1) << 31), "views times Gaussians must stay under 2^31, got ", v, " x ", n);
    MEDGS_CHECK_VALUE(c >= 1, "colours must have at least 1 channel, got ", c);
    check_float(means2d_, "means2d", {v, n, 2}, means2d_);
    check_float(conics_, "conics", {v, n, 3}, means2d_);
    check_bytes(active_, "active", {v, n}, means2d_);
    check_float(opacities_, "opacities", {h, n}, means2d_);
    check_float(colours_, "colours", {h, n, c}, means2d_);
    MEDGS_CHECK_VALUE(heads.size() == views.size() && bits.size() == views.size(),
                      "views, heads and bits must be equally long, got ", views.size(), ", ", heads.size(), ", ",
                      bits.size());
    for (int64_t i = 0; i < r; ++i) {
      MEDGS_CHECK_VALUE(views[i] >= 0 && views[i] < v, "views[", i, "] = ", views[i], " is not one of the ", v,
                        " views");
      MEDGS_CHECK_VALUE(heads[i] >= 0 && heads[i] < h, "heads[", i, "] = ", heads[i], " is not one of the ", h,
                        " heads");
      MEDGS_CHECK_VALUE(bits[i] >= 1 && bits[i] <= 255, "bits[", i, "] = ", bits[i], " must be 1 ... 255");
    }
    MEDGS_CHECK_VALUE(r <= kMaxRenders && v <= kMaxRenders, "at most ", kMaxRenders,
                      " views and renders in one call, got ", v, " and ", r);
    check_image(width, height);
    means2d = packed(means2d_);
    conics = packed(conics_);
    active = packed(active_);
    opacities = packed(opacities_);
    colours = packed(colours_);
    plan();
  }

  /// Of `splat`: one view, one head, colour and depth, checked before.
  BlendInputs(const Tensor& means2d_, const Tensor& conics_, const Tensor& active_, const Tensor& opacities_,
              const Tensor& colours_, const Tensor& order_, int64_t width_, int64_t height_)
      : means2d(means2d_),
        conics(conics_),
        active(active_),
        opacities(opacities_),
        colours(colours_),
        order(order_),
        views{0},
        heads{0},
        bits{generic::kActive},
        view_count(1),
        gaussians(means2d_.size(0)),
        head_count(1),
        channels(4),
        width(width_),
        height(height_) {
    plan();
  }

  int64_t renders() const { return int64_t(views.size()); }
  int64_t tiles_x(int64_t tile) const { return generic::ceil_div(width, tile); }
  int64_t tiles_y(int64_t tile) const { return generic::ceil_div(height, tile); }
  int64_t tiles(int64_t tile) const { return tiles_x(tile) * tiles_y(tile); }
  int64_t layers() const { return layer.empty() ? 1 : 1 + *std::max_element(layer.begin(), layer.end()); }

  /// For the channels [first, first + count).
  template <class S>
  BlendArguments<S> arguments(const Pairs& pairs, int64_t first, int64_t count) const {
    BlendArguments<S> in{};
    in.gaussians = gaussians;
    in.view_count = view_count;
    in.renders = renders();
    in.channels = count;
    in.stride = channels;
    in.first_slice = first == 0;
    in.width = width;
    in.height = height;
    in.tile = pairs.tile;
    in.tiles_x = tiles_x(pairs.tile);
    in.tiles_y = tiles_y(pairs.tile);
    in.views = views.data();
    in.heads = heads.data();
    in.bits = bits.data();
    in.render_layers = layer.data();
    in.check_bits = check.get();
    in.means2d = data<S>(means2d);
    in.conics = data<S>(conics);
    in.active = data<uint8_t>(active);
    in.opacities = data<S>(opacities);
    in.colours = data<S>(colours) + first;
    in.order = data<int32_t>(order);
    in.tile_offsets = data<int32_t>(pairs.tile_offsets);
    in.pair_gaussians = data<int32_t>(pairs.gaussians);
    in.pair_slots = data<int32_t>(pairs.slots);
    in.gaussian_offsets = data<int32_t>(pairs.gaussian_offsets);
    in.pairs = pairs.count();
    in.layers = layers();
    return in;
  }

 private:
  void plan() {
    view_bits.assign(view_count, 0);
    check.reset(new bool[renders()]);
    for (int64_t i = 0; i < renders(); ++i) view_bits[views[i]] |= bits[i];
    for (int64_t i = 0; i < renders(); ++i) {
      layer.push_back(std::count(views.begin(), views.begin() + i, views[i]));
      check[i] = view_bits[views[i]] != bits[i];
    }
  }
};

/// Raw opacities (logits) and colours (coefficients of max(0, C0 x + 0.5)) to those that are blended.
template <class Device>
void activate(BlendInputs& inputs) {
  const Tensor opacities = new_like(inputs.opacities), colours = new_like(inputs.colours);
  with_scalar(opacities, [&](auto zero) {
    using S = decltype(zero);
    Device::template activate<S>(data<S>(inputs.opacities), data<S>(inputs.colours), opacities.numel(), colours.numel(),
                                 writable<S>(opacities), writable<S>(colours));
  });
  inputs.opacities = opacities;
  inputs.colours = colours;
}

/// Calls `run(first, count)` for slices of at most kMostChannels channels, of nearly equal size.
template <class Run>
void for_each_slice(int64_t channels, const Run& run) {
  const int64_t slices = generic::ceil_div(channels, int64_t(kMostChannels));
  const int64_t size = generic::ceil_div(channels, slices);
  for (int64_t first = 0; first < channels; first += size) run(first, std::min(size, channels - first));
}

template <class Device>
int64_t room_of(const BlendInputs& inputs, const Pairs& pairs) {
  int64_t room = 0;
  for_each_slice(inputs.channels, [&](int64_t, int64_t count) { room += Device::room(inputs, pairs, count); });
  return room;
}

/// What the forward pass leaves for the backward pass, or has for itself. Kept it is zeros where nothing is written:
/// an output, which holds nothing that was in memory before.
template <class Device>
Tensor new_starts(const BlendInputs& inputs, const Pairs& pairs, bool keep) {
  const int64_t room = room_of<Device>(inputs, pairs);
  return keep ? zeros({room}, inputs.means2d) : empty({room}, inputs.means2d);
}

template <class Device>
BlendOutputs blend_op(const Tensor& means2d, const Tensor& conics, const Tensor& active, const Tensor& opacities,
                      const Tensor& colours, const Tensor& backgrounds, const std::optional<Tensor>& screen,
                      std::vector<int64_t> views, std::vector<int64_t> heads, std::vector<int64_t> bits, int64_t width,
                      int64_t height, bool raw, int64_t capacity, bool keep) {
  const typename Device::Guard guard(means2d);
  BlendInputs inputs(means2d, conics, active, opacities, colours, views, heads, bits, width, height);
  const int64_t r = inputs.renders(), c = inputs.channels;
  check_float(backgrounds, "backgrounds", {r, c}, means2d);
  if (screen) check_float(*screen, "screen", {inputs.head_count, inputs.view_count, inputs.gaussians, 2}, means2d);
  MEDGS_CHECK_VALUE(capacity >= 0 && capacity < (int64_t(1) << 31), "capacity must be 0 ... 2^31 - 1, got ", capacity);
  if (raw) activate<Device>(inputs);
  const Tensor seen_through = packed(backgrounds);
  const Tensor images = empty({r, c, height, width}, means2d);
  const Tensor transmittance = empty({r, height, width}, means2d);
  const Tensor stops = empty({r, height, width}, means2d, ScalarType::Int);
  std::optional<Pairs> pairs;
  std::optional<Tensor> starts;
  with_scalar(means2d, [&](auto zero) {
    using S = decltype(zero);
    pairs = Device::template bin<S>(inputs, capacity);
    starts = new_starts<Device>(inputs, *pairs, keep);
    S* start = writable<S>(*starts);
    for_each_slice(c, [&](int64_t first, int64_t count) {
      auto in = inputs.arguments<S>(*pairs, first, count);
      in.backgrounds = data<S>(seen_through) + first;
      in.images = writable<S>(images) + first * width * height;
      in.transmittance = writable<S>(transmittance);
      in.stops = writable<int32_t>(stops);
      in.starts = start;
      start += Device::room(inputs, *pairs, count);
      Device::blend(in, *pairs);
    });
  });
  return {images,
          transmittance,
          stops,
          pairs->tile_offsets,
          pairs->gaussians,
          pairs->slots,
          pairs->gaussian_offsets,
          keep ? *starts : empty({0}, means2d)};
}

/// The lists that a backward pass is given, checked.
template <class Device>
Pairs given_pairs(const BlendInputs& inputs, const Tensor& tile_offsets, const Tensor& gaussians, const Tensor& slots,
                  const Tensor& gaussian_offsets) {
  const Tensor& like = inputs.means2d;
  const auto ints = [&](const Tensor& tensor, const char* name, const Shape& shape) {
    check_ints(tensor, name, shape, like);
    return packed(tensor);
  };
  MEDGS_CHECK_VALUE(slots.dim() == 1, "pair_slots must have shape (pairs,), got ", shape_of(slots));
  const int64_t tile = Device::tile_of(inputs, tile_offsets);
  const Pairs pairs = {tile, ints(tile_offsets, "tile_offsets", {inputs.view_count, inputs.tiles(tile) + 1}),
                       ints(gaussians, "pair_gaussians", {slots.size(0)}), ints(slots, "pair_slots", {slots.size(0)}),
                       ints(gaussian_offsets, "gaussian_offsets", {inputs.view_count * inputs.gaussians + 1})};
  Device::check_lists(inputs, pairs);
  return pairs;
}

template <class Device>
BlendGradients blend_backward_op(const Tensor& v_images, const Tensor& v_transmittance, const Tensor& images,
                                 const Tensor& transmittance, const Tensor& stops, const Tensor& tile_offsets,
                                 const Tensor& pair_gaussians, const Tensor& pair_slots, const Tensor& gaussian_offsets,
                                 const Tensor& starts, const Tensor& means2d, const Tensor& conics,
                                 const Tensor& active, const Tensor& opacities, const Tensor& colours,
                                 std::vector<int64_t> views, std::vector<int64_t> heads, std::vector<int64_t> bits,
                                 int64_t width, int64_t height, bool raw) {
  const typename Device::Guard guard(means2d);
  BlendInputs inputs(means2d, conics, active, opacities, colours, views, heads, bits, width, height);
  const int64_t v = inputs.view_count, n = inputs.gaussians, h = inputs.head_count;
  const int64_t r = inputs.renders(), c = inputs.channels;
  const auto floats = [&](const Tensor& tensor, const char* name, const Shape& shape) {
    check_float(tensor, name, shape, means2d);
    return packed(tensor);
  };
  const Tensor g_images = floats(v_images, "v_images", {r, c, height, width});
  const Tensor g_transmittance = floats(v_transmittance, "v_transmittance", {r, height, width});
  const Tensor drawn = floats(images, "images", {r, c, height, width});
  const Tensor left = floats(transmittance, "transmittance", {r, height, width});
  check_ints(stops, "stops", {r, height, width}, means2d);
  const Tensor stopped = packed(stops);
  const Pairs pairs = given_pairs<Device>(inputs, tile_offsets, pair_gaussians, pair_slots, gaussian_offsets);
  const Tensor kept = floats(starts, "starts", {room_of<Device>(inputs, pairs)});
  if (raw) activate<Device>(inputs);

  const Tensor v_means2d = empty({h, v, n, 2}, means2d);
  const Tensor v_conics = h > 0 ? new_like(inputs.conics) : zeros(shape_of(inputs.conics), means2d);
  const Tensor v_opacities = new_like(inputs.opacities), v_colours = new_like(inputs.colours);
  with_scalar(means2d, [&](auto zero) {
    using S = decltype(zero);
    std::optional<Tensor> records;
    const S* start = data<S>(kept);
    for_each_slice(c, [&](int64_t first, int64_t count) {
      auto in = inputs.arguments<S>(pairs, first, count);
      // The first slice is the largest.
      if (!records) records = empty({in.layers, in.pairs, record_size(count)}, means2d);
      in.images = const_cast<S*>(data<S>(drawn)) + first * width * height;
      in.transmittance = const_cast<S*>(data<S>(left));
      in.stops = const_cast<int32_t*>(data<int32_t>(stopped));
      in.starts = const_cast<S*>(start);
      start += Device::room(inputs, pairs, count);
      in.v_images = data<S>(g_images) + first * width * height;
      in.v_transmittance = first > 0 ? nullptr : data<S>(g_transmittance);  // it counts once
      in.records = writable<S>(*records);
      in.v_means2d = writable<S>(v_means2d);
      in.v_conics = writable<S>(v_conics);
      in.v_opacities = writable<S>(v_opacities);
      in.v_colours = writable<S>(v_colours) + first;
      Device::blend_backward(in, pairs);
      Device::sum_records(in, h);
    });
    if (raw)
      Device::template activate_backward<S>(data<S>(inputs.opacities), data<S>(inputs.colours), v_opacities.numel(),
                                            v_colours.numel(), writable<S>(v_opacities), writable<S>(v_colours));
  });
  return {v_means2d, v_conics, v_opacities, v_colours};
}

/// The footprints that both directions of `splat` take, checked and contiguous, and what is blended of them.
struct SplatInputs {
  Tensor means2d, conics, colours, depths, compensations, radii, opacities;
  Tensor alphas, features, active;  // for the kernels

  SplatInputs(const Tensor& means2d_, const Tensor& conics_, const Tensor& colours_, const Tensor& depths_,
              const Tensor& compensations_, const Tensor& radii_, const Tensor& opacities_, int64_t width,
              int64_t height)
      : means2d(means2d_),
        conics(conics_),
        colours(colours_),
        depths(depths_),
        compensations(compensations_),
        radii(radii_),
        opacities(opacities_),
        alphas(means2d_),
        features(means2d_),
        active(means2d_) {
    check_real(means2d_, "means2d");
    MEDGS_CHECK_VALUE(means2d_.dim() == 2, "means2d must have shape (N, 2), got ", shape_of(means2d_));
    const int64_t n = means2d_.size(0);
    MEDGS_CHECK_VALUE(n < (int64_t(1) << 31), "at most 2^31 Gaussians, got ", n);
    MEDGS_CHECK_VALUE(opacities_.numel() == n, "opacities must have shape [", n, ", 1], got ", shape_of(opacities_));
    check_float(means2d_, "means2d", {n, 2}, means2d_);
    check_float(conics_, "conics", {n, 3}, means2d_);
    check_float(colours_, "colours", {n, 3}, means2d_);
    check_float(depths_, "depths", {n}, means2d_);
    check_float(compensations_, "compensations", {n}, means2d_);
    check_ints(radii_, "radii", {n}, means2d_);
    check_float(opacities_, "opacities", shape_of(opacities_), means2d_);
    check_image(width, height);
    for (Tensor* tensor : {&means2d, &conics, &colours, &depths, &compensations, &radii, &opacities})
      *tensor = packed(*tensor);
    alphas = empty({n}, means2d_);
    features = empty({n, 4}, means2d_);
    active = empty({n}, means2d_, ScalarType::Byte);
  }

  template <class S>
  SplatArguments<S> arguments(bool inverse, int64_t width, int64_t height) const {
    SplatArguments<S> in{};
    in.gaussians = means2d.size(0);
    in.inverse = inverse;
    in.half_width = S(width) / 2;
    in.half_height = S(height) / 2;
    in.depths = data<S>(depths);
    in.colours = data<S>(colours);
    in.compensations = data<S>(compensations);
    in.opacities = data<S>(opacities);
    in.radii = data<int32_t>(radii);
    in.alphas = writable<S>(alphas);
    in.features = writable<S>(features);
    in.active = writable<uint8_t>(active);
    return in;
  }
};

template <class Device>
SplatOutputs splat_op(const Tensor& means2d, const Tensor& conics, const Tensor& colours, const Tensor& depths,
                      const Tensor& compensations, const Tensor& radii, const Tensor& opacities,
                      const Tensor& background, const std::optional<Tensor>& screen, int64_t width, int64_t height,
                      bool inverse, bool count, bool keep) {
  const typename Device::Guard guard(means2d);
  const SplatInputs given(means2d, conics, colours, depths, compensations, radii, opacities, width, height);
  const int64_t n = means2d.size(0);
  check_float(background, "background", {3}, means2d);
  if (screen) {
    MEDGS_CHECK_VALUE(screen->dim() == 2 && screen->size(1) >= 2 && screen->size(1) <= 4,
                      "screen must have shape (N, 2), (N, 3) or (N, 4), got ", shape_of(*screen));
    check_float(*screen, "screen", {n, screen->size(1)}, means2d);
  }
  const Tensor order = empty({n}, means2d, ScalarType::Int), backgrounds = zeros({4}, means2d);
  const Tensor colour = empty({3, height, width}, means2d), depth = empty({1, height, width}, means2d);
  const Tensor transmittance = empty({1, height, width}, means2d);
  const Tensor stops = empty({1, height, width}, means2d, ScalarType::Int);
  const Tensor touched = count ? zeros({n}, means2d, ScalarType::Int) : empty({0}, means2d, ScalarType::Int);
  const Tensor seen_through = packed(background);
  const BlendInputs inputs(given.means2d, given.conics, given.active, given.alphas, given.features, order, width,
                           height);
  std::optional<Pairs> pairs;
  std::optional<Tensor> starts;
  with_scalar(means2d, [&](auto zero) {
    using S = decltype(zero);
    Device::prepare(given.arguments<S>(inverse, width, height));
    Device::template copy<S>(data<S>(seen_through), 3, writable<S>(backgrounds));  // that of depth is 0
    Device::template sort_by_depth<S>(given.depths, given.radii, order);
    pairs = Device::template bin<S>(inputs, 0);
    starts = new_starts<Device>(inputs, *pairs, keep);
    auto in = inputs.arguments<S>(*pairs, 0, 4);
    in.backgrounds = data<S>(backgrounds);
    in.images = writable<S>(colour);
    in.last_image = writable<S>(depth);
    in.transmittance = writable<S>(transmittance);
    in.stops = writable<int32_t>(stops);
    in.touched = count ? writable<int32_t>(touched) : nullptr;
    in.starts = writable<S>(*starts);
    Device::blend(in, *pairs);
  });
  return {colour,
          depth,
          transmittance,
          touched,
          stops,
          pairs->tile_offsets,
          pairs->gaussians,
          pairs->slots,
          pairs->gaussian_offsets,
          keep ? *starts : empty({0}, means2d),
          order};
}

template <class Device>
SplatGradients splat_backward_op(const std::optional<Tensor>& v_colour, const std::optional<Tensor>& v_depth,
                                 const std::optional<Tensor>& v_transmittance, const Tensor& colour,
                                 const Tensor& depth, const Tensor& transmittance, const Tensor& stops,
                                 const Tensor& tile_offsets, const Tensor& pair_gaussians, const Tensor& pair_slots,
                                 const Tensor& gaussian_offsets, const Tensor& starts, const Tensor& order,
                                 const Tensor& means2d, const Tensor& conics, const Tensor& colours,
                                 const Tensor& depths, const Tensor& compensations, const Tensor& radii,
                                 const Tensor& opacities, int64_t width, int64_t height, bool inverse,
                                 int64_t columns) {
  const typename Device::Guard guard(means2d);
  const SplatInputs given(means2d, conics, colours, depths, compensations, radii, opacities, width, height);
  const int64_t n = means2d.size(0);
  MEDGS_CHECK_VALUE(columns == 0 || (columns >= 2 && columns <= 4), "columns must be 0 or 2 ... 4, got ", columns);
  const auto floats = [&](const Tensor& tensor, const char* name, const Shape& shape) {
    check_float(tensor, name, shape, means2d);
    return packed(tensor);
  };
  const auto perhaps = [&](const std::optional<Tensor>& tensor, const char* name, const Shape& shape) {
    return tensor ? std::optional<Tensor>(floats(*tensor, name, shape)) : std::nullopt;
  };
  const auto ints = [&](const Tensor& tensor, const char* name, const Shape& shape) {
    check_ints(tensor, name, shape, means2d);
    return packed(tensor);
  };
  const auto g_colour = perhaps(v_colour, "v_colour", {3, height, width});
  const auto g_depth = perhaps(v_depth, "v_depth", {1, height, width});
  const auto g_transmittance = perhaps(v_transmittance, "v_transmittance", {1, height, width});
  const Tensor drawn = floats(colour, "colour", {3, height, width}), deep = floats(depth, "depth", {1, height, width});
  const Tensor left = floats(transmittance, "transmittance", {1, height, width});
  const Tensor stopped = ints(stops, "stops", {1, height, width}), sorted = ints(order, "order", {n});
  const BlendInputs inputs(given.means2d, given.conics, given.active, given.alphas, given.features, sorted, width,
                           height);
  const Pairs pairs = given_pairs<Device>(inputs, tile_offsets, pair_gaussians, pair_slots, gaussian_offsets);
  Device::check_order(sorted);
  const Tensor kept = floats(starts, "starts", {room_of<Device>(inputs, pairs)});

  const bool absolute = columns == 4;
  const Tensor v_means2d = new_like(given.means2d), v_conics = new_like(given.conics);
  const Tensor v_colours = new_like(given.colours), v_depths = new_like(given.depths);
  const Tensor v_compensations = new_like(given.compensations), v_opacities = empty(shape_of(opacities), means2d);
  const Tensor v_screen = empty({columns > 0 ? n : 0, columns}, means2d);
  const Tensor v_alphas = new_like(given.alphas), v_features = new_like(given.features);
  const Tensor v_absolute = empty({absolute ? n : 0, 2}, means2d);
  with_scalar(means2d, [&](auto zero) {
    using S = decltype(zero);
    auto splat = given.arguments<S>(inverse, width, height);
    Device::prepare(splat);
    auto in = inputs.arguments<S>(pairs, 0, 4);
    const Tensor records = empty({in.pairs, record_size(4, absolute)}, means2d);
    in.images = const_cast<S*>(data<S>(drawn));
    in.last_image = const_cast<S*>(data<S>(deep));
    in.transmittance = const_cast<S*>(data<S>(left));
    in.stops = const_cast<int32_t*>(data<int32_t>(stopped));
    in.starts = const_cast<S*>(data<S>(kept));
    in.v_images = data<S>(g_colour);
    in.v_last_image = data<S>(g_depth);
    in.v_transmittance = data<S>(g_transmittance);
    in.records = writable<S>(records);
    in.v_means2d = writable<S>(v_means2d);
    in.v_conics = writable<S>(v_conics);
    in.v_opacities = writable<S>(v_alphas);
    in.v_colours = writable<S>(v_features);
    in.v_absolute = absolute ? writable<S>(v_absolute) : nullptr;
    Device::blend_backward(in, pairs);
    Device::sum_records(in, 1);
    splat.v_means2d = data<S>(v_means2d);
    splat.v_absolute = data<S>(v_absolute);
    splat.v_alphas = data<S>(v_alphas);
    splat.v_features = data<S>(v_features);
    splat.v_depths = writable<S>(v_depths);
    splat.v_colours = writable<S>(v_colours);
    splat.v_compensations = writable<S>(v_compensations);
    splat.v_opacities = writable<S>(v_opacities);
    splat.v_screen = columns > 0 ? writable<S>(v_screen) : nullptr;
    splat.columns = columns;
    Device::split(splat);
  });
  return {v_means2d, v_conics, v_colours, v_depths, v_compensations, v_opacities, v_screen};
}

/// Registers both operators, in both directions, for a device.
template <class Device>
void register_blend(torch::stable::detail::StableLibrary& m) {
  m.impl("blend", TORCH_BOX(&blend_op<Device>));
  m.impl("blend_backward", TORCH_BOX(&blend_backward_op<Device>));
  m.impl("splat", TORCH_BOX(&splat_op<Device>));
  m.impl("splat_backward", TORCH_BOX(&splat_backward_op<Device>));
}

}  // namespace medgs
