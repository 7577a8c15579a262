#!/usr/bin/env python3
"""Held-out frames filled in without a model: the in-between prediction beside the usual interpolations.

    python -m benchmarks.interpolators CASE [CASE ...] --keep 2 4

CASE/img/original and CASE/seg/original (either may be missing) hold the frames and masks 0000.png, ...; every N-th is
given, the others are scored. PSNR and SSIM of images, Dice of the masks' volume. TV-L1 is scikit-image's optical
flow: both neighbours warped to the time asked for and blended; it takes minutes, and --no_tvl1 leaves it out.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arguments import resolve_device
from benchmarks.common import describe, table
from benchmarks.heldout import neighbours, read, scores_of, tvl1
from in_between.classical import interpolate, interpolate_masks
from in_between.contours import distances_of
from in_between.flow import blend_along, flow_at
from in_between.prediction import InBetween
from scene.frames import frame_files
from utils.errors import ArgumentParser, UserError, run
from utils.files import atomic_write

Row = dict[str, Any]


def looked_up(look_up, k: torch.Tensor, alpha: torch.Tensor) -> np.ndarray:
    """(T, H, W) in [0, 1], a few at a time."""
    parts = [look_up(a, b) for a, b in zip(k.split(16), alpha.split(16), strict=True)]
    return torch.cat(parts).mean(1).cpu().numpy().astype(np.float64)


def score_case(case: Path, keep: int, device: torch.device, with_tvl1: bool) -> list[Row]:
    """One row per method: its scores, and the cost of the prediction in wall seconds and in processor seconds (the ones
    to compare on a shared machine)."""
    truth = {
        kind: read(frame_files(case / kind / "original"))
        for kind in ("img", "seg")
        if (case / kind / "original").is_dir()
    }
    if not truth:
        raise UserError(f"{case}: neither img/original nor seg/original is there; give the folder of a case")
    count = len(next(iter(truth.values())))
    if count <= keep:
        raise UserError(f"{case}: {count} frames are too few for --keep {keep}; give a smaller one")
    kept = np.arange(0, count, keep)
    at = np.setdiff1d(np.arange(kept[-1]), kept)
    given = {kind: torch.from_numpy(f[kept]).float()[:, None].to(device) for kind, f in truth.items()}
    start, processors = time.perf_counter(), time.process_time()
    between = InBetween(given.get("img", given.get("seg")), given.get("seg"))
    index, fraction = neighbours(kept, at)
    k, alpha = torch.from_numpy(index).to(device), torch.from_numpy(fraction).float().to(device)
    ours = {"img": looked_up(between.images, k, alpha)}
    if "seg" in given:
        ours["seg"] = looked_up(between.masks, k, alpha)
    seconds, processors = time.perf_counter() - start, time.process_time() - processors

    rows: list[Row] = []
    head = {"case": case.name, "keep": keep}
    if "img" in truth:
        frames = truth["img"]
        found = {name: interpolate(frames[kept], kept, at, name) for name in ("linear", "cubic")}
        if with_tvl1:
            found["TV-L1"] = tvl1(frames[kept], kept, at)
        found["ours"] = ours["img"]
        for name, images in found.items():
            rows.append(head | {"method": name, "img": scores_of("img", images, frames[at])})
    if "seg" in truth:
        masks = truth["seg"] >= 0.5
        distances = distances_of(given["seg"], between.gap)
        carried = [
            blend_along(distances[i], distances[i + 1], flow_at(between.flow[i], a), a, "bilinear")
            for i, a in zip(k.split(16), alpha.split(16), strict=True)
        ]
        found = {
            "SDF": interpolate_masks(masks[kept], kept * between.gap / keep, at * between.gap / keep),
            "SDF along our flow": (torch.cat(carried)[:, 0] > 0).cpu().numpy(),
            "ours": ours["seg"],
        }
        for name, predicted in found.items():
            rows.append(head | {"method": name, "seg": scores_of("seg", predicted, truth["seg"][at])})
    for row in rows:
        if row["method"] == "ours":
            row |= {"seconds": round(seconds, 1), "processor_seconds": round(processors, 1)}
    return rows


def cells(row: Row) -> list[str]:
    """Case, keep, method, scores of images, of masks, seconds."""
    images, masks = row.get("img"), row.get("seg")
    return [
        row["case"],
        str(row["keep"]),
        row["method"],
        f"{images['psnr']:.2f} / {images['ssim']:.4f}" if images else "",
        f"{masks['dice']:.4f}" if masks else "",
        f"{row['processor_seconds']:.0f}" if "processor_seconds" in row else "",
    ]


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "cases", type=Path, nargs="+", metavar="CASE", help="folders with img/original or seg/original"
    )
    parser.add_argument(
        "--keep", type=int, nargs="+", default=[2, 4], metavar="N", help="give every N-th (default: 2 4)"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    parser.add_argument("--no_tvl1", action="store_true", help="leave out the slow optical flow")
    parser.add_argument("--out", type=Path, help="JSON file for the rows, with the command and the machine")
    given = parser.parse_args()
    if min(given.keep) < 2:
        raise UserError(f"--keep {min(given.keep)}: nothing is left out; give 2 or more")
    device = resolve_device(given.device)
    rows: list[Row] = []
    for case in given.cases:
        for keep in given.keep:
            before = len(rows)
            rows += score_case(case, keep, device, not given.no_tvl1)
            for row in rows[before:]:
                print(*filter(None, cells(row)), sep="  ", flush=True)  # a run takes minutes
    about = describe(device)
    print(f"{about['machine']}, {about['device']}, torch {about['torch']}, {torch.get_num_threads()} threads")
    headers = ["case", "keep 1/N", "method", "PSNR / SSIM", "Dice", "s of processors"]
    print(table(headers, [cells(row) for row in rows]))
    if given.out is not None:
        command = " ".join(["python -m benchmarks.interpolators", *sys.argv[1:]])
        text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        with atomic_write(given.out) as unfinished:
            unfinished.write_text(
                f'{{"command": {json.dumps(command)},\n "about": {json.dumps(about)},\n "rows": [\n{text}\n]}}\n',
                encoding="utf-8",
            )


if __name__ == "__main__":
    run(main)
