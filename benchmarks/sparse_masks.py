#!/usr/bin/env python3
"""Masks given on every N-th frame, images on all: the other masks, filled in without training.

    python -m benchmarks.sparse_masks CASE [CASE ...] --painted 3 5 10 --out benchmarks/results/sparse_masks.json

CASE/img/original and CASE/seg/original hold the frames and masks 0000.png, ...; the Dice is that of the volume of
masks not given, between the first and the last given ones. Rivals: signed distances; these carried along TV-L1 flow
between the painted frames themselves (which does not look at the images between them); and, where
itk-morphologicalcontourinterpolation is installed, ITK's interpolation, which 3D Slicer's "fill between slices" runs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arguments import resolve_device
from benchmarks.common import describe, table
from benchmarks.heldout import carried, read_case, scores_of, tvl1_flows
from in_between.classical import interpolate_masks, signed_distances
from in_between.masks import dense_distances
from in_between.rows import matching_gap
from utils.errors import ArgumentParser, UserError, run
from utils.files import atomic_write


def along_flow(frames: np.ndarray, masks: np.ndarray, kept: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Signed distances carried along TV-L1 flow from one painted frame to the next."""
    flows = tvl1_flows(frames[kept].astype(np.float32), kept, at)
    return carried(signed_distances(masks[kept]), flows, kept, at, order=1) > 0


def along_motion(
    frames: np.ndarray, masks: np.ndarray, kept: np.ndarray, at: np.ndarray, device: torch.device
) -> np.ndarray:
    """Ours: carried along the motion from frame to frame."""
    images = torch.from_numpy(frames).float()[:, None].to(device)
    painted = torch.from_numpy(masks[kept]).float()[:, None].to(device)
    found = dense_distances(images, painted, kept.tolist(), matching_gap(images))
    return (found[at, 0] > 0).cpu().numpy()


def by_itk(masks: np.ndarray, kept: np.ndarray, at: np.ndarray) -> np.ndarray:
    """ITK's morphological contour interpolation, of a volume whose other slices are empty."""
    import itk

    volume = np.zeros(masks.shape, np.uint8)
    volume[kept] = masks[kept]
    filled = itk.morphological_contour_interpolator(itk.image_from_array(volume), axis=2)
    return itk.array_from_image(filled)[at] > 0


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", type=Path, nargs="+", metavar="CASE")
    parser.add_argument("--painted", type=int, nargs="+", default=[3, 5, 10], metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    parser.add_argument("--out", type=Path, help="JSON file for the rows, with the command and the machine")
    given = parser.parse_args()
    device = resolve_device(given.device)
    rows: list[dict[str, Any]] = []
    for folder in given.cases:
        case = read_case(folder)
        if set(case.frames) != {"img", "seg"}:
            raise UserError(f"{folder} needs img/original and seg/original, which are not the same")
        frames, masks = case.frames["img"], case.frames["seg"] >= 0.5
        for every in given.painted:
            kept, at = case.split(every)
            step, *pixel = case.spacing

            def by_distances(kept: np.ndarray = kept, at: np.ndarray = at) -> np.ndarray:
                return interpolate_masks(masks[kept], kept * step, at * step, (pixel[0], pixel[1]))  # noqa: B023

            methods: dict[str, Callable[[], np.ndarray]] = {
                "signed distances": by_distances,
                "along TV-L1 flow": lambda k=kept, a=at: along_flow(frames, masks, k, a),  # noqa: B023
                "along the motion": lambda k=kept, a=at: along_motion(frames, masks, k, a, device),  # noqa: B023
            }
            if importlib.util.find_spec("itk"):
                methods["ITK morphological"] = lambda k=kept, a=at: by_itk(masks, k, a)  # noqa: B023
            for name, method in methods.items():
                start = time.process_time()
                dice = scores_of("seg", method(), case.frames["seg"][at])["dice"]
                took = round(time.process_time() - start, 1)
                rows.append({"case": case.name, "painted": every, "method": name, "dice": dice})
                rows[-1]["processor_seconds"] = took
                print(f"{case.name}  every {every}  {name}  {dice:.4f}  {took:.0f} s", flush=True)
    names = list(dict.fromkeys(row["method"] for row in rows))
    places = list(dict.fromkeys((row["case"], row["painted"]) for row in rows))
    found = {(row["case"], row["painted"], row["method"]): f"{row['dice']:.4f}" for row in rows}
    about = describe(device)
    print(f"{about['machine']}, {about['device']}, torch {about['torch']}")
    cells = [[case, f"1/{every}", *(found[case, every, name] for name in names)] for case, every in places]
    print(table(["Dice: case", "painted", *names], cells))
    if given.out is not None:
        command = " ".join(["python -m benchmarks.sparse_masks", *sys.argv[1:]])
        text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        with atomic_write(given.out) as unfinished:
            unfinished.write_text(
                f'{{"command": {json.dumps(command)},\n "about": {json.dumps(about)},\n "rows": [\n{text}\n]}}\n',
                encoding="utf-8",
            )


if __name__ == "__main__":
    run(main)
