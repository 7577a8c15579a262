#!/usr/bin/env python3
"""Every refusal of every compiled operator, tried on this machine's library: each must reach Python as an error.

python -m benchmarks.refusals --device cuda --out benchmarks/results/refusals_h100.json

Each operator is called directly, without the Python around it, with one invalid argument at a time. The calls
run in their own process, so that a crash is noticed; the result counts them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ERRORS = {"value": ValueError, "type": TypeError}
V, N, H, C, P = 2, 5, 2, 3, 2  # views, Gaussians, heads, channels, degree
SIDE = 24


def operators(device: str) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each operator, and valid arguments."""
    import diff_gaussian_rasterization  # noqa: F401  (registers them)

    ops = torch.ops.diff_gaussian_rasterization
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    size = {"width": SIDE, "height": SIDE}
    renders = {"views": [0, 1], "heads": [0, 1], "bits": [1, 1]}
    fold = {
        "xyz": some(N, 3) - 0.5, "w1": some(N, 2 * P), "m": some(N), "sigma": some(N), "scaling": some(N, 3) - 3,
        "rotation": some(N), "times": some(V), "signs": torch.ones(V, device=device), "pixels_per_unit": 20.0, **size,
    }  # fmt: skip
    means2d, conics, radii, active = ops.fold(**fold)
    blend = {
        "means2d": means2d, "conics": conics, "active": active, "opacities": some(H, N), "colours": some(H, N, C),
        "backgrounds": some(2, C), "screen": some(H, V, N, 2), **renders, **size, "raw": False, "capacity": 0,
    }  # fmt: skip
    names = [
        "images",
        "transmittance",
        "stops",
        "tile_offsets",
        "pair_gaussians",
        "pair_slots",
        "gaussian_offsets",
        "starts",
    ]
    drawn = dict(zip(names, ops.blend(**blend), strict=True))
    backward = {name: blend[name] for name in ("means2d", "conics", "active", "opacities", "colours")}
    project = {
        "means3d": some(N, 3) + torch.tensor([0.0, 0, 3]).to(device), "scales": some(N, 3), "quaternions": some(N, 4),
        "covariances": None, "shs": some(N, 16, 3), "viewmatrix": torch.eye(4).to(device),
        "projmatrix": torch.eye(4).to(device), "campos": some(3), "tanfovx": 0.5, "tanfovy": 0.5, "scale_modifier": 1.0,
        **size, "sh_degree": 3, "antialiasing": False,
    }  # fmt: skip
    names = ["v_means2d", "v_conics", "v_colours", "v_depths", "v_compensations", "radii"]
    projected = dict(zip(names, ops.project(**project), strict=True))
    splat = {name.removeprefix("v_"): value for name, value in projected.items()}
    splat |= {"opacities": some(N, 1), "background": some(3), "screen": some(N, 4), **size, "inverse": True}
    names = [
        "colour", "depth", "transmittance", "touched", "stops", "tile_offsets", "pair_gaussians", "pair_slots",
        "gaussian_offsets", "starts", "order",
    ]  # fmt: skip
    shown = dict(zip(names, ops.splat(**splat, count=True), strict=True))
    del shown["touched"]
    gone = {"background", "screen"}
    shown |= {name: value for name, value in splat.items() if name not in gone} | {"columns": 4}
    shown |= {
        "v_colour": some(3, SIDE, SIDE),
        "v_depth": some(1, SIDE, SIDE),
        "v_transmittance": some(1, SIDE, SIDE),
    }
    adam = {name: [some(N, 2)] for name in ("parameters", "gradients", "first_moments", "second_moments")}
    statistics = {n: some(N, 1) for n in ("xyz_gradient_accum", "m_gradient_accum", "denom", "m_denom")}
    return {
        "fold": (ops.fold, fold),
        "fold_backward": (
            ops.fold_backward,
            {"v_means2d": some(V, N, 2), "v_conics": some(V, N, 3), "radii": radii, **fold},
        ),
        "blend": (ops.blend, blend),
        "blend_backward": (
            ops.blend_backward,
            {"v_images": some(2, C, SIDE, SIDE), "v_transmittance": some(2, SIDE, SIDE), **drawn, **backward}
            | {**renders, **size, "raw": False},
        ),
        "project": (ops.project, project),
        "project_backward": (ops.project_backward, projected | project),
        "splat": (ops.splat, splat | {"count": True}),
        "splat_backward": (ops.splat_backward, shown),
        "similarity": (
            ops.similarity,
            {"images": some(1, 1, 9, 9), "targets": some(1, 1, 9, 9), "with_gradient": True},
        ),
        "sigma_outside": (ops.sigma_outside, {"raw": some(N), "low": 0.1, "high": 0.9}),
        "adam_step": (
            ops.adam_step,
            adam | {"steps": [torch.zeros(())], "rates": [0.1], "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8},
        ),
        "observe": (
            ops.observe,
            {"radii": radii, "active": active, "screen_gradients": some(V, N, 2), "m_gradients": some(N, 1), "bit": 1,
             "half_width": 12.0, "half_height": 12.0, "max_radii": some(N), **statistics},
        ),
        "self_test": (ops.self_test, {"number": 1}),
    }  # fmt: skip


def changes(name: str, arguments: dict[str, Any], device: str) -> list[tuple[str, dict[str, Any]]]:
    """Invalid arguments: a description, and the arguments that it changes."""
    out: list[tuple[str, dict[str, Any]]] = []
    for key, value in arguments.items():
        tensors = isinstance(value, list) and value and isinstance(value[0], Tensor)
        tensor = value[0] if tensors else value
        if not isinstance(tensor, Tensor):
            continue
        # Another shape, another type, another device; tensors of a single number may have any shape.
        other = [
            ("longer", torch.cat([tensor, tensor[:1]])) if tensor.ndim else ("empty", tensor.new_zeros(0))
        ]
        other.append(("deeper", tensor[None]) if tensor.ndim else ("wider", tensor.new_zeros(2)))
        other.append(("of halves", tensor.half()))
        if device == "cuda" and (name, key) not in {("adam_step", "steps"), ("sigma_outside", "raw")}:
            other.append(("on another device", tensor.cpu()))
        for how, changed in other:
            if (
                changed.shape == tensor.shape
                and changed.dtype == tensor.dtype
                and changed.device == tensor.device
            ):
                continue  # nothing is as long as twice nothing
            if (name, key) in FREE and how in ("longer", "deeper"):
                continue
            out.append((f"{key} {how}", {key: [changed] if tensors else changed}))
    for key, value in (
        ("width", 0),
        ("height", 40000),
        ("sh_degree", 4),
        ("capacity", -1),
        ("capacity", 2**31),
    ):
        if key in arguments:
            out.append((f"{key} = {value}", {key: value}))
    for key, value in (
        ("views", [0, V]),
        ("heads", [-1, 0]),
        ("bits", [0, 1]),
        ("bits", [1, 256]),
        ("heads", [0]),
    ):
        if key in arguments:
            out.append((f"{key} = {value}", {key: value}))
    if name == "project":
        out += [("scales without quaternions", {"quaternions": None}), ("no covariance", {"scales": None})]
    if name == "fold":
        out.append(("a degree of 33", {"w1": torch.zeros(N, 66, device=device)}))
    if name == "splat_backward":
        out += [("columns = 1", {"columns": 1}), ("columns = 5", {"columns": 5})]
    if (
        name in ("blend_backward", "splat_backward") and device == "cpu"
    ):  # on CUDA, reading the lists would wait for the device
        for key in ("pair_gaussians", "pair_slots", "tile_offsets", "gaussian_offsets"):
            out.append((f"{key} out of range", {key: arguments[key] + 1000}))
    if name == "adam_step":
        out += [("a rate less", {"rates": []}), ("moments not contiguous", {"first_moments": [
            torch.zeros(2, N, device=device).T]})]  # fmt: skip
    if name == "self_test":
        out.append(("number = -1", {"number": -1}))
    return out


# Arguments whose size is free: it determines that of the others, or is taken as it is.
FREE = {("adam_step", "parameters"), ("similarity", "images"), ("sigma_outside", "raw")}
FREE |= {
    ("project", "shs"),
    ("project_backward", "shs"),
    ("splat", "opacities"),
    ("splat_backward", "opacities"),
}


def refuse(device: str) -> None:
    """Tries them all and prints a line for each; the process ends with status 1 if one was not refused."""
    failed = 0
    for name, (operator, arguments) in operators(device).items():
        operator(**arguments)  # valid arguments pass
        for what, changed in changes(name, arguments, device):
            try:
                operator(**{**arguments, **changed})
            except (ValueError, TypeError, NotImplementedError) as error:
                said = str(error).splitlines()[0]
                print(
                    json.dumps({"operator": name, "what": what, "error": type(error).__name__, "said": said})
                )
            except RuntimeError as error:
                said = str(error).splitlines()[0]
                print(json.dumps({"operator": name, "what": what, "error": "RuntimeError", "said": said}))
            else:
                failed += 1
                print(json.dumps({"operator": name, "what": what, "error": None, "said": "it was taken"}))
            sys.stdout.flush()
    if device == "cuda":
        torch.cuda.synchronize()
    sys.exit(1 if failed else 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        refuse(given.device)
    command = [sys.executable, __file__, "--here", "--device", given.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["operator"]] = counts.get(row["operator"], 0) + 1
        if row["error"] is None:
            print(f"NOT REFUSED: {row['operator']}: {row['what']}")
    refused = sum(row["error"] is not None for row in rows)
    if done.returncode not in (0, 1) or not rows:
        print(f"the process ended with {done.returncode} after {rows[-1:]}: {done.stderr[-2000:]}")
    result = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "refused": refused,
        "tried": len(rows),
        "by_operator": counts,
        "ended": done.returncode,
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if done.returncode == 0 and rows else 1


if __name__ == "__main__":
    sys.exit(main())
