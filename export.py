#!/usr/bin/env python3
"""Exports a trained model: a cut at one position as ordinary splats, or the whole model in a tenth of the bytes.

python export.py -m OUTPUT --at 12.5         # splats.ply: SuperSplat and other viewers of splats open it
python export.py -m OUTPUT --compact -o KEPT # KEPT: a folder that render.py, view.py and report.py take as -m
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from arguments import RenderOptions, model_options
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, editing
from patient.geometry import FILE_NAME
from patient.label_channels import colours_of
from scene.checkpoint import find, load_checkpoint, save_compact
from scene.gaussian_model import IMAGE
from scene.splats import write_splats
from scene.trained import Trained
from utils.errors import ArgumentParser, UserError, run
from utils.spherical_harmonics import C0, to_colour

# Gaussians of a frame lie in one plane and are drawn by their index. Other programs sort by depth: so each lies a
# little behind the one before it, and is as much larger and farther out as makes the camera see the same.
_DEPTH = 1e-3  # of the whole stack, over the camera's distance
_QUARTER_TURN = (
    0.5**0.5,
    0.5**0.5,
    0.0,
    0.0,
)  # about x: takes the third axis, which is flat, to the plane's normal


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)

    def say(message: str) -> None:
        if not options.quiet:
            print(message, flush=True)

    if (options.at is None) == (not options.compact):
        raise UserError("give either --at POSITION, for splats, or --compact, for the whole model")
    names = ("model_path", "iteration", "source_path", "device", "quiet")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.compact:
        _compact(options, say)
    else:
        _splats(options, model_options(given), say)
    return 0


def parser() -> argparse.ArgumentParser:
    line = ArgumentParser(prog="export.py", description=(__doc__ or "").split("\n")[0])
    line.add_argument("-m", "--model_path", required=True, help="the trained model's folder")
    line.add_argument(
        "-o", "--output", help="--at: the file (default: splats.ply in that folder); --compact: the folder"
    )
    line.add_argument("--iteration", type=int, default=-1, help="of the checkpoint (default -1: the newest)")
    line.add_argument(
        "--at", type=float, metavar="POSITION", help="frame index plus fraction of the cut: 12.5"
    )
    line.add_argument(
        "--head",
        choices=("img", "seg"),
        default="img",
        help="whose opacities and colours splats have (default: img)",
    )
    line.add_argument(
        "--compact",
        action="store_true",
        help="the whole model without what training would go on with, its values on fewer levels",
    )
    line.add_argument(
        "-s", "--source_path", help="data root of the frames; only published checkpoints need it"
    )
    line.add_argument("--device", default="cpu", help="auto, cuda, cuda:N or cpu (default: cpu)")
    line.add_argument("--quiet", action="store_true", help="print errors only")
    line.add_argument("--debug", action="store_true", help="print the traceback of an error too")
    return line


@torch.no_grad()
def _splats(options: argparse.Namespace, given: RenderOptions, say: Callable[[str], object]) -> None:
    trained = Trained.load(given, say)
    model, camera = trained.model, trained.camera
    last = model.num_frames - 1
    if not 0 <= options.at <= last:
        raise UserError(f"--at {options.at:g}: positions of this model go from 0 to {last}")
    if options.head == "seg" and len(model.heads) == 1:
        raise UserError(f"--head seg: {trained.path} has no segmentation head; leave it out")
    head = IMAGE if options.head == "img" else model.heads[-1]
    cut = editing.cut(model, options.at)
    active = cut.active(ACTIVE if options.head == "img" else ACTIVE_SEGMENTATION)
    colours = to_colour(model.raw_colours([head], camera)[0])[active]
    if model.labels is not None and head == model.label_head:  # shares of labels, in the labels' colours
        colours = colours_of(colours.T[:, :, None], model.labels)[:, :, 0].T

    count = int(active.sum())
    depths = torch.linspace(0, _DEPTH * camera.distance, max(count, 1), dtype=torch.float64)[:count, None]
    larger = 1 + depths / camera.distance
    means = cut.means[active].double() * larger
    means[:, 1] = depths[:, 0]
    scales = cut.scales[active].double()[:, [0, 2, 1]] * larger
    w, _, y, _ = cut.quaternions[active].double().unbind(1)
    a, b, _, _ = _QUARTER_TURN
    quaternions = torch.stack([w * a, w * b, y * a, -y * b], 1)  # the turn about y after the quarter turn
    path = Path(options.output or Path(options.model_path) / "splats.ply")
    comments = [
        f"position {options.at:g} of {model.num_frames} frames; camera at y = {-camera.distance:g}, z up"
    ]
    write_splats(
        path,
        means,
        scales,
        quaternions,
        model.opacities([head]).flatten()[active],
        (colours - 0.5) / C0,
        comments,
    )
    say(f"{count:,} of {len(model):,} Gaussians in {path}: SuperSplat and other viewers of splats open it")


def _compact(options: argparse.Namespace, say: Callable[[str], object]) -> None:
    if options.output is None:
        raise UserError("--compact writes a folder that stands for the model: give -o FOLDER")
    source, folder = Path(options.model_path), Path(options.output)
    if folder.resolve() == source.resolve():
        raise UserError(f"-o {folder} is the model's own folder: give another")
    path = find(source, options.iteration)
    checkpoint = load_checkpoint(path)
    if "width" not in checkpoint.extras:
        raise UserError(
            f"{path} is of another program, and does not hold the frames' size: it cannot be kept alone"
        )
    kept = folder / path.name
    save_compact(kept, checkpoint)
    for name in (FILE_NAME, "cfg_args", "evaluation.json", "time.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    before, after = path.stat().st_size, kept.stat().st_size
    say(f"{kept}: {after / 1e6:.2f} MB instead of {before / 1e6:.2f} ({before / after:.1f} times smaller)")
    say(f"  render.py, view.py and report.py take it as -m {folder}; training cannot go on from it")


if __name__ == "__main__":
    run(main)
