#!/usr/bin/env python3
"""Measures the speed of the rasteriser and of training on this machine; README.md here says what each number means.

python benchmarks/run.py --device cuda --out output/benchmark/speed.json
"""

from __future__ import annotations

import functools
import inspect
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import available_cores, describe, measure, synchronise, table, write_json
from scenes import (
    FRAMES,
    Drawing,
    model_in_training,
    neighbours,
    settle,
    trained_model,
    write_phantom,
)
from torch import Tensor
from workload import TILE, Attainable, Recorder, count

import train
from arguments import TrainOptions, resolve_device
from gaussian_renderer import ACTIVE, editing, rasterizer
from scene import iteration as scene_iteration
from scene.cameras import Camera
from scene.gaussian_model import IMAGE, GaussianModel
from scene.training import Training
from utils.errors import ArgumentParser, UserError, run
from utils.spherical_harmonics import to_colour

CAMERA = Camera(128, 96)
GAUSSIANS, VIEWS, DEGREE = 24_000, 3, 7


@dataclass(frozen=True)
class Bench:
    """What all sections are told."""

    device: torch.device
    quick: bool
    checkpoint: str | None

    def measure(self, functions: Mapping[str, Callable[[], object]], repeats: int = 20) -> dict[str, float]:
        """Median seconds of each."""
        return measure(self.device, functions, 2 if self.quick else repeats, 1 if self.quick else 3)

    def model(self) -> tuple[GaussianModel, Camera]:
        """The trained one, or one in the state of training."""
        if self.checkpoint:
            return trained_model(self.checkpoint, self.device)
        count = 4000 if self.quick else GAUSSIANS
        return model_in_training(count, CAMERA, DEGREE, self.device), CAMERA


# ---- throughput ------------------------------------------------------------------------------------------------------


def throughput(bench: Bench) -> dict[str, Any]:
    """Pairs a second and the phases of the rasteriser, beside the least time that the arithmetic takes."""
    model, camera = bench.model()
    with Recorder() as recorder, torch.no_grad():
        Phases(model, camera, torch.device("cpu")).draw()
    work = count(recorder.calls["blend"])
    evaluated = work.forward + work.backward
    print(
        f"{len(model)} Gaussians, {VIEWS} views of {camera.width} x {camera.height}: {work.listed} pairs of Gaussian "
        f"and tile ({TILE} x {TILE} px), {work.listed - work.consumed} of them skipped behind saturated pixels.\n"
        f"Pairs of Gaussian and pixel: {work.forward} evaluated forward, {work.backward} backward; "
        f"{work.useful} useful ({200 * work.useful / evaluated:.0f} %)."
    )
    on_cpu = bench.device.type == "cpu"
    threads = torch.get_num_threads()
    runs = []
    for used in sorted({1, threads}) if on_cpu else [threads]:
        torch.set_num_threads(used)
        phases, operator = Phases(model, camera, bench.device).measure(bench)
        cores = used if on_cpu else 1
        row: dict[str, Any] = {
            "threads": used if on_cpu else None,
            "phases_s": phases,
            "blend_operator_s": operator,
            "useful_per_s_core_blend": work.useful / operator / cores,
            "useful_per_s_core_all": work.useful / sum(phases.values()) / cores,
        }
        if on_cpu:
            can = Attainable.measured(used, bench.quick)
            floor = work.floor(can.lane_operations)
            # A record of 8 floats for each listed pair, written and read.
            floor["records"] = 2 * 4 * 8 * work.listed / can.bytes
            row |= {"attainable": asdict(can), "floor_s": floor}
            row["floor_share_blend"] = sum(floor.values()) / operator
            row["floor_share_all"] = sum(floor.values()) / sum(phases.values())
        runs.append(row)
        _print_phases(row)
    torch.set_num_threads(threads)
    scene = {"gaussians": len(model), "width": camera.width, "height": camera.height, "views": VIEWS}
    return {"scene": scene, "pairs": asdict(work), "runs": runs}


def _print_phases(row: dict[str, Any]) -> None:
    floor, phases = row.get("floor_s", {}), row["phases_s"]
    total = sum(phases.values())
    where = f"{row['threads']} thread(s)" if row["threads"] else "GPU"
    lines = [
        [name, 1e3 * s, 100 * s / total, 1e3 * floor[name] if name in floor else None]
        for name, s in phases.items()
    ]
    print()
    print(table([f"{where}: phase", "ms", "%", "floor, ms"], lines))
    print(
        f"useful pairs a second{' and core' if row['threads'] else ''}: {row['useful_per_s_core_blend']:.3g} in "
        f"blend and its backward, {row['useful_per_s_core_all']:.3g} in all"
    )
    if floor:
        can = row["attainable"]
        print(
            f"attainable: {can['lane_operations'] / 1e9:.0f} G lane operations/s ({can['source']}; a matrix product: "
            f"{can['matrix_product'] / 1e9:.0f}), copying {can['bytes'] / 1e9:.1f} GB/s. The floor is "
            f"{100 * row['floor_share_blend']:.0f} % of blend and its backward, "
            f"{100 * row['floor_share_all']:.0f} % of all"
        )


class Phases:
    """The operators of one batch, apart, on leaves of their own.

    Binning, and the writing and summing of the backward pass's records, are isolated by an opaque sheet in front of
    the same scene: all lists are made and all records summed, while every pixel is saturated at once.
    """

    def __init__(self, model: GaussianModel, camera: Camera, device: torch.device) -> None:
        self.ops = rasterizer("compiled")
        self.camera = camera
        p = {name: value.detach().to(device) for name, value in model.params.items()}
        raw = p["xyz"], p["w1"], p["m"].flatten(), p["sigma"].flatten(), p["scaling"], p["rotation"].flatten()
        self.raw = self.leaves(*raw)
        self.times = model.times(neighbours(model, VIEWS)).detach().to(device)
        self.signs = torch.ones(VIEWS, device=device)
        with torch.no_grad():
            means2d, conics, _, active = self.fold()
            opacities = model.raw_opacities([IMAGE]).to(device)
            colours = model.raw_colours([IMAGE], camera).to(device)
        self.scene = self.leaves(means2d, conics, active, opacities, colours)
        sheet = 3  # layers: two of the clamped alpha 0.99 leave a pixel its least transmittance
        middle = means2d.new_tensor([camera.width / 2, camera.height / 2]).expand(VIEWS, sheet, 2)
        flat = means2d.new_tensor([1e-9, 0, 1e-9]).expand(VIEWS, sheet, 3)
        self.behind_sheet = self.leaves(
            torch.cat([middle, means2d], 1),
            torch.cat([flat, conics], 1),
            torch.cat([torch.full_like(active[:, :sheet], ACTIVE), active], 1),
            torch.cat([torch.full_like(opacities[:, :sheet], 50.0), opacities], 1),
            torch.cat([colours[:, :sheet], colours], 1),
        )

    @staticmethod
    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]

    def fold(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        camera = self.camera
        size = camera.pixels_per_unit, camera.width, camera.height
        return self.ops.fold(*self.raw, self.times, self.signs, *size)

    def draw(self, scene: list[Tensor] | None = None) -> Tensor:
        """Images (VIEWS, C, H, W)."""
        scene = scene or self.scene
        backgrounds = torch.zeros(VIEWS, scene[4].shape[2], device=scene[0].device)
        renders = list(range(VIEWS)), [0] * VIEWS, [ACTIVE] * VIEWS
        size = self.camera.width, self.camera.height
        images, _ = self.ops.blend(*scene, backgrounds, *renders, *size, raw=True)
        return images

    def measure(self, bench: Bench) -> tuple[dict[str, float], float]:
        """Seconds of each phase; and of blend and its backward, which hold four of them."""
        means2d, conics, *_ = self.fold()
        v_folded = torch.randn_like(means2d), torch.randn_like(conics)

        def draw_backward(scene: list[Tensor]) -> Callable[[], object]:
            images = self.draw(scene)
            leaves = [t for t in scene if t.requires_grad]
            v_images = torch.randn_like(images) / images.numel()
            return lambda: torch.autograd.grad(images, leaves, v_images, retain_graph=True)

        s = bench.measure(
            {
                "fold": self.fold,
                "draw": self.draw,
                "draw sheet": lambda: self.draw(self.behind_sheet),
                "backward": draw_backward(self.scene),
                "backward sheet": draw_backward(self.behind_sheet),
                "fold backward": lambda: torch.autograd.grad(
                    (means2d, conics), self.raw, v_folded, retain_graph=True
                ),
            },
            repeats=50,
        )
        phases = {
            "fold": s["fold"],
            "binning": s["draw sheet"],
            "blend": s["draw"] - s["draw sheet"],
            "blend backward": s["backward"] - s["backward sheet"],
            "records": s["backward sheet"],
            "fold backward": s["fold backward"],
        }
        return phases, s["draw"] + s["backward"]


# ---- ratios ----------------------------------------------------------------------------------------------------------


def oracle(bench: Bench) -> dict[str, Any]:
    """The compiled operators against the dense PyTorch form of the same mathematics, forward and backward."""
    gaussians, camera = (200, Camera(32, 24)) if bench.quick else (2000, Camera(64, 48))
    model = model_in_training(gaussians, camera, DEGREE, bench.device)
    drawings = {
        name: Drawing(model, camera, neighbours(model, VIEWS), name) for name in ("compiled", "oracle")
    }
    # Not in turns: whoever follows the oracle pays for giving back its hundreds of megabytes.
    s: dict[str, float] = {}
    for name, drawing in drawings.items():
        s |= bench.measure({name: drawing.forward_backward}, repeats=7)
    difference = largest_difference(*(drawing.forward().images for drawing in drawings.values()))
    ratio = s["oracle"] / s["compiled"]
    size = f"{gaussians} Gaussians, {VIEWS} views of {camera.width} x {camera.height}"
    rows = [["compiled", 1e3 * s["compiled"], 1.0], ["oracle", 1e3 * s["oracle"], ratio]]
    print(table([size, "ms", "ratio"], rows))
    print(f"largest difference of a pixel: {difference:.1e}")
    return {"scene": size, "seconds": s, "ratio": ratio, "largest_difference": difference}


def largest_difference(images: Tensor, others: Tensor) -> float:
    return float((images - others).detach().abs().max())


def operators(bench: Bench) -> dict[str, Any]:
    """The folded operator against the general rasteriser, and on CUDA the general rasteriser against gsplat."""
    model, camera = bench.model()
    positions = neighbours(model, VIEWS)
    folded = Drawing(model, camera, positions)
    # What --modify goes through, with the gradients that it has no use for.
    cut, draw = inspect.unwrap(editing.cut), inspect.unwrap(editing.draw)

    def one_by_one() -> Tensor:
        (opacities,), (colours,) = model.opacities([IMAGE]), to_colour(model.raw_colours([IMAGE], camera))
        images = []
        for position in positions:
            at = cut(model, position)
            images.append(draw(at, at.active(ACTIVE), opacities, colours, camera, folded.background))
        return torch.stack(images)

    def one_by_one_backward() -> None:
        leaves = [p for p in model.params.values() if p.numel()]
        torch.autograd.grad(one_by_one(), leaves, folded.v_images, allow_unused=True)

    s = bench.measure({"folded": folded.forward_backward, "general": one_by_one_backward})
    difference = largest_difference(folded.forward().images, one_by_one())
    ratio = s["general"] / s["folded"]
    size = f"{len(model)} Gaussians, {VIEWS} views of {camera.width} x {camera.height}"
    rows = [["folded, once", 1e3 * s["folded"], 1.0], ["general, once a view", 1e3 * s["general"], ratio]]
    print(table([size, "ms", "ratio"], rows))
    print(f"largest difference of a pixel: {difference:.1e}")
    result: dict[str, Any] = {"scene": size, "seconds": s, "ratio": ratio, "largest_difference": difference}
    print()
    try:
        result["gsplat"] = against_gsplat(bench)
    except Unavailable as reason:
        print(f"gsplat: skipped, {reason}")
        result["gsplat"] = {"skipped": str(reason)}
    return result


class Unavailable(Exception):
    """What is to be measured cannot run on this machine; the message says why."""


def against_gsplat(bench: Bench) -> dict[str, Any]:
    """Our general rasteriser against gsplat's on one cloud of 3-D Gaussians: 3 colours and a depth, 16 px tiles."""
    if bench.device.type != "cuda":
        raise Unavailable("it needs a CUDA device")
    try:
        import gsplat
    except ImportError as error:
        raise Unavailable(f"it cannot be imported ({error})") from None
    from diff_gaussian_rasterization import GaussianRasterizationSettings, rasterize_gaussians

    n, camera = (5000, Camera(128, 128)) if bench.quick else (200_000, Camera(512, 512))
    device, generator = bench.device, torch.Generator().manual_seed(0)
    means = (2 * torch.rand(n, 3, generator=generator) - 1) * camera.half_width
    scales = torch.exp(math.log(0.003) + 0.6 * torch.randn(n, 3, generator=generator))
    quaternions = torch.nn.functional.normalize(torch.randn(n, 4, generator=generator))
    opacities = torch.sigmoid(-1.6 + 2.3 * torch.randn(n, generator=generator))
    colours = torch.rand(n, 3, generator=generator)
    given = [t.to(device).requires_grad_() for t in (means, scales, quaternions, opacities, colours)]
    view = camera.view_matrix(device=device)
    settings = GaussianRasterizationSettings(
        image_height=camera.height,
        image_width=camera.width,
        tanfovx=camera.tan_fov_x,
        tanfovy=camera.tan_fov_y,
        bg=torch.zeros(3, device=device),
        scale_modifier=1.0,
        viewmatrix=view,
        projmatrix=camera.projection_matrix(device=device),
        sh_degree=0,
        campos=camera.position(device=device),
        prefiltered=False,
        debug=False,
    )
    # gsplat's pixel centres lie at halves, ours at whole numbers: the same ray for half the width there.
    intrinsics = torch.tensor(
        [[camera.focal, 0, camera.width / 2], [0, camera.focal, camera.height / 2], [0, 0, 1]], device=device
    )
    offsets = torch.zeros(n, 3, device=device)

    def ours() -> Tensor:
        means, scales, quaternions, opacities, colours = given
        image, _, depth = rasterize_gaussians(
            means, offsets, None, colours, opacities, scales, quaternions, None, settings
        )
        return torch.cat([image, depth])  # (4, H, W)

    def theirs() -> Tensor:
        means, scales, quaternions, opacities, colours = given
        images, _, _ = gsplat.rasterization(
            means,
            quaternions,
            scales,
            opacities,
            colours,
            view.T[None].contiguous(),
            intrinsics[None],
            camera.width,
            camera.height,
            near_plane=0.2,
            eps2d=0.3,
            packed=False,
            tile_size=16,
            render_mode="RGB+D",
        )
        return images[0].movedim(-1, 0)

    def backward(draw: Callable[[], Tensor]) -> Callable[[], object]:
        v_image = torch.randn(4, camera.height, camera.width, device=device)
        return lambda: torch.autograd.grad(draw(), given, v_image)

    try:
        difference = largest_difference(ours()[:3], theirs()[:3])
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ) as error:  # its kernels compile at the first call
        raise Unavailable(f"it does not run here ({str(error).strip().splitlines()[0]})") from None
    s = bench.measure({"ours": backward(ours), "gsplat": backward(theirs)})
    size = f"{n} 3-D Gaussians, {camera.width} x {camera.height}"
    rows = [
        ["general rasteriser", 1e3 * s["ours"], 1.0],
        ["gsplat", 1e3 * s["gsplat"], s["gsplat"] / s["ours"]],
    ]
    print(table([size, "ms", "ratio"], rows))
    return {
        "version": gsplat.__version__,
        "scene": size,
        "seconds": s,
        "ratio": s["gsplat"] / s["ours"],
        "largest_difference": difference,
    }


# ---- growth ----------------------------------------------------------------------------------------------------------


def growth(bench: Bench) -> dict[str, Any]:
    """Forward and backward of one batch as one size grows and the others stay; the exponent is the last step's."""
    sizes: dict[str, list[int]] = {
        "Gaussians": [3000, 6000, 12_000, 24_000, 48_000, 96_000],
        "pixels": [32, 64, 128, 256, 512],  # width of a frame of 4 : 3
        "views": [1, 2, 3, 5, 8, 16],
        "P": [0, 1, 2, 4, 7, 14, 28],
    }
    if bench.device.type == "cuda":
        sizes["Gaussians"] += [200_000, 400_000, 800_000]
        sizes["pixels"] += [1024]
    if bench.quick:
        sizes = {name: values[:3] for name, values in sizes.items()}
    result: dict[str, Any] = {}
    for name, values in sizes.items():
        drawings, xs = {}, []
        for value in values:
            gaussians = value if name == "Gaussians" else GAUSSIANS // (8 if bench.quick else 1)
            width = value if name == "pixels" else CAMERA.width
            camera = Camera(width, width * 3 // 4)
            model = model_in_training(gaussians, camera, value if name == "P" else DEGREE, bench.device)
            views = neighbours(model, value if name == "views" else VIEWS)
            drawings[str(value)] = Drawing(model, camera, views).forward_backward
            xs.append(camera.width * camera.height if name == "pixels" else value)
        seconds = list(bench.measure(drawings, repeats=9).values())
        exponent = None
        if xs[-2] > 0:
            exponent = math.log(seconds[-1] / seconds[-2]) / math.log(xs[-1] / xs[-2])
        result[name] = {"sizes": xs, "seconds": seconds, "exponent": exponent}
        print(table([name, *map(str, xs), "exponent"], [["ms", *(1e3 * s for s in seconds), exponent]]))
        print()
        settle(bench.device)
    return result


# ---- training --------------------------------------------------------------------------------------------------------


@contextmanager
def training(bench: Bench, camera: Camera, **options: Any) -> Iterator[Training]:
    """A run of train.py on a made-up sequence, in a folder that goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        write_phantom(Path(folder, "data", "original"), camera.width, camera.height)
        defaults: dict[str, Any] = {
            "source_path": f"{folder}/data",
            "model_path": f"{folder}/model",
            "device": str(bench.device),
            "quiet": True,
            "test_iterations": (),
            "save_iterations": (),
        }
        yield Training.start(TrainOptions(**{**defaults, **options}), lambda _: None)


class Stopwatch:
    """Times the loop of train.py from outside: its functions are wrapped while it runs, the loop itself is its own.

    ``stages``: wait for the device around every stage, which tells them apart; without, only iterations are timed.
    """

    def __init__(self, device: torch.device, stages: bool) -> None:
        self.device, self.stages = device, stages
        self.starts: list[float] = []  # of the iterations
        self.spent: list[dict[str, float]] = []  # seconds of each stage, one entry an iteration

    def run(self, training: Training) -> None:
        ops = rasterizer("compiled")
        optimizer = type(training.optimizer)
        stages: list[tuple[Any, str, str]] = [
            (ops, "fold", "fold"),
            (ops, "blend", "blend"),
            (scene_iteration, "loss_terms", "loss"),
            (scene_iteration, "total_loss", "loss"),
            (Tensor, "backward", "backward"),
            (train, "control_density", "statistics and density"),
            (optimizer, "step", "optimiser"),
        ]
        with ExitStack() as patches:
            patches.enter_context(patch.object(train, "set_rates", self._iteration(train.set_rates)))
            if self.stages:
                eager = functools.partial(
                    scene_iteration.forward_backward, training
                )  # a recording has no stages
                patches.enter_context(patch.object(training, "stepper", lambda: eager))
            for owner, name, stage in stages if self.stages else []:
                patches.enter_context(patch.object(owner, name, self._stage(stage, getattr(owner, name))))
            train.train(training)

    def _iteration(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.stages:
                synchronise(self.device)
            self.starts.append(time.perf_counter())
            self.spent.append(defaultdict(float))
            return function(*args, **kwargs)

        return wrapped

    def _stage(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            synchronise(self.device)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronise(self.device)
                self.spent[-1][stage] += time.perf_counter() - start

        return wrapped

    def seconds(self, last: int) -> float:
        """Mean of the last iterations, the very last one left out: it also evaluates and saves."""
        return (self.starts[-1] - self.starts[-1 - last]) / last

    def medians(self, last: int) -> dict[str, float]:
        """Of each stage in the last iterations, and what is left of them as "rest"."""
        totals = [b - a for a, b in zip(self.starts[-1 - last : -1], self.starts[-last:], strict=True)]
        spent = self.spent[-1 - last : -1]
        names = dict.fromkeys(name for entry in spent for name in entry)
        out = {name: statistics.median(entry[name] for entry in spent) for name in names}
        rests = [total - sum(entry.values()) for total, entry in zip(totals, spent, strict=True)]
        return out | {"rest": statistics.median(rests)}


def iteration(bench: Bench) -> dict[str, Any]:
    """An iteration of train.py (img): its stages, after enough iterations for the model to have taken shape."""
    before, timed = (5, 5) if bench.quick else (600, 99)
    points = 2000 if bench.quick else GAUSSIANS
    result: dict[str, Any] = {}
    for name, ibfr_from in (("img", 10**6), ("img with IBFR", 0)):
        options = {"num_pts": points, "iterations": before + timed + 1, "ibfr_from_iter": ibfr_from}
        seconds = []
        for stages in (False, True):
            watch = Stopwatch(bench.device, stages)
            with training(bench, CAMERA, **options) as run_of_it:
                watch.run(run_of_it)
            seconds.append(watch.seconds(timed))
        medians = watch.medians(timed)
        total = sum(medians.values())
        gaussians = len(run_of_it.model)
        rows = [[stage, 1e3 * s, 100 * s / total] for stage, s in medians.items()]
        print(table([f"{name}, {gaussians} Gaussians", "ms", "%"], rows))
        print(
            f"together {1e3 * total:.3g} ms, waiting for the device between stages; without, {1e3 * seconds[0]:.3g} ms "
            f"an iteration: {1 / seconds[0]:.3g} it/s\n"
        )
        result[name] = {
            "gaussians": gaussians,
            "stages_s": medians,
            "iteration_s": seconds[0],
            "iterations_per_s": 1 / seconds[0],
        }
        settle(bench.device)
    return result


def training_on_cuda(bench: Bench) -> dict[str, Any]:
    """Iterations a second and peak memory of train.py (img) at sizes of the demo and of published runs."""
    if bench.device.type != "cuda":
        print("skipped: it needs a CUDA device")
        return {"skipped": "it needs a CUDA device"}
    sizes = [(GAUSSIANS, CAMERA), (100_000, Camera(197, 233)), (430_000, Camera(197, 233))]
    timed = 20 if bench.quick else 200
    rows, result = [], []
    for gaussians, camera in sizes[:1] if bench.quick else sizes:
        for ibfr_from in (10**6, 0):
            settle(bench.device)
            watch = Stopwatch(bench.device, stages=False)
            options = {
                "num_pts": gaussians,
                "iterations": 50 + timed,
                "ibfr_from_iter": ibfr_from,
                "densify_from_iter": 10**6,  # the number of Gaussians stays
            }
            with training(bench, camera, **options) as run_of_it:
                watch.run(run_of_it)
            peak = torch.cuda.max_memory_allocated(bench.device) / 1e9
            entry = {
                "gaussians": gaussians,
                "width": camera.width,
                "height": camera.height,
                "frames": FRAMES,
                "ibfr": ibfr_from == 0,
                "iterations_per_s": 1 / watch.seconds(timed),
                "peak_memory_GB": peak,
            }
            result.append(entry)
            ibfr = "yes" if entry["ibfr"] else "no"
            rows.append(
                [gaussians, f"{camera.width} x {camera.height}", ibfr, entry["iterations_per_s"], peak]
            )
    print(table(["Gaussians", "frame", "IBFR", "it/s", "peak memory, GB"], rows))
    return {"runs": result}


# ---- everything ------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "throughput": throughput,
    "oracle": oracle,
    "iteration": iteration,
    "operators": operators,
    "growth": growth,
    "training": training_on_cuda,
}


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """The growth curves, and the phases as bars; what was not measured is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sections = result["sections"]
    bars = {
        f"rasteriser, {row['threads'] or ''} thread(s)" if row["threads"] else "rasteriser": row["phases_s"]
        for row in sections.get("throughput", {}).get("runs", [])
    } | {f"iteration, {name}": run["stages_s"] for name, run in sections.get("iteration", {}).items()}
    curves = sections.get("growth", {})
    panels = len(bars) + len(curves)
    if not panels:
        return
    columns = min(4, panels)
    figure = Figure(figsize=(3.6 * columns, 3.0 * -(-panels // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(-(-panels // columns), columns, squeeze=False).flat)
    for name, curve in curves.items():
        ax = next(axes)
        ax.plot(curve["sizes"], [1e3 * s for s in curve["seconds"]], marker="o")
        ax.set(xlabel=name, ylabel="ms, forward and backward")
        if name in ("Gaussians", "pixels"):
            ax.set(xscale="log", yscale="log")
        else:
            ax.set_ylim(0, None)
        ax.grid(alpha=0.3)
    for name, phases in bars.items():
        ax = next(axes)
        ax.barh(list(phases), [1e3 * s for s in phases.values()])
        ax.invert_yaxis()
        ax.set(xlabel="ms", title=name)
    for ax in axes:
        ax.remove()
    about = result["about"]
    device = about["machine"] if about["device"] == "cpu" else about["device"]
    figure.suptitle(f"{device}, torch {about['torch']}, commit {about['commit']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    parser.add_argument(
        "--out", default="output/benchmark/speed.json", help="the result; the plot goes beside it"
    )
    parser.add_argument("--checkpoint", help="draw this trained model, not a made-up one (chkpnt<n>.pth)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two repeats: does everything run?")
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="only this section; may be repeated"
    )
    arguments = parser.parse_args()
    out = Path(arguments.out)
    if out.suffix != ".json":
        raise UserError(f"--out {out}: give a file name that ends in .json")
    device = resolve_device(arguments.device)
    torch.set_num_threads(available_cores())
    bench = Bench(device, arguments.quick, arguments.checkpoint)
    result: dict[str, Any] = {"about": describe(device) | {"quick": bench.quick}, "sections": {}}
    print(", ".join(f"{name} {value}" for name, value in result["about"].items() if value is not None))
    for name in arguments.only or SECTIONS:
        section = SECTIONS[name]
        print(f"\n## {name}\n{(section.__doc__ or '').splitlines()[0]}\n", flush=True)
        settle(device)
        result["sections"][name] = section(bench)
        write_json(out, result)  # what is measured is kept, whatever happens next
    plot(out.with_suffix(".png"), result)
    print(f"\n{out}, {out.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
