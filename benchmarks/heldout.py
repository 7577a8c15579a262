"""Cases with frames left out, methods that fill them in without a model, and their scores."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from skimage.registration import optical_flow_tvl1
from skimage.transform import warp

from in_between.classical import interpolate, interpolate_masks, signed_distances
from in_between.prediction import InBetween
from patient.geometry import voxel_sizes
from patient.readers.nifti import nifti_grid
from patient.stacks import case_geometry
from scene.frames import frame_files
from utils.errors import UserError
from utils.images import read_image, to_grey
from utils.lpips import lpips_distance
from utils.metrics import Scores

KINDS = {"img": ("img",), "seg": ("seg",), "joint": ("img", "seg")}  # of frames that a pipeline trains on
Flow = tuple[np.ndarray, np.ndarray]  # down and right, (H, W) pixels each
Filled = dict[str, dict[str, np.ndarray]]  # method -> img or seg -> (M, H, W) in [0, 1]
CLASSICAL: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cubic": ("img",),
    "flow": ("img",),
    "sdf": ("seg",),
    "cubic sdf": ("seg",),
    "sdf along flow": ("img", "seg"),
    "prediction": (),
}
"""Methods of `fill`, and what a case needs for them."""


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeldOutCase:
    """A folder with img/original, seg/original or both, with all its F frames.

    files, frames: by kind, img or seg; frames (F, H, W) grey in [0, 1]. spacing: between frames, rows and
    columns, mm, or 1 if unknown.
    """

    name: str
    files: dict[str, list[Path]]
    frames: dict[str, np.ndarray]
    spacing: tuple[float, float, float]

    @property
    def pipeline(self) -> str:
        return "joint" if len(self.files) == 2 else next(iter(self.files))

    def __len__(self) -> int:
        return len(next(iter(self.frames.values())))

    def only(self, pipeline: str) -> HeldOutCase:
        """The kinds of frames that ``pipeline`` trains on. Raises UserError if the case lacks them."""
        if missing := set(KINDS[pipeline]) - set(self.files):
            lacking = " and ".join(f"{kind}/original" for kind in sorted(missing))
            raise UserError(
                f"--pipeline {pipeline}: {self.name} has no {lacking}, or its images are the masks"
            )
        files, frames = ({kind: of[kind] for kind in KINDS[pipeline]} for of in (self.files, self.frames))
        return replace(self, files=files, frames=frames)

    def split(self, keep: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the frames kept, every ``keep``-th, and of those left out in between."""
        kept = np.arange(0, len(self), keep)
        return kept, np.setdiff1d(np.arange(kept[-1]), kept)

    def copy_kept(self, keep: int, folder: Path) -> None:
        """Writes ``folder/img/original/0000.png`` ... and ``folder/seg/...``: the kept frames, numbered from 0."""
        for kind, files in self.files.items():
            target = folder / kind / "original"
            target.mkdir(parents=True)
            for k, file in enumerate(files[::keep]):
                shutil.copyfile(file, target / f"{k:04d}{file.suffix}")


def read_case(folder: Path) -> HeldOutCase:
    """The case in ``folder``. Images identical to the masks are left out."""
    files = {
        kind: frame_files(folder / kind / "original")
        for kind in KINDS["joint"]
        if (folder / kind / "original").is_dir()
    }
    if not files:
        raise UserError(f"{folder} has neither img/original nor seg/original: give the folder of a case")
    frames = {kind: read(sequence) for kind, sequence in files.items()}
    if len({values.shape for values in frames.values()}) > 1:
        raise UserError(f"{folder}: the masks differ from the images in number or size of frames")
    if len(frames) == 2 and np.array_equal(frames["img"], frames["seg"]):
        del files["img"], frames["img"]
    shape = next(iter(frames.values())).shape
    return HeldOutCase(folder.resolve().name, files, frames, _spacing(folder, shape))


def _spacing(folder: Path, shape: tuple[int, ...]) -> tuple[float, float, float]:
    geometry = case_geometry(folder)
    if geometry is not None and geometry.spacing is not None:
        column, row, frame = geometry.spacing
        return frame, row, column
    for path in sorted(folder.glob("*.nii*")):
        volume, affine = nifti_grid(path)
        if volume == shape[::-1]:
            column, row, frame = voxel_sizes(affine)
            return frame, row, column
    return 1.0, 1.0, 1.0


def read(files: Sequence[Path]) -> np.ndarray:
    """(F, H, W) grey in [0, 1], float64."""
    return np.stack([to_grey(read_image(file)) for file in files]).astype(np.float64)


# ---- scores ----------------------------------------------------------------------------------------------------------


def in_8_bits(images: np.ndarray) -> np.ndarray:
    """Values in [0, 1] rounded to 8-bit levels, as in a file. Half-way values go to the even level, even where float32
    puts them slightly above or below."""
    return np.rint(np.round(255 * images.astype(np.float64).clip(0, 1), 3)) / 255


def scores_of(kind: str, images: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Scores of two (T, H, W) in [0, 1]: PSNR, SSIM and, if installed, LPIPS of images, rounded to 8 bits as in files;
    Dice and PSNR of masks."""
    images = in_8_bits(images) if kind == "img" else images.astype(np.float64)
    pairs = [torch.from_numpy(np.ascontiguousarray(frames))[:, None] for frames in (images, truth)]
    found = Scores.of(*pairs)
    if kind == "seg":
        return {"dice": found.dice, "psnr": found.mean_psnr}
    scores = {"psnr": found.mean_psnr, "ssim": found.mean_ssim}
    if (distance := _perceptual()) is not None:
        scores["lpips"] = float(np.mean([distance(a[None], b[None]) for a, b in zip(*pairs, strict=True)]))
    return scores


@cache
def _perceptual() -> Callable[[torch.Tensor, torch.Tensor], float] | None:
    return lpips_distance()[0]


# ---- without a model -------------------------------------------------------------------------------------------------


def fill(case: HeldOutCase, kept: np.ndarray, at: np.ndarray, prediction: bool = True) -> Filled:
    """The frames ``at``, from the ``kept`` ones, by every classical method that suits the case.

    linear: per pixel. cubic: the spline through all frames. flow: both neighbours carried along TV-L1 flow and
    blended. For masks, sdf and cubic sdf: of signed distances; sdf along flow: these carried along the images' flow.
    prediction: what interpolate.py makes, by its method motion (minutes on a CPU; left out if ``prediction`` is false).
    """
    out: Filled = {"linear": {k: interpolate(v[kept], kept, at) for k, v in case.frames.items()}}
    flows: dict[int, tuple[Flow, Flow]] = {}
    if "img" in case.frames:
        frames = case.frames["img"][kept].astype(np.float32)
        out["cubic"] = {"img": interpolate(case.frames["img"][kept], kept, at, "cubic")}
        flows = tvl1_flows(frames, kept, at)
        out["flow"] = {"img": carried(frames, flows, kept, at, order=3)}
    if "seg" in case.frames:
        masks, (step, *pixel) = case.frames["seg"][kept] >= 0.5, case.spacing
        for name, method in (("sdf", "linear"), ("cubic sdf", "cubic")):
            out[name] = {"seg": interpolate_masks(masks, kept * step, at * step, tuple(pixel), method)}
        if flows:
            gap = step * float(np.mean(np.diff(kept)))
            distances = signed_distances(masks, tuple(pixel), gap)
            # Splines overshoot at the ridges of the distances, half-way between outlines.
            out["sdf along flow"] = {"seg": carried(distances, flows, kept, at, order=1) > 0}
    if prediction:
        out["prediction"] = predicted(case, kept, at)
    return out


def predicted(case: HeldOutCase, kept: np.ndarray, at: np.ndarray) -> dict[str, np.ndarray]:
    """The in-between prediction, by kind: (M, H, W) in [0, 1]. Like train.py here, it knows no spacing in mm."""
    given = {kind: torch.from_numpy(f[kept]).float()[:, None] for kind, f in case.frames.items()}
    between = InBetween(given.get("img", given.get("seg")), given.get("seg"))
    k, alpha = neighbours(kept, at)
    looked_up = {"img": between.images, "seg": between.masks}
    parts = list(zip(torch.from_numpy(k).split(16), torch.from_numpy(alpha).float().split(16), strict=True))
    return {
        kind: torch.cat([looked_up[kind](*part)[:, 0] for part in parts]).double().numpy() for kind in given
    }


def neighbours(kept: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The kept frame before each time, and the fraction of the way to the next."""
    k = np.clip(np.searchsorted(kept, at, "right") - 1, 0, len(kept) - 2)
    return k, (at - kept[k]) / (kept[k + 1] - kept[k])


def tvl1_flows(frames: np.ndarray, kept: np.ndarray, at: np.ndarray) -> dict[int, tuple[Flow, Flow]]:
    """scikit-image's TV-L1 flow, forward and backward, around every kept frame k that is followed by any of ``at``.
    frames: the kept ones, (K, H, W) float32 in [0, 1]."""
    options = {"attachment": 10, "num_warp": 5}
    return {
        int(k): tuple(optical_flow_tvl1(frames[i], frames[j], **options) for i, j in ((k, k + 1), (k + 1, k)))
        for k in np.unique(neighbours(kept, at)[0])
    }


def carried(
    values: np.ndarray, flows: dict[int, tuple[Flow, Flow]], kept: np.ndarray, at: np.ndarray, order: int
) -> np.ndarray:
    """Both neighbours of every time, warped there along their flow and blended: (K, H, W) -> (M, H, W).
    order: of the spline that samples them."""
    row, column = np.meshgrid(*map(np.arange, values.shape[1:]), indexing="ij")
    out = []
    for k, t in zip(*neighbours(kept, at), strict=True):
        (down, right), (up, left) = flows[int(k)]
        ways = (
            np.array([row + t * up, column + t * left]),
            np.array([row + (1 - t) * down, column + (1 - t) * right]),
        )
        before, after = (warp(values[k + i], way, mode="edge", order=order) for i, way in enumerate(ways))
        out.append((1 - t) * before + t * after)
    return np.stack(out)


def tvl1(frames: np.ndarray, kept: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Frames (K, H, W) in [0, 1], warped along TV-L1 flow and blended, (M, H, W)."""
    frames = frames.astype(np.float32)
    return carried(frames, tvl1_flows(frames, kept, at), kept, at, order=3)
