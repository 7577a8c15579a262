#!/usr/bin/env python3
"""Trains on a case, renders it, and scores frames that were trained on and frames that were left out.

    python benchmarks/quality.py CASE --keep 2 --out benchmarks/results/quality.jsonl -- --poly_degree 7

CASE/img/original and CASE/seg/original hold the frames and masks 0000.png, ...; what follows -- goes to train.py. Every
N-th frame is trained on. The scores stand beside those of the usual interpolations between the same frames, and one
line of JSON is added to the file of results.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, describe, shown_score, table

from arguments import resolve_device
from scene.checkpoint import load_checkpoint, newest
from scene.frames import frame_files
from utils.errors import ArgumentParser, UserError, run
from utils.images import read_image, to_grey
from utils.interpolation import interpolate, interpolate_masks
from utils.metrics import Scores

KINDS = {"img": ("img",), "seg": ("seg",), "joint": ("img", "seg")}  # of frames, that a pipeline trains on
RENDERS = {"img": "render_img", "seg": "render_mask"}  # folders that render.py writes


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores_of(kind: str, images: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Of (T, H, W) in [0, 1] each: PSNR and SSIM of images, rounded to 8 bits as files are; Dice and PSNR of masks."""
    images = images.astype(np.float64).clip(0, 1)
    images = np.rint(255 * images) / 255 if kind == "img" else images
    found = Scores.of(*(torch.from_numpy(frames)[:, None] for frames in (images, truth)))
    return (
        {"psnr": found.mean_psnr, "ssim": found.mean_ssim}
        if kind == "img"
        else {"dice": found.dice, "psnr": found.mean_psnr}
    )


def score(
    kind: str, truth: np.ndarray, renders: np.ndarray, keep: int, spacing: Sequence[float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of each method on the "training" and the "held_out" frames.

    truth: (F, H, W), all frames in [0, 1]. renders: (F', H, W), frames 0 to F' - 1 as the model shows them: up to the
    last one that was trained on, beyond which there is nothing between.
    """
    kept = np.arange(0, len(truth), keep)
    held_out = np.setdiff1d(np.arange(kept[-1]), kept)
    out = {"training": {"model": scores_of(kind, renders[kept], truth[kept])}}
    if len(held_out):
        rows = {name: interpolate(truth[kept], kept, held_out, name) for name in ("linear", "cubic")}
        if kind == "seg":
            between = interpolate_masks(
                truth[kept] >= 0.5, kept * spacing[0], held_out * spacing[0], tuple(spacing[1:])
            )
            rows["SDF"] = between
        rows["model"] = renders[held_out]
        out["held_out"] = {name: scores_of(kind, images, truth[held_out]) for name, images in rows.items()}
    return out


# ---- a run -----------------------------------------------------------------------------------------------------------


def read(files: Sequence[Path]) -> np.ndarray:
    """(F, H, W) grey in [0, 1], float64."""
    return np.stack([to_grey(read_image(file)) for file in files]).astype(np.float64)


def keep_frames(files: Sequence[Path], keep: int, folder: Path) -> None:
    """Copies every ``keep``-th file to ``folder``, numbered from 0."""
    folder.mkdir(parents=True)
    for k, file in enumerate(files[::keep]):
        shutil.copyfile(file, folder / f"{k:04d}{file.suffix}")


def script(name: str, *arguments: str) -> None:
    """Runs one of the project's programs; where it fails, so do we, with its message above ours."""
    status = subprocess.run([sys.executable, str(ROOT / name), *arguments]).returncode
    if status:
        raise UserError(f"{name} ended with status {status}: what it says above is why")


def train_and_render(
    files: dict[str, list[Path]], pipeline: str, keep: int, device: str, options: Sequence[str], folder: Path
) -> Path:
    """The model's folder, with a render of every frame that lies between the first and the last kept one."""
    for kind, sequence in files.items():
        keep_frames(sequence, keep, folder / kind / "original")
    model, first = folder / "model", next(iter(files))
    sources = ["-s", str(folder / first)]
    if pipeline == "joint":
        sources += ["--seg_source_path", str(folder / "seg")]
    shared = ["-m", str(model), "--device", device, "--quiet"]
    script("train.py", *sources, *shared, "--pipeline", pipeline, *options)
    drawn = "both" if pipeline == "joint" else pipeline
    script("render.py", *shared, "--pipeline", drawn, "--interp", str(keep))
    return model


def main() -> None:
    words = sys.argv[1:]
    ours = words.index("--") if "--" in words else len(words)
    options = words[ours + 1 :]  # train.py's
    parser = ArgumentParser(
        description=(__doc__ or "").splitlines()[0], usage="%(prog)s CASE [options] [-- options of train.py]"
    )
    parser.add_argument(
        "case", type=Path, metavar="CASE", help="folder with img/original and, for masks, seg/original"
    )
    parser.add_argument(
        "--keep", type=int, default=2, metavar="N", help="train on every N-th frame (default: 2)"
    )
    parser.add_argument("--pipeline", choices=KINDS, default="img", help="what to train (default: img)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    parser.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        default=(1.0, 1.0, 1.0),
        metavar=("FRAME", "ROW", "COLUMN"),
        help="distance from one to the next, for the signed distances (default: 1 1 1)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("output/benchmark/quality.jsonl"), help="of the results"
    )
    parser.add_argument(
        "--model", type=Path, help="keep the trained model and its renders in this new folder"
    )
    given = parser.parse_args(words[:ours])
    if given.keep < 1:
        raise UserError(f"--keep {given.keep}: give 1 (train on all frames) or more")
    if given.model and given.model.exists():
        raise UserError(f"--model {given.model} is there already: name a new folder")
    device = resolve_device(given.device)
    files = {kind: frame_files(given.case / kind / "original") for kind in KINDS[given.pipeline]}
    for kind, sequence in files.items():
        if len(sequence) <= given.keep:
            raise UserError(
                f"{given.case / kind}: {len(sequence)} frames are too few for --keep {given.keep}: give a smaller one"
            )

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.model or Path(temporary, "run")
        model = train_and_render(files, given.pipeline, given.keep, str(device), options, folder)
        saved = load_checkpoint(newest(model), "cpu")
        line: dict[str, Any] = {
            "about": describe(device),
            "case": given.case.resolve().name,
            "keep": given.keep,
            "pipeline": given.pipeline,
            "options": options,
            "spacing": list(given.spacing),
            "iterations": saved.iteration,
            "gaussians": len(saved.params["xyz"]),
            "seconds": json.loads((model / "time.json").read_text(encoding="utf-8"))["elapsed"],
            "scores": {},
        }
        for kind, sequence in files.items():
            last = (len(sequence) - 1) // given.keep * given.keep
            names = [f"{a // given.keep:05d}_{a % given.keep}.png" for a in range(last + 1)]
            renders = read([model / RENDERS[kind] / name for name in names])
            line["scores"][kind] = score(kind, read(sequence), renders, given.keep, given.spacing)

    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    for kind, frames in line["scores"].items():
        for which, methods in frames.items():
            columns = list(next(iter(methods.values())))
            rows = [[name, *(shown_score(c, scores) for c in columns)] for name, scores in methods.items()]
            print(
                f"\n{line['case']}, {kind}, {which.replace('_', ' ')} frames (1 of {given.keep} trained on)"
            )
            print(table(["method", *columns], rows))
    print(f"\n{line['gaussians']} Gaussians, {line['seconds']:.0f} s of training; added to {given.out}")


if __name__ == "__main__":
    run(main)
