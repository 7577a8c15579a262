"""The operators of one batch: their phases, and on a CPU how close they are to the machine's floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import table
from benchmarks.iterations import by_phase
from benchmarks.scenes import VIEWS, Bench, neighbours
from benchmarks.workload import CPU, CUDA, Attainable, Recorder, count
from gaussian_renderer import ACTIVE, rasterizer
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE


def throughput(bench: Bench) -> dict[str, Any]:
    """Pairs per second and the phases of the rasteriser, beside the least time for the arithmetic."""
    model, camera = bench.model()
    on_cpu = bench.device.type == "cpu"
    phases_of = Phases(model, camera, bench.device)
    kernels = CPU if on_cpu else CUDA
    with Recorder() as recorder, torch.no_grad():
        phases_of.draw()
    work = count(recorder.calls["blend"], kernels)
    evaluated = work.forward + work.backward
    print(
        f"{len(model)} Gaussians, {VIEWS} views of {camera.width} x {camera.height}: {work.listed} pairs of Gaussian "
        f"and tile ({kernels.tile} x {kernels.tile} px), {work.listed - work.consumed} of them behind saturated "
        "pixels.\n"
        f"Pairs of Gaussian and pixel: {work.forward} evaluated forward, {work.backward} backward; "
        f"{work.useful} useful ({200 * work.useful / evaluated:.0f} %)."
    )
    threads = torch.get_num_threads()
    runs = []
    for used in sorted({1, threads}) if on_cpu else [threads]:
        torch.set_num_threads(used)
        phases, operator = phases_of.measure(bench) if on_cpu else phases_of.measure_on_gpu(bench)
        cores = used if on_cpu else 1
        row: dict[str, Any] = {
            "threads": used if on_cpu else None,
            "phases_s": phases,
            "blend_operator_s": operator,
            "useful_per_s_core_blend": work.useful / operator / cores,
            "useful_per_s_core_all": work.useful / sum(phases.values()) / cores,
        }
        if on_cpu:
            can = Attainable.measured(bench.device, used, bench.quick)
            floor = {name: n / can.lane_operations for name, n in work.operations(CPU).items()}
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
        f"useful pairs per second{' and core' if row['threads'] else ''}: {row['useful_per_s_core_blend']:.3g} in "
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
    """The operators of one batch, each on its own leaf tensors.

    On a CPU binning, and the writing and summing of the backward pass's records, are isolated by an opaque sheet in
    front of the same scene: all lists are made and all records summed, but every pixel saturates at once. On a GPU
    the kernels have names.
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
        sheet = 3  # layers: two with the clamped alpha of 0.99 bring a pixel to its least transmittance
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

    def measure_on_gpu(self, bench: Bench) -> tuple[dict[str, float], float]:
        """Seconds on the device of each phase; and of blend and its backward, which hold four of them."""
        means2d, conics, *_ = self.fold()
        v_folded = torch.randn_like(means2d), torch.randn_like(conics)
        images = self.draw()
        v_images = torch.randn_like(images) / images.numel()
        leaves = [t for t in self.scene if t.requires_grad]

        def forward_backward() -> None:
            torch.autograd.grad(self.fold()[:2], self.raw, v_folded)
            torch.autograd.grad(self.draw(), leaves, v_images)

        phases = by_phase(bench.kernels(forward_backward, repeats=50))
        return phases, sum(phases[name] for name in ("binning", "blend", "blend backward", "records"))

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
