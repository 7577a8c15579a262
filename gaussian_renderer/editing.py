"""The Gaussians at one time in plane units: saved as points, picked by such points, changed by a user's function."""

from __future__ import annotations

import importlib.util
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn.functional import pad

from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION
from gaussian_renderer.oracle import MIN_SEGMENTATION_SCALE, MIN_TIME_WEIGHT
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from utils.errors import UserError
from utils.files import atomic_write
from utils.images import natural_order

if TYPE_CHECKING:
    from diff_gaussian_rasterization import GaussianRasterizationSettings

THICKNESS = 1e-8  # scale along y, plane units
POINTS_FOLDER = "means3Dmasked"  # in the user's folder
# A Gaussian is near points when it is this close to the mean of its nearest ones, leaving out the very nearest.
NEIGHBOURS = 10
REACH = 0.005  # plane units


# ---- the Gaussians at one time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """All N Gaussians at ``time``, whether an image shows them or not."""

    time: float
    means: Tensor  # (N, 3) plane units, y = 0: c(t)
    scales: Tensor  # (N, 3) plane units, the time weight included; along y THICKNESS
    quaternions: Tensor  # (N, 4) w x y z, turns about y
    weights: Tensor  # (N,) time weights delta(t)

    def active(self, test: int) -> Tensor:
        """Which of them (N,) exist at this time; ``test`` is ``ACTIVE`` or ``ACTIVE_SEGMENTATION``."""
        active = self.weights > MIN_TIME_WEIGHT
        if test == ACTIVE_SEGMENTATION:
            active &= (self.scales[:, [0, 2]] > MIN_SEGMENTATION_SCALE).all(1)
        return active


@torch.no_grad()
def cut(model: GaussianModel, position: float) -> Cut:
    """The Gaussians at ``position`` (frame index plus fraction), by the equations of MedGS section 3.2."""
    p = model.params
    time = model.times([position])
    offset = torch.sigmoid(p["m"]) - time  # (N, 1)
    weights = torch.exp(-(offset**2) / (2 * model.spreads()[:, None] ** 2))  # (N, 1)
    means = p["xyz"] * p["xyz"].new_tensor([1, 0, 1])  # (N, 3)
    for j, w in enumerate(p["w1"].unflatten(1, (-1, 2)).unbind(1)):
        means[:, [0, 2]] += w * offset ** (j + 1)
    x, z = (weights * model.scales()).unbind(1)  # (N,) each
    half_turn = math.pi * torch.sigmoid(p["rotation"][:, 0])  # (N,) half the angle about +y
    zero = torch.zeros_like(x)
    return Cut(
        float(time),
        means,
        torch.stack([x, zero + THICKNESS, z], 1),
        torch.stack([torch.cos(half_turn), zero, torch.sin(half_turn), zero], 1),
        weights[:, 0],
    )


def general_settings(
    camera: Camera, background: Tensor, antialiasing: bool = False
) -> GaussianRasterizationSettings:
    """What the general rasteriser needs to know about ``camera``; background: (3,), on the device that draws."""
    from diff_gaussian_rasterization import GaussianRasterizationSettings

    device = background.device
    return GaussianRasterizationSettings(
        image_height=camera.height,
        image_width=camera.width,
        tanfovx=camera.tan_fov_x,
        tanfovy=camera.tan_fov_y,
        bg=background,
        scale_modifier=1.0,
        viewmatrix=camera.view_matrix(device=device),
        projmatrix=camera.projection_matrix(device=device),
        sh_degree=0,
        campos=camera.position(device=device),
        prefiltered=False,
        debug=False,
        antialiasing=antialiasing,
    )


@torch.no_grad()
def draw(
    cut: Cut,
    drawn: Tensor,  # (N,) bool
    opacities: Tensor,  # (N,)
    colours: Tensor,  # (N, C)
    camera: Camera,
    background: Tensor,  # (C,)
    antialiasing: bool = False,
) -> Tensor:
    """The image (C, H, W) of the Gaussians ``drawn``, by the general rasteriser: nearest first, then by index."""
    from diff_gaussian_rasterization import GaussianRasterizer
    from diff_gaussian_rasterization.general import NEAR_PLANE

    if camera.distance <= NEAR_PLANE:
        raise UserError(
            f"--modify draws only what is more than {NEAR_PLANE} plane units from the camera, which stands at "
            f"{camera.distance:g}: train with a greater --distance"
        )
    means = cut.means[drawn]
    images = []
    for shown, behind in zip(colours[drawn].split(3, 1), background.split(3), strict=True):  # it draws RGB
        missing = 3 - len(behind)
        rasterise = GaussianRasterizer(general_settings(camera, pad(behind, (0, missing)), antialiasing))
        image, _, _ = rasterise(
            means3D=means,
            means2D=torch.zeros_like(means),
            opacities=opacities[drawn],
            colors_precomp=pad(shown, (0, missing)),
            scales=cut.scales[drawn],
            rotations=cut.quaternions[drawn],
        )
        images.append(image[: len(behind)])
    return torch.cat(images)


def subset(model: GaussianModel, chosen: Tensor) -> GaussianModel:
    """The model of the Gaussians ``chosen`` (N,) alone, in their order."""
    params = {name: value[chosen] for name, value in model.params.items()}
    return GaussianModel(params, model.time_func, model.active_sh_degree, model.labels)


# ---- points ----------------------------------------------------------------------------------------------------------


def write_points(model: GaussianModel, folder: str | os.PathLike[str], test: int) -> Path:
    """Write the active centres of every frame, ``means3Dmasked/00000.pt``, ... under ``folder``; returns their folder.

    Each file is a float tensor (M, 3) in plane units with y = 0. Files that an earlier run left for frames beyond
    the model's are removed.
    """
    out = Path(folder) / POINTS_FOLDER
    names = [f"{k:05d}.pt" for k in range(model.num_frames)]
    for k, name in enumerate(names):
        at = cut(model, k)
        with atomic_write(out / name, sync=False) as temporary:
            torch.save(at.means[at.active(test)].cpu(), temporary)
    for file in _point_files(out):
        if file.stem.isdigit() and file.name not in names:
            file.unlink()
    return out


class PointMask:
    """Points of every frame, as `write_points` wrote them: only Gaussians close to them are drawn.

    Between two frames the points of both count, so that what moves from one to the other is not cut off on its way.
    """

    def __init__(self, folder: str | os.PathLike[str], num_frames: int) -> None:
        """Finds the files in ``folder`` or its means3Dmasked. Raises `UserError` unless there is one for each frame."""
        if not Path(folder).is_dir():
            raise UserError(f"--mask_path {folder} is not a folder: give the one of --generate_points_path")
        inner = Path(folder) / POINTS_FOLDER
        place = inner if inner.is_dir() else Path(folder)
        self.files = _point_files(place)
        if len(self.files) != num_frames:
            raise UserError(
                f"{place} has the points of {len(self.files)} frames (*.pt), the model has {num_frames} frames: "
                "save the points of a model of the same frames"
            )
        self._tree = lru_cache(maxsize=2)(self._read_tree)  # neighbouring positions share theirs

    def near(self, means: Tensor, position: float) -> Tensor:
        """Which of ``means`` (N, 3) are close to the points at ``position`` (frame index plus fraction): bool (N,).

        Close: the mean of 9 of the 10 nearest points, without the nearest, is under 0.005 plane units away. Nothing
        is close to fewer than 11 points.
        """
        last = len(self.files) - 1
        tree = self._tree(min(math.floor(position), last), min(math.ceil(position), last))
        if tree.n <= NEIGHBOURS:
            return torch.zeros(len(means), dtype=torch.bool, device=means.device)
        centres = means.double().cpu().numpy()
        _, nearest = tree.query(centres, NEIGHBOURS, workers=-1)  # (N, 10)
        middles = tree.data[nearest[:, 1:]].mean(1)  # (N, 3)
        distances = np.linalg.norm(centres - middles, axis=1)
        return torch.from_numpy(distances < REACH).to(means.device)

    def _read_tree(self, *frames: int) -> cKDTree:
        return cKDTree(np.concatenate([_read_points(self.files[k]) for k in sorted(set(frames))]))


def _point_files(folder: Path) -> list[Path]:
    return natural_order(path for path in folder.glob("*.pt") if not path.name.startswith("."))


def _read_points(path: Path) -> np.ndarray:  # (M, 3) float64
    try:
        points = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged, or not a tensor: save the points again") from error
    if not isinstance(points, Tensor) or points.ndim != 2 or points.shape[1] != 3:
        what = tuple(points.shape) if isinstance(points, Tensor) else type(points).__name__
        raise UserError(f"{path} holds {what}, not points of shape (M, 3): save the points again")
    if not points.is_floating_point() or not points.isfinite().all():
        raise UserError(f"{path} holds values that are not finite floats: save the points again")
    return points.detach().double().numpy()


# ---- a user's function -----------------------------------------------------------------------------------------------


class Modification:
    """The function of ``--modify FILE.py:FUNCTION``, f(means, scales, quaternions, t) -> the same three, changed."""

    def __init__(self, source: str) -> None:
        """Runs FILE.py. Raises `UserError` where it, or the function in it, is missing or fails."""
        file, _, name = source.rpartition(":")
        self.source = source
        if not Path(file).is_file():
            raise UserError(f"--modify {source}: there is no file {file}")
        spec = importlib.util.spec_from_file_location(f"modify_{Path(file).stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # anything that the user's code raises
            raise UserError(f"--modify {source}: {file} cannot be run: {_words(error)}") from error
        function = getattr(module, name, None)
        if not callable(function):
            raise UserError(f"--modify {source}: {file} defines no function {name}")
        self.function: Callable[..., Any] = function

    @torch.no_grad()
    def __call__(self, cut: Cut) -> Cut:
        """The cut with what the function returns. Raises `UserError` where that cannot be drawn."""
        given = {"means": cut.means, "scales": cut.scales, "quaternions": cut.quaternions}
        active = cut.active(ACTIVE)  # the others are not drawn, whatever they are
        try:
            returned = self.function(*(value.clone() for value in given.values()), cut.time)
        except Exception as error:  # anything that the user's code raises
            raise UserError(
                f"--modify {self.source} failed at t = {cut.time:.4g}: {_words(error)}"
            ) from error
        if not isinstance(returned, (tuple, list)) or len(returned) != 3:
            raise self._refusal(f"{type(returned).__name__}, not means, scales and quaternions", cut)
        for (name, before), after in zip(given.items(), returned, strict=True):
            if not isinstance(after, Tensor):
                raise self._refusal(f"{name} as {type(after).__name__}, not as a tensor", cut)
            if after.shape != before.shape:
                raise self._refusal(f"{name} of shape {tuple(after.shape)}, not {tuple(before.shape)}", cut)
            if not after.is_floating_point() or not after[active].isfinite().all():
                raise self._refusal(f"{name} with values that are not finite floats", cut)
        means, scales, quaternions = (value.to(cut.means) for value in returned)
        if (scales[active] < 0).any():
            raise self._refusal("scales below 0", cut)
        if (quaternions[active] == 0).all(1).any():
            raise self._refusal("quaternions that are 0, which stand for no rotation", cut)
        return replace(cut, means=means, scales=scales, quaternions=quaternions)

    def _refusal(self, what: str, cut: Cut) -> UserError:
        return UserError(f"--modify {self.source} returned {what} (at t = {cut.time:.4g})")


def _words(error: Exception) -> str:
    """The exception, and the line of the user's file that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = (
        f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace is not None else ""
    )
    return f"{type(error).__name__}: {error}{where}"
