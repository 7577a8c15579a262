// The operator `blend` on tensors, the same on every device but for the kernels. `Device` is what runs them:
//   kTile                                    side of a tile, px
//   bin<S>(inputs, view_bits, capacity)      the pairs of Gaussian and tile
//   room(inputs, pairs, channels)            numbers that it keeps of the forward pass for one slice of the channels
//   blend(in, pairs), blend_backward(in, pairs)   one slice of the channels
//   sum_records(in, heads)                   the records of each Gaussian, to gradients
//   check_lists(...)                         of the backward pass: what a look into the lists may cost on the device
//
// Any number of channels: up to kMostChannels are blended in one walk over the lists, more in several walks, each over
// a slice of them. Everything is linear in the channels, so the slices' gradients add up.
#pragma once

#include "checks.h"

namespace medgs {

/// Pairs of Gaussian and tile. A pair's slot is its place Gaussian by Gaussian (view, then index), so that the records
/// of one Gaussian lie together; its place in the tile lists is tile by tile (view, then tile), front to back.
struct Pairs {
  Tensor tile_offsets;      // (V, tiles + 1) int32
  Tensor gaussians, slots;  // (pairs) int32, in tile order
  Tensor gaussian_offsets;  // (V N + 1) int32: slots of each Gaussian of each view

  int64_t count() const { return slots.size(0); }
};

using BlendOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // as the schema
using BlendGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

/// Activations of raw appearance: opacity = sigmoid(raw), colour = max(0, C0 raw + 0.5).
constexpr double kHarmonic0 = 0.28209479177387814;

/// What both directions take, checked, contiguous and active.
struct BlendInputs {
  Tensor means2d, conics, active, opacities, colours;
  IntArrayRef views, heads, bits;
  int64_t width, height;
  std::vector<int64_t> view_bits;  // (V): bits that some render of the view asks for: other pairs are not made
  std::vector<int64_t> layer;      // (R): the k-th render of a view uses layer k of what is kept for each pair
  std::unique_ptr<bool[]> check;   // (R): a render whose bit is all that its view was binned for need not look again

  BlendInputs(const Tensor& means2d_, const Tensor& conics_, const Tensor& active_, const Tensor& opacities_,
              const Tensor& colours_, IntArrayRef views_, IntArrayRef heads_, IntArrayRef bits_, int64_t width_,
              int64_t height_, bool raw)
      : views(views_), heads(heads_), bits(bits_), width(width_), height(height_) {
    check_real(means2d_, "means2d");
    TORCH_CHECK_VALUE(means2d_.dim() == 3, "means2d must have shape (V, N, 2), got ", means2d_.sizes());
    TORCH_CHECK_VALUE(colours_.dim() == 3, "colours must have shape (heads, N, C), got ", colours_.sizes());
    const int64_t v = means2d_.size(0), n = means2d_.size(1), h = colours_.size(0), c = colours_.size(2);
    const int64_t r = renders();
    TORCH_CHECK_VALUE(v * n < (int64_t(1) << 31), "views times Gaussians must stay under 2^31, got ", v, " x ", n);
    TORCH_CHECK_VALUE(c >= 1, "colours must have at least 1 channel, got ", c);
    check_float(means2d_, "means2d", {v, n, 2}, means2d_);
    check_float(conics_, "conics", {v, n, 3}, means2d_);
    check_shape(active_, "active", {v, n}, means2d_);
    TORCH_CHECK_TYPE(active_.scalar_type() == at::kByte, "active must be uint8, got ", active_.scalar_type());
    check_float(opacities_, "opacities", {h, n}, means2d_);
    check_float(colours_, "colours", {h, n, c}, means2d_);
    TORCH_CHECK_VALUE(heads.size() == views.size() && bits.size() == views.size(),
                      "views, heads and bits must be equally long, got ", views.size(), ", ", heads.size(), ", ",
                      bits.size());
    for (int64_t i = 0; i < r; ++i) {
      TORCH_CHECK_VALUE(views[i] >= 0 && views[i] < v, "views[", i, "] = ", views[i], " is not one of the ", v,
                        " views");
      TORCH_CHECK_VALUE(heads[i] >= 0 && heads[i] < h, "heads[", i, "] = ", heads[i], " is not one of the ", h,
                        " heads");
      TORCH_CHECK_VALUE(bits[i] >= 1 && bits[i] <= 255, "bits[", i, "] = ", bits[i], " must be 1 ... 255");
    }
    TORCH_CHECK_VALUE(r <= kMaxRenders && v <= kMaxRenders, "at most ", kMaxRenders,
                      " views and renders in one call, got ", v, " and ", r);
    check_image(width, height);

    means2d = means2d_.contiguous();
    conics = conics_.contiguous();
    active = active_.contiguous();
    opacities = raw ? at::sigmoid(opacities_).contiguous() : opacities_.contiguous();
    colours = raw ? colours_.mul(kHarmonic0).add_(0.5).clamp_min_(0).contiguous() : colours_.contiguous();
    view_bits.assign(v, 0);
    for (int64_t i = 0; i < r; ++i) view_bits[views[i]] |= bits[i];
    for (int64_t i = 0; i < r; ++i) layer.push_back(std::count(views.begin(), views.begin() + i, views[i]));
    check.reset(new bool[r]);
    for (int64_t i = 0; i < r; ++i) check[i] = view_bits[views[i]] != bits[i];
  }

  int64_t renders() const { return int64_t(views.size()); }
  int64_t channels() const { return colours.size(2); }
  int64_t tiles_x(int64_t tile) const { return generic::ceil_div(width, tile); }
  int64_t tiles_y(int64_t tile) const { return generic::ceil_div(height, tile); }

  int64_t layers() const { return layer.empty() ? 1 : 1 + *std::max_element(layer.begin(), layer.end()); }

  /// For the channels [first, first + count).
  template <class S>
  BlendArguments<S> arguments(const Pairs& pairs, int64_t tile, int64_t first, int64_t count) const {
    BlendArguments<S> in{};
    in.gaussians = means2d.size(1);
    in.view_count = means2d.size(0);
    in.renders = renders();
    in.channels = count;
    in.stride = channels();
    in.first_slice = first == 0;
    in.width = width;
    in.height = height;
    in.tiles_x = tiles_x(tile);
    in.tiles_y = tiles_y(tile);
    in.views = views.data();
    in.heads = heads.data();
    in.bits = bits.data();
    in.render_layers = layer.data();
    in.check_bits = check.get();
    in.means2d = means2d.const_data_ptr<S>();
    in.conics = conics.const_data_ptr<S>();
    in.active = active.const_data_ptr<uint8_t>();
    in.opacities = opacities.const_data_ptr<S>();
    in.colours = colours.const_data_ptr<S>() + first;
    in.tile_offsets = pairs.tile_offsets.const_data_ptr<int32_t>();
    in.pair_gaussians = pairs.gaussians.const_data_ptr<int32_t>();
    in.pair_slots = pairs.slots.const_data_ptr<int32_t>();
    in.gaussian_offsets = pairs.gaussian_offsets.const_data_ptr<int32_t>();
    in.pairs = pairs.count();
    in.layers = layers();
    return in;
  }
};

/// Calls `run(first, count)` for slices of at most kMostChannels channels, of nearly equal size.
template <class Run>
void for_each_slice(int64_t channels, const Run& run) {
  const int64_t slices = generic::ceil_div(channels, int64_t(kMostChannels));
  const int64_t size = generic::ceil_div(channels, slices);
  for (int64_t first = 0; first < channels; first += size) run(first, std::min(size, channels - first));
}

template <class Device>
BlendOutputs blend_op(const Tensor& means2d, const Tensor& conics, const Tensor& active, const Tensor& opacities,
                      const Tensor& colours, const Tensor& backgrounds, const std::optional<Tensor>& screen,
                      IntArrayRef views, IntArrayRef heads, IntArrayRef bits, int64_t width, int64_t height, bool raw,
                      int64_t capacity) {
  const typename Device::Guard guard(means2d.device());
  const BlendInputs inputs(means2d, conics, active, opacities, colours, views, heads, bits, width, height, raw);
  const int64_t r = inputs.renders(), c = inputs.channels();
  check_float(backgrounds, "backgrounds", {r, c}, means2d);
  if (screen) check_float(*screen, "screen", {colours.size(0), means2d.size(0), means2d.size(1), 2}, means2d);
  TORCH_CHECK_VALUE(capacity >= 0 && capacity < (int64_t(1) << 31), "capacity must be 0 ... 2^31 - 1, got ", capacity);
  const Tensor seen_through = backgrounds.contiguous();
  const Tensor images = at::empty({r, c, height, width}, means2d.options());
  const Tensor transmittance = at::empty({r, height, width}, means2d.options());
  const Tensor stops = at::empty({r, height, width}, means2d.options().dtype(at::kInt));
  Pairs pairs;
  Tensor starts;
  AT_DISPATCH_FLOATING_TYPES(means2d.scalar_type(), "blend", [&] {
    pairs = Device::template bin<scalar_t>(inputs, capacity);
    int64_t room = 0;
    for_each_slice(c, [&](int64_t, int64_t count) { room += Device::room(inputs, pairs, count); });
    // Zeros: what stays unused is an output, too, and holds nothing that was in memory before.
    starts = at::zeros({room}, means2d.options());
    auto* start = starts.mutable_data_ptr<scalar_t>();
    for_each_slice(c, [&](int64_t first, int64_t count) {
      auto in = inputs.arguments<scalar_t>(pairs, Device::kTile, first, count);
      in.backgrounds = seen_through.const_data_ptr<scalar_t>() + first;
      in.images = images.mutable_data_ptr<scalar_t>() + first * width * height;
      in.transmittance = transmittance.mutable_data_ptr<scalar_t>();
      in.stops = stops.mutable_data_ptr<int32_t>();
      in.starts = start;
      start += Device::room(inputs, pairs, count);
      Device::blend(in, pairs);
    });
  });
  return {images,      transmittance,          stops, pairs.tile_offsets, pairs.gaussians,
          pairs.slots, pairs.gaussian_offsets, starts};
}

template <class Device>
BlendGradients blend_backward_op(const Tensor& v_images, const Tensor& v_transmittance, const Tensor& images,
                                 const Tensor& transmittance, const Tensor& stops, const Tensor& tile_offsets,
                                 const Tensor& pair_gaussians, const Tensor& pair_slots, const Tensor& gaussian_offsets,
                                 const Tensor& starts, const Tensor& means2d, const Tensor& conics,
                                 const Tensor& active, const Tensor& opacities, const Tensor& colours,
                                 IntArrayRef views, IntArrayRef heads, IntArrayRef bits, int64_t width, int64_t height,
                                 bool raw) {
  const typename Device::Guard guard(means2d.device());
  const BlendInputs inputs(means2d, conics, active, opacities, colours, views, heads, bits, width, height, raw);
  const int64_t v = means2d.size(0), n = means2d.size(1), h = colours.size(0);
  const int64_t r = inputs.renders(), c = inputs.channels();
  const int64_t tiles = inputs.tiles_x(Device::kTile) * inputs.tiles_y(Device::kTile);
  const auto floats = [&](const Tensor& tensor, const char* name, IntArrayRef shape) {
    check_float(tensor, name, shape, means2d);
    return tensor.contiguous();
  };
  const auto ints = [&](const Tensor& tensor, const char* name, IntArrayRef shape) {
    check_ints(tensor, name, shape, means2d);
    return tensor.contiguous();
  };
  const Tensor g_images = floats(v_images, "v_images", {r, c, height, width});
  const Tensor g_transmittance = floats(v_transmittance, "v_transmittance", {r, height, width});
  const Tensor drawn = floats(images, "images", {r, c, height, width});
  const Tensor left = floats(transmittance, "transmittance", {r, height, width});
  const Tensor stopped = ints(stops, "stops", {r, height, width});
  TORCH_CHECK_VALUE(pair_slots.dim() == 1, "pair_slots must have shape (pairs,), got ", pair_slots.sizes());
  const Pairs pairs = {
      ints(tile_offsets, "tile_offsets", {v, tiles + 1}), ints(pair_gaussians, "pair_gaussians", {pair_slots.size(0)}),
      ints(pair_slots, "pair_slots", {pair_slots.size(0)}), ints(gaussian_offsets, "gaussian_offsets", {v * n + 1})};
  int64_t room = 0;
  for_each_slice(c, [&](int64_t, int64_t count) { room += Device::room(inputs, pairs, count); });
  const Tensor kept = floats(starts, "starts", {room});
  Device::check_lists(inputs, pairs);

  Tensor v_means2d = at::empty({h, v, n, 2}, means2d.options());
  Tensor v_conics = h > 0 ? at::empty_like(inputs.conics) : at::zeros_like(inputs.conics);
  Tensor v_opacities = at::empty_like(inputs.opacities), v_colours = at::empty_like(inputs.colours);
  AT_DISPATCH_FLOATING_TYPES(means2d.scalar_type(), "blend_backward", [&] {
    Tensor records, nothing;  // the transmittance's gradient counts once, with the first slice
    auto* start = kept.const_data_ptr<scalar_t>();
    for_each_slice(c, [&](int64_t first, int64_t count) {
      auto in = inputs.arguments<scalar_t>(pairs, Device::kTile, first, count);
      // The first slice is the largest.
      if (!records.defined()) records = at::empty({in.layers, in.pairs, record_size(count)}, means2d.options());
      in.images = const_cast<scalar_t*>(drawn.const_data_ptr<scalar_t>()) + first * width * height;
      in.transmittance = const_cast<scalar_t*>(left.const_data_ptr<scalar_t>());
      in.stops = const_cast<int32_t*>(stopped.const_data_ptr<int32_t>());
      in.starts = const_cast<scalar_t*>(start);
      start += Device::room(inputs, pairs, count);
      in.v_images = g_images.const_data_ptr<scalar_t>() + first * width * height;
      if (first > 0 && !nothing.defined()) nothing = at::zeros_like(g_transmittance);
      in.v_transmittance = (first > 0 ? nothing : g_transmittance).const_data_ptr<scalar_t>();
      in.records = records.mutable_data_ptr<scalar_t>();
      in.v_means2d = v_means2d.mutable_data_ptr<scalar_t>();
      in.v_conics = v_conics.mutable_data_ptr<scalar_t>();
      in.v_opacities = v_opacities.mutable_data_ptr<scalar_t>();
      in.v_colours = v_colours.mutable_data_ptr<scalar_t>() + first;
      Device::blend_backward(in, pairs);
      Device::sum_records(in, h);
    });
  });
  if (raw) {
    v_opacities = at::sigmoid_backward(v_opacities, inputs.opacities);
    v_colours = at::threshold_backward(v_colours, inputs.colours, 0).mul_(kHarmonic0);
  }
  return {v_means2d, v_conics, v_opacities, v_colours};
}

/// Registers both directions for a device.
template <class Device>
void register_blend(torch::Library& m) {
  m.impl("blend", &blend_op<Device>);
  m.impl("blend_backward", &blend_backward_op<Device>);
}

}  // namespace medgs
