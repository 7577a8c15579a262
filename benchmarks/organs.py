#!/usr/bin/env python3
"""Several organs at once: one joint model of a label map, against one model per label and methods without a model.

    python -m benchmarks.organs CASE [CASE ...] --preset quick --out benchmarks/results/organs/cpu.json

CASE holds volume.nii.gz and label.nii.gz. Of a CT, the second and third label are bone (above 200 HU) and air (below
-300 HU inside the body); of a skull-stripped MRI whose label is white matter, they are grey matter and cerebrospinal
fluid, told apart by Otsu's threshold. prepare.py keeps every N-th slice; Dice is that of the others, surfaces are
compared between the first and the last kept slice. Rows already in the file are not measured again, so that it can be
filled step by step; with nothing left to do, the same command prints its tables.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from scipy.ndimage import binary_fill_holes
from scipy.ndimage import label as connected
from skimage.filters import threshold_otsu

from arguments import TrainOptions, resolve_device
from benchmarks.common import describe, run_program, table
from benchmarks.heldout import carried, tvl1_flows
from benchmarks.meshes import between
from in_between.classical import signed_distances
from in_between.exclusive import masks_of, ranked
from in_between.prediction import InBetween, pixel_gap
from patient.label_channels import index_of
from patient.labels import Label, LabelTable
from patient.meshes import in_space, read_mesh, surface
from patient.stacks import read_stack
from patient.surfaces import surface_scores
from training.data import Data, read_data
from utils.errors import ArgumentParser, positive, run
from utils.files import atomic_write
from utils.images import write_levels
from utils.metrics import LabelScores

LABELS = {
    "CT": LabelTable(
        (
            Label(1, "liver", (221, 130, 101)),
            Label(2, "bone", (241, 214, 145)),
            Label(3, "air", (111, 184, 210)),
        )
    ),
    "MRI T1": LabelTable(
        (
            Label(1, "white matter", (250, 250, 225)),
            Label(2, "grey matter", (200, 150, 130)),
            Label(3, "CSF", (85, 188, 255)),
        )
    ),
}
BONE, AIR = 200.0, -300.0  # HU
Row = dict[str, Any]


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OrganCase:
    """A case with three labels, as prepare.py writes it into ``folder``."""

    source: Path
    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self.source / "case.json").read_text(encoding="utf-8"))
        return told

    @property
    def name(self) -> str:
        return self.source.resolve().name

    @property
    def labels(self) -> LabelTable:
        return LABELS[self.about["modality"]]

    def make(self, keeps: Sequence[int]) -> None:
        """Writes the label map, and the frames of prepare.py: all of them, and every N-th, with all labels and with
        each as a mask of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        labels, names = self.folder / "labels.nii.gz", self.folder / "names.json"
        image = nibabel.load(self.source / "volume.nii.gz")
        first = np.asarray(nibabel.load(self.source / "label.nii.gz").dataobj) > 0
        numbers = label_map(np.asarray(image.dataobj, np.float32), first, self.about["modality"])
        nibabel.save(nibabel.Nifti1Image(numbers, image.affine), labels)
        names.write_text(json.dumps(self.labels.to_json()), encoding="utf-8")
        common = [
            "-i",
            str(self.source / "volume.nii.gz"),
            "-l",
            str(labels),
            "--bits",
            "8",
            "--quiet",
            "--window",
        ]
        common += [str(level) for level in self.about["window"]]
        kept_apart = ["--labels", "all", "--label_names", str(names)]
        run_program("prepare.py", *common, *kept_apart, "-o", str(self.folder / "full"))
        for keep in keeps:
            every = ["--keep_every", str(keep), "-o"]
            run_program("prepare.py", *common, *kept_apart, *every, str(self.data(keep)))
            for number in self.labels.ids:
                run_program(
                    "prepare.py", *common, "--label_value", str(number), *every, str(self.data(keep, number))
                )

    def data(self, keep: int, number: int | None = None) -> Path:
        """The folder of prepare.py: of all labels, or of one as a mask."""
        return self.folder / f"keep{keep}" / ("joint" if number is None else str(number))

    def read(self, keep: int) -> Data:
        root = self.data(keep)
        options = TrainOptions(
            source_path=str(root / "img"), seg_source_path=str(root / "seg"), pipeline="joint", device="cpu"
        )
        return read_data(options, torch.device("cpu"), lambda _: None)

    @cached_property
    def full(self) -> Any:
        """The stack of all slices' labels."""
        return read_stack(self.folder / "full" / "seg" / "original", kind="labels")


def label_map(values: np.ndarray, first: np.ndarray, modality: str) -> np.ndarray:
    """(I, J, K) uint8: label 1 where ``first`` is, 2 and 3 by threshold, slices along K."""
    numbers = np.zeros(values.shape, np.uint8)
    if modality == "CT":
        inside = np.zeros(values.shape, bool)
        for k in range(values.shape[2]):
            parts, count = connected(values[:, :, k] > AIR)
            sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
            inside[:, :, k] = binary_fill_holes(parts == 1 + int(sizes.argmax()))
        numbers[inside & (values < AIR)] = 3
        numbers[inside & (values > BONE)] = 2
    else:
        brain = values > 0
        rest = brain & ~first
        level = threshold_otsu(values[rest])
        numbers[rest] = np.where(values[rest] >= level, 2, 3)
    numbers[first] = 1
    return numbers


# ---- what is measured ------------------------------------------------------------------------------------------------


def without_a_model(
    case: OrganCase, keep: int, data: Data, device: torch.device
) -> dict[str, Callable[[], np.ndarray]]:
    """Method -> the label maps of the held-out slices, indices (M, H, W)."""
    assert data.masks is not None and data.masks.labels is not None
    test = data.heldout[1]
    assert test is not None
    index, count = data.masks.index()[:, 0].numpy(), len(data.masks.labels)
    places, at = test.kept_positions, test.positions
    step = float(np.diff(places).min()) / keep
    kept, wanted = np.rint(places / step).astype(int), np.rint(at / step).astype(int)
    background = torch.zeros(1)

    def along_flow() -> np.ndarray:
        frames = data.frames(range(len(data.frames)))[:, 0].numpy()
        flows = tvl1_flows(frames, kept, wanted)
        fields = (
            (
                n,
                torch.from_numpy(
                    carried(
                        signed_distances(mask, test.spacing, keep * step, background=n == 0),
                        flows,
                        kept,
                        wanted,
                        1,
                    )
                ),
            )
            for n, mask in masks_of(index, count)
        )
        return ranked(fields, count).first.numpy()

    def along_motion() -> np.ndarray:
        images = data.frames(range(len(data.frames))).to(device)
        gap = pixel_gap(data.geometry, images.shape[-1])
        made = InBetween(images, gap=gap, labels=(torch.from_numpy(index)[:, None].to(device), count))
        position = torch.tensor(test.indices, dtype=torch.float64, device=device)
        k = position.long().clamp_max(len(images) - 2)
        return torch.cat([
            index_of(made.masks(some, (at - some).float()))
            for some, at in zip(k.split(16), position.split(16), strict=True)
        ]).cpu().numpy()  # fmt: skip

    return {
        "signed distances": lambda: test.classical("sdf", background)[:, 0],
        "along TV-L1 flow": along_flow,
        "along the motion": along_motion,
    }


def measure_classical(
    case: OrganCase, keep: int, data: Data, name: str, find: Callable[[], np.ndarray]
) -> Row:
    assert data.masks is not None and data.masks.labels is not None and data.heldout[1] is not None
    start = time.process_time()
    found = find()
    spent = time.process_time() - start
    labels, test = data.masks.labels, data.heldout[1]
    truth = test.frames.index()[:, 0]
    scores = LabelScores.of_labels(torch.from_numpy(found), truth, len(labels))
    row: Row = {"case": case.name, "keep": keep, "method": name, "processor_seconds": round(spent, 1)}
    row["dice"] = dict(zip(map(str, labels.ids), scores.label_dice, strict=True))
    if name != "along TV-L1 flow":  # frame after frame, kept and filled in
        index = data.masks.index()[:, 0].numpy()
        places = np.concatenate([test.kept_positions, test.positions]).argsort(kind="stable")
        every = np.concatenate([index, found.astype(index.dtype)])[places]
        ids = np.array((0, *labels.ids), np.uint8)[every]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "filled")
            for number, frame in enumerate(ids):
                write_levels(folder / "render_mask" / f"{number // keep:05d}_{number % keep}.png", frame)
            (folder / "frames.json").write_bytes((case.data(keep) / "frames.json").read_bytes())
            row["surfaces"] = surfaces(case, folder, len(ids) - 1, labels)
    return row


def surfaces(case: OrganCase, folder: Path, last: int, labels: LabelTable, one: Label | None = None) -> Row:
    """ASD and HD95 in mm of each label's mesh (of ``one`` model's mask) from the renders in ``folder``. last: the last
    kept slice."""
    with tempfile.TemporaryDirectory() as temporary:
        run_program(
            "slices_to_ply.py", "-i", str(folder), "-o", temporary, "--open", "--quiet", "--jobs", "1"
        )
        out = {}
        stack = case.full
        for label in labels if one is None else [one]:
            name = folder.name if one else f"{folder.name}_{labels.file_names()[label.id]}"
            inside = (stack.numbers == label.id).astype(np.float32)
            truth = between(surface(inside, 0.5, stack.affine, closed=False), stack.affine, last)
            mesh = between(in_space(read_mesh(Path(temporary, f"{name}.ply")), "RAS"), stack.affine, last)
            found = surface_scores(mesh, truth)
            out[str(label.id)] = {"asd": found.asd, "hd95": found.hd95}
        return out


def measure_model(
    case: OrganCase, keep: int, number: int | None, given: argparse.Namespace, extra: list[str]
) -> Row:
    """One training, of all labels or of one, with its scores on the held-out slices, its time and its surfaces."""
    data, label = case.data(keep, number), None if number is None else case.labels[number]
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "model")
        words = ["-s", str(data / "img"), "--seg_source_path", str(data / "seg"), "--pipeline", "joint"]
        words += ["--preset", given.preset, "--device", given.device, "--quiet", "-m", str(model), *extra]
        wall = run_program("train.py", *words)
        rows = json.loads((model / "evaluation.json").read_text(encoding="utf-8"))
        held = {r["task"]: r for r in rows if (r["frames"], r["method"]) == ("heldout", "model")}
        spent = json.loads((model / "time.json").read_text(encoding="utf-8"))
        words = [
            "-m",
            str(model),
            "--pipeline",
            "seg",
            "--interp",
            str(keep),
            "--device",
            given.device,
            "--quiet",
        ]
        run_program("render.py", *words)
        last = keep * (len(list((data / "img" / "original").iterdir())) - 1)
        return {
            "case": case.name,
            "keep": keep,
            "method": method_name(given.preset, case.labels, number),
            "dice": held["seg"]["labels"] if number is None else {str(number): held["seg"]["dice"]},
            "psnr": held["img"]["psnr"],
            "processor_seconds": round(spent["time"], 1),
            "seconds": round(spent["elapsed"], 1),
            "process_seconds": round(wall, 1),
            "parts": spent["parts"],
            "device": given.device,
            "surfaces": surfaces(case, model, last, case.labels, label),
        }


def method_name(preset: str, labels: LabelTable, number: int | None) -> str:
    return f"{preset}, all labels" if number is None else f"{preset}, {labels[number].name} alone"


# ---- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    words = sys.argv[1:]
    own, extra = (
        (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    )
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", type=Path, nargs="+", metavar="CASE")
    parser.add_argument("--keep", type=positive, nargs="+", default=[2, 4], metavar="N")
    parser.add_argument("--preset", default="quick", help="of the models (default: quick); none: no models")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    parser.add_argument("--jobs", type=positive, default=1, help="models trained side by side (default: 1)")
    parser.add_argument("--classical", action="store_true", help="only the methods without a model")
    parser.add_argument(
        "--out", type=Path, default=Path("output/benchmark/organs.json"), help="JSON file of the rows"
    )
    given = parser.parse_args(own)
    given.device = str(resolve_device(given.device))
    told = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    rows: list[Row] = told.get("rows", [])
    there = {(row["case"], row["keep"], row["method"]) for row in rows}
    about = describe(torch.device(given.device))
    command = " ".join(["python -m benchmarks.organs", *sys.argv[1:]])
    lock = threading.Lock()

    def keep_row(row: Row) -> None:
        with lock:
            rows.append(row)
            text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
            with atomic_write(given.out) as unfinished:
                unfinished.write_text(
                    f'{{"command": {json.dumps(command)},\n "about": {json.dumps(about)},\n "rows": [\n{text}\n]}}\n',
                    encoding="utf-8",
                )
        mean = np.mean(list(row["dice"].values()))
        print(f"{row['case']}  1/{row['keep']}  {row['method']}  Dice {mean:.4f}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        cases = [OrganCase(source, Path(temporary, source.resolve().name)) for source in given.cases]
        todo: list[Callable[[], Row]] = []
        for case in cases:
            models = [None, *case.labels.ids] if given.preset != "none" and not given.classical else []
            wanted = [
                (keep, number)
                for keep in given.keep
                for number in models
                if (case.name, keep, method_name(given.preset, case.labels, number)) not in there
            ]
            plain = {"signed distances", "along TV-L1 flow", "along the motion"}
            lacking = [
                keep for keep in given.keep if any((case.name, keep, name) not in there for name in plain)
            ]
            if not wanted and not lacking:
                continue
            case.make(given.keep)
            for keep in lacking:
                data = case.read(keep)
                for name, find in without_a_model(case, keep, data, torch.device(given.device)).items():
                    if (case.name, keep, name) not in there:
                        keep_row(measure_classical(case, keep, data, name, find))
            for keep, number in wanted:
                todo.append(lambda c=case, k=keep, n=number: measure_model(c, k, n, given, extra))  # type: ignore[misc]
        with ThreadPoolExecutor(given.jobs) as pool:
            for done in [pool.submit(lambda of=of: keep_row(of())) for of in todo]:
                done.result()
    print("\n\n".join(tables(rows)))


def tables(rows: Sequence[Row]) -> list[str]:
    """Dice of each label and surfaces in mm, a row per case and method; then the joint models beside those of one
    label."""
    return [text for text in (_scores(rows), _costs(rows)) if text]


def _grouped(rows: Sequence[Row]) -> Iterator[tuple[str, int, str, list[Row]]]:
    """Case, keep, method and its rows: models of one label count as one method."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        preset, _, what = row["method"].partition(", ")
        method = f"{preset}, a model per label" if what.endswith(" alone") else row["method"]
        groups.setdefault((row["case"], row["keep"], method), []).append(row)
    for (case, keep, method), members in groups.items():
        yield case, keep, method, members


def _scores(rows: Sequence[Row]) -> str:
    cells = []
    for case, keep, method, members in sorted(_grouped(rows), key=lambda group: group[:2]):
        dice = {k: v for row in members for k, v in row["dice"].items()}
        mm = {k: v for row in members for k, v in row.get("surfaces", {}).items()}
        if len(dice) < 3:
            continue
        ids = sorted(dice)
        cells.append(
            [case, f"1/{keep}", method]
            + [f"{dice[i]:.4f}" for i in ids]
            + [f"{np.mean(list(dice.values())):.4f}"]
            + [" ".join(f"{mm[i]['asd']:.2f}" for i in ids) if len(mm) == len(ids) else "-"]
            + [" ".join(f"{mm[i]['hd95']:.2f}" for i in ids) if len(mm) == len(ids) else "-"]
        )
    headers = ["case", "kept", "method", "label 1", "label 2", "label 3", "mean Dice", "ASD, mm", "HD95, mm"]
    return table(headers, cells) if cells else ""


def _costs(rows: Sequence[Row]) -> str:
    cells = []
    groups = {(case, keep, method): members for case, keep, method, members in _grouped(rows)}
    for (case, keep, method), (joint, *_) in groups.items():
        preset, _, what = method.partition(", ")
        alone = groups.get((case, keep, f"{preset}, a model per label"), [])
        if what != "all labels" or len(alone) < 3:
            continue
        each = {k: v for row in alone for k, v in row["dice"].items()}
        worst = min(joint["dice"][i] - each[i] for i in each)
        mean = float(np.mean(list(joint["dice"].values())) - np.mean(list(each.values())))
        kind = "seconds" if joint["device"] != "cpu" else "processor_seconds"
        ratio = joint[kind] / sum(row[kind] for row in alone)
        cells.append(
            [case, f"1/{keep}", preset, f"{mean:+.4f}", f"{worst:+.4f}", joint[kind], f"{ratio:.2f}"]
        )
    headers = ["case", "kept", "preset", "mean Dice, joint minus alone", "least of a label", "seconds, joint"]
    return table([*headers, "over those of all models"], cells) if cells else ""


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    run(main)
