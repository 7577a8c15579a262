// `blend` and `splat`: projected Gaussians into images, front to back. Schemas, binning, and the CPU side.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/blend_op.h"
#include "kernels.h"

namespace medgs {
namespace {

/// How many times as many pixels a walk over coarser tiles may look at.
constexpr double kMostWaste = 1.25;
constexpr int64_t kFewTiles = 32;  // of a splat on average: coarser tiles would waste more
constexpr int kCoarsest = 3;       // doublings: tiles of 32 px

TileRectangle coarser(TileRectangle r, int doublings) {
  if (r.x0 >= r.x1 || r.y0 >= r.y1) return {0, 0, 0, 0};
  return {uint16_t(r.x0 >> doublings), uint16_t(((r.x1 - 1) >> doublings) + 1), uint16_t(r.y0 >> doublings),
          uint16_t(((r.y1 - 1) >> doublings) + 1)};
}

/// Doublings of the tile's side: as many as leave a walk over the lists nearly as short. Splats much larger than a tile
/// then have a sixteenth, or less, of the pairs.
int doublings_for(const TileRectangle* rectangles, int64_t count, int team) {
  int64_t pairs[kCoarsest + 1] = {}, splats = 0;
#pragma omp parallel for schedule(static) reduction(+ : pairs[ : 1], splats) num_threads(team)
  for (int64_t i = 0; i < count; ++i) {
    const TileRectangle r = rectangles[i];
    pairs[0] += int(r.x1 - r.x0) * int(r.y1 - r.y0);
    splats += r.x1 > r.x0;
  }
  if (pairs[0] < kFewTiles * splats) return 0;
  int best = 0;
  for (int d = 1; d <= kCoarsest; ++d) {
#pragma omp parallel for schedule(static) reduction(+ : pairs[ : kCoarsest + 1]) num_threads(team)
    for (int64_t i = 0; i < count; ++i) {
      const TileRectangle r = coarser(rectangles[i], d);
      pairs[d] += int(r.x1 - r.x0) * int(r.y1 - r.y0);
    }
    if (double(pairs[d]) * (int64_t(1) << 2 * d) > kMostWaste * double(pairs[0])) break;
    best = d;
  }
  return best;
}

/// A counting sort in two passes over the Gaussians. Each view is cut into parts that are counted and filled in
/// parallel; parts follow each other within a tile, so the lists come out in the order of the index, or of `order`.
template <class S>
Pairs bin(const BlendInputs& of) {
  const int64_t views = of.view_count, n = of.gaussians, heads = of.head_count;
  const S *means2d = data<S>(of.means2d), *conics = data<S>(of.conics), *opacities = data<S>(of.opacities);
  const uint8_t* active = data<uint8_t>(of.active);
  const int32_t* order = data<int32_t>(of.order);
  const int team = threads_for(views * n, medgs::threads());

  const std::unique_ptr<S[]> limits(new S[n]);  // a pair exists where some head can be seen
#pragma omp parallel for schedule(static) num_threads(team)
  for (int64_t i = 0; i < n; ++i) {
    S opacity = 0;
    for (int64_t h = 0; h < heads; ++h) opacity = std::max(opacity, opacities[h * n + i]);
    limits[i] = generic::visible_limit(opacity);
  }
  const std::unique_ptr<TileRectangle[]> rectangles(new TileRectangle[views * n]);
  constexpr int64_t kBlock = 1024;
  const int64_t blocks = generic::ceil_div(n, kBlock);
#pragma omp parallel for schedule(static) num_threads(team)
  for (int64_t job = 0; job < views * blocks; ++job) {
    const int64_t view = job / blocks, begin = job % blocks * kBlock;
    BoundsArguments<S> bounds{};
    bounds.means2d = means2d + 2 * view * n;
    bounds.conics = conics + 3 * view * n;
    bounds.active = active + view * n;
    bounds.limits = limits.get();
    bounds.bits = uint8_t(of.view_bits[view]);
    bounds.width = of.width;
    bounds.height = of.height;
    bounds.rectangles = rectangles.get() + view * n;
    kernels<S>().bound(bounds, begin, std::min(n, begin + kBlock));
  }
  const int doublings = doublings_for(rectangles.get(), views * n, team);
  const int64_t tile = int64_t(kTile) << doublings, tiles_x = of.tiles_x(tile), tiles = of.tiles(tile);

  // At most as many parts as keep their counts of the tiles to 32 MB.
  const int64_t affordable = (int64_t(1) << 22) / std::max<int64_t>(1, views * tiles);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({team, n / 1024, affordable}));
  const auto part_begin = [&](int64_t part) { return part * n / parts; };
  const auto reached = [&](int64_t view, int64_t place) {
    const TileRectangle r = rectangles[view * n + (order ? order[place] : place)];
    return doublings == 0 ? r : coarser(r, doublings);
  };
  std::vector<int64_t> counts(views * parts * tiles, 0);  // then: where each part's pairs of a tile start
  std::vector<int64_t> part_slots(views * parts + 1, 0);
#pragma omp parallel for schedule(dynamic) num_threads(team)
  for (int64_t job = 0; job < views * parts; ++job) {
    const int64_t view = job / parts, part = job % parts;
    int64_t* count = counts.data() + job * tiles;
    int64_t pairs = 0;
    for (int64_t i = part_begin(part); i < part_begin(part + 1); ++i) {
      const TileRectangle r = reached(view, i);
      pairs += int64_t(r.x1 - r.x0) * (r.y1 - r.y0);
      for (int y = r.y0; y < r.y1; ++y)
        for (int x = r.x0; x < r.x1; ++x) ++count[y * tiles_x + x];
    }
    part_slots[job + 1] = pairs;
  }
  std::partial_sum(part_slots.begin(), part_slots.end(), part_slots.begin());
  const int64_t total = part_slots.back();
  MEDGS_CHECK(total <= std::numeric_limits<int32_t>::max(), "blend: ", total,
              " pairs of Gaussian and tile are more than 2^31: render fewer views at once, or smaller images");

  const auto ints = [&](const Shape& shape) { return empty(shape, of.means2d, ScalarType::Int); };
  Pairs out = {tile, ints({views, tiles + 1}), ints({total}), ints({total}), ints({views * n + 1})};
  int32_t* tile_offsets = writable<int32_t>(out.tile_offsets);
  for (int64_t view = 0; view < views; ++view) {
    int64_t next = part_slots[view * parts];
    for (int64_t t = 0; t < tiles; ++t) {
      tile_offsets[view * (tiles + 1) + t] = int32_t(next);
      for (int64_t part = 0; part < parts; ++part) {
        int64_t& count = counts[(view * parts + part) * tiles + t];
        const int64_t start = next;
        next += count;
        count = start;
      }
    }
    tile_offsets[view * (tiles + 1) + tiles] = int32_t(next);
  }

  int32_t* gaussians = writable<int32_t>(out.gaussians);
  int32_t* slots = writable<int32_t>(out.slots);
  int32_t* gaussian_offsets = writable<int32_t>(out.gaussian_offsets);
#pragma omp parallel for schedule(dynamic) num_threads(team)
  for (int64_t job = 0; job < views * parts; ++job) {
    const int64_t view = job / parts, part = job % parts;
    int64_t* next = counts.data() + job * tiles;
    int64_t slot = part_slots[job];
    for (int64_t i = part_begin(part); i < part_begin(part + 1); ++i) {
      const TileRectangle r = reached(view, i);
      gaussian_offsets[view * n + i] = int32_t(slot);
      for (int y = r.y0; y < r.y1; ++y)
        for (int x = r.x0; x < r.x1; ++x) {
          const int64_t at = next[y * tiles_x + x]++;
          gaussians[at] = order ? order[i] : int32_t(i);
          slots[at] = int32_t(slot++);
        }
    }
  }
  gaussian_offsets[views * n] = int32_t(total);
  return out;
}

/// Places in the order of depth, equal ones by index: a radix sort, 11 bits at a time.
template <class S>
void sort_by_depth(const S* depths, const int32_t* radii, int64_t n, int32_t* order) {
  using Key = generic::DepthKey<S>;
  constexpr int kDigit = 11, kDigits = (8 * sizeof(Key) + kDigit - 1) / kDigit, kValues = 1 << kDigit;
  std::vector<Key> keys(n), other_keys(n);
  std::vector<int32_t> places(n), other_places(n);
  std::vector<int64_t> counts(kDigits * kValues, 0);
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = generic::depth_key(depths[i], radii[i]);
    places[i] = int32_t(i);
    for (int d = 0; d < kDigits; ++d) ++counts[d * kValues + int(keys[i] >> d * kDigit & (kValues - 1))];
  }
  for (int d = 0; d < kDigits; ++d) {
    int64_t* count = counts.data() + d * kValues;
    if (n > 0 && count[int(keys[0] >> d * kDigit & (kValues - 1))] == n) continue;  // all have the same digit
    int64_t next = 0;
    for (int v = 0; v < kValues; ++v) {
      const int64_t here = count[v];
      count[v] = next;
      next += here;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = count[int(keys[i] >> d * kDigit & (kValues - 1))]++;
      other_keys[at] = keys[i];
      other_places[at] = places[i];
    }
    keys.swap(other_keys);
    places.swap(other_places);
  }
  std::copy(places.begin(), places.end(), order);
}

/// Refuses lists that would lead a kernel out of bounds. Autograd hands over what `blend` made; others may not.
void check_range(const Tensor& tensor, const char* name, int64_t low, int64_t high, bool ascending) {
  const auto* values = data<int32_t>(tensor);
  const int64_t size = tensor.numel();
  bool fits = true;
  for (int64_t i = 0; i < size; ++i) fits &= values[i] >= low && values[i] <= high;
  MEDGS_CHECK_VALUE(fits, name, " must lie within ", low, " ... ", high);
  for (int64_t i = 1; ascending && i < size; ++i) fits &= values[i - 1] <= values[i];
  MEDGS_CHECK_VALUE(fits, name, " must ascend");
}

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  /// Lists of as many tiles as some doubling gives; equally many are equal tiles.
  static int64_t tile_of(const BlendInputs& of, const Tensor& tile_offsets) {
    for (int64_t tile = kTile; tile <= int64_t(kTile) << kCoarsest; tile *= 2)
      if (tile_offsets.dim() == 2 && tile_offsets.size(1) == of.tiles(tile) + 1) return tile;
    return kTile;
  }
  template <class S>
  static Pairs bin(const BlendInputs& of, int64_t /*capacity*/) {
    return medgs::bin<S>(of);
  }
  static int64_t room(const BlendInputs&, const Pairs&, int64_t) { return 0; }
  static void check_lists(const BlendInputs& of, const Pairs& pairs) {
    const int64_t last = pairs.count() - 1;
    check_range(pairs.tile_offsets, "tile_offsets", 0, last + 1, true);
    check_range(pairs.gaussian_offsets, "gaussian_offsets", 0, last + 1, true);
    check_range(pairs.gaussians, "pair_gaussians", 0, of.gaussians - 1, false);
    check_range(pairs.slots, "pair_slots", 0, last, false);
  }
  static void check_order(const Tensor& order) { check_range(order, "order", 0, order.numel() - 1, false); }
  template <class S>
  static void blend(const BlendArguments<S>& in, const Pairs&) {
    kernels<S>().blend(in, medgs::threads());
  }
  template <class S>
  static void blend_backward(const BlendArguments<S>& in, const Pairs&) {
    kernels<S>().blend_backward(in, medgs::threads());
  }
  template <class S>
  static void sum_records(const BlendArguments<S>& in, int64_t heads) {
    kernels<S>().sum_records(in, heads, medgs::threads());
  }
  template <class S>
  static void activate(const S* opacities, const S* colours, int64_t opacity_count, int64_t colour_count, S* activated,
                       S* clamped) {
    kernels<S>().activate(opacities, opacity_count, activated);
    for (int64_t i = 0; i < colour_count; ++i) clamped[i] = generic::colour_of(colours[i]);
  }
  template <class S>
  static void activate_backward(const S* opacities, const S* colours, int64_t opacity_count, int64_t colour_count,
                                S* v_opacities, S* v_colours) {
    for (int64_t i = 0; i < opacity_count; ++i) v_opacities[i] *= opacities[i] * (S(1) - opacities[i]);
    for (int64_t i = 0; i < colour_count; ++i) v_colours[i] = generic::colour_gradient(colours[i], v_colours[i]);
  }
  template <class S>
  static void prepare(const SplatArguments<S>& in) {
#pragma omp parallel for schedule(static) num_threads(threads_for(in.gaussians, medgs::threads()))
    for (int64_t n = 0; n < in.gaussians; ++n) generic::prepare_splat(in, n);
  }
  template <class S>
  static void split(const SplatArguments<S>& in) {
#pragma omp parallel for schedule(static) num_threads(threads_for(in.gaussians, medgs::threads()))
    for (int64_t n = 0; n < in.gaussians; ++n) generic::split_gradient(in, n);
  }
  template <class S>
  static void sort_by_depth(const Tensor& depths, const Tensor& radii, const Tensor& order) {
    medgs::sort_by_depth(data<S>(depths), data<int32_t>(radii), order.numel(), writable<int32_t>(order));
  }
  template <class S>
  static void copy(const S* from, int64_t count, S* to) {
    std::copy(from, from + count, to);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diff_gaussian_rasterization, m) {
  m.def(
      "blend(Tensor means2d, Tensor conics, Tensor active, Tensor opacities, Tensor colours, Tensor backgrounds, "
      "Tensor? screen, int[] views, int[] heads, int[] bits, int width, int height, bool raw, int capacity=0, bool "
      "keep=True) "
      "-> (Tensor images, Tensor transmittance, Tensor stops, Tensor tile_offsets, Tensor pair_gaussians, "
      "Tensor pair_slots, Tensor gaussian_offsets, Tensor starts)");
  m.def(
      "blend_backward(Tensor v_images, Tensor v_transmittance, Tensor images, Tensor transmittance, Tensor stops, "
      "Tensor tile_offsets, Tensor pair_gaussians, Tensor pair_slots, Tensor gaussian_offsets, Tensor starts, "
      "Tensor means2d, Tensor conics, Tensor active, Tensor opacities, Tensor colours, int[] views, int[] heads, "
      "int[] bits, int width, int height, bool raw) "
      "-> (Tensor v_means2d, Tensor v_conics, Tensor v_opacities, Tensor v_colours)");
  m.def(
      "splat(Tensor means2d, Tensor conics, Tensor colours, Tensor depths, Tensor compensations, Tensor radii, "
      "Tensor opacities, Tensor background, Tensor? screen, int width, int height, bool inverse, bool count, "
      "bool keep=True) "
      "-> (Tensor colour, Tensor depth, Tensor transmittance, Tensor touched, Tensor stops, Tensor tile_offsets, "
      "Tensor pair_gaussians, Tensor pair_slots, Tensor gaussian_offsets, Tensor starts, Tensor order)");
  m.def(
      "splat_backward(Tensor? v_colour, Tensor? v_depth, Tensor? v_transmittance, Tensor colour, Tensor depth, "
      "Tensor transmittance, Tensor stops, Tensor tile_offsets, Tensor pair_gaussians, Tensor pair_slots, "
      "Tensor gaussian_offsets, Tensor starts, Tensor order, Tensor means2d, Tensor conics, Tensor colours, "
      "Tensor depths, Tensor compensations, Tensor radii, Tensor opacities, int width, int height, bool inverse, "
      "int columns) "
      "-> (Tensor v_means2d, Tensor v_conics, Tensor v_colours, Tensor v_depths, Tensor v_compensations, "
      "Tensor v_opacities, Tensor v_screen)");
}

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CPU, m) { register_blend<Cpu>(m); }

}  // namespace medgs
