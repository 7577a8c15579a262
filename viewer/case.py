"""A trained case: the model and what to view with it: input and held-out frames, mesh, reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from scipy.ndimage import map_coordinates
from trimesh import Trimesh

from arguments import RenderOptions, TrainOptions, read_cfg_args
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, MAX_RENDERS, Render, rasterizer, render
from gaussian_renderer.oracle import LOW_PASS
from patient.geometry import FILE_NAME, Geometry
from patient.label_channels import colours_of, colours_of_index, ids_of
from patient.label_surfaces import label_surfaces
from patient.labels import LabelTable
from patient.meshes import in_space, read_mesh, smooth, surface
from patient.readers import read_volume
from patient.rendered_volume import Grid, RenderedVolume
from scene.frames import Frames
from scene.gaussian_model import IMAGE, SEGMENTATION, GaussianModel
from scene.heldout import HeldOut
from scene.trained import Trained
from training.data import read_data
from utils.errors import UserError
from utils.metrics import Scores

AT_FRAME = 1e-4  # positions this close to a frame are that frame
_AT_ONCE = 8  # views of a dense volume rendered at a time; live ones are drawn in between
_MOST_SUB_FRAMES = 8
_SMOOTHED = (1.0, 1.0, 1.0)  # voxels, of meshes


@dataclass(frozen=True, eq=False)
class Inputs:
    """The frames that the model was trained and scored on, as far as they still exist."""

    images: Frames | None = None
    masks: Frames | None = None
    painted: tuple[int, ...] | None = None
    """The frames that have masks, if not all do."""
    heldout: dict[str, HeldOut] = field(default_factory=dict)  # by task
    missing: str = ""
    """Why there are none, in words."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A volume to compare with: intensities, and from RAS millimetres to its voxels (4, 4)."""

    values: np.ndarray
    to_voxels: np.ndarray
    name: str


@dataclass(eq=False)
class Case:
    """A model and its surroundings. Positions are a frame's index plus a fraction, from 0 to K - 1."""

    options: RenderOptions
    trained: Trained
    geometry: Geometry | None
    inputs: Inputs
    pipeline: str
    reference: Reference | None = None
    mesh: Trimesh | None = None
    """In RAS if it is in millimetres."""
    _drawing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(
        cls,
        options: RenderOptions,
        reference: str | None = None,
        mesh: str | None = None,
        say: Callable[[str], object] = print,
    ) -> Case:
        """The case in ``options.model_path``. Missing input frames give a notice, not an error: the model can do
        without. Raises `UserError` where there is no model, or where ``reference`` or ``mesh`` cannot be read."""
        trained = Trained.load(options, say)
        folder = Path(options.model_path)
        geometry = Geometry.load(folder / FILE_NAME) if (folder / FILE_NAME).exists() else None
        if geometry is not None and len(geometry.slices) != trained.model.num_frames:
            say(
                f"{folder / FILE_NAME} does not match the model's frames: positions in the patient are unknown"
            )
            geometry = None
        inputs, pipeline = _inputs(options, say)
        case = cls(options, trained, geometry, inputs, pipeline)
        if reference is not None:
            case.reference = _reference(reference, geometry)
        if mesh is not None:
            case.mesh = read_mesh(mesh)
            if case.mesh.metadata["unit"] == "mm":
                case.mesh = in_space(case.mesh, "RAS")
        return case

    def reload(self) -> None:
        """Takes the newest checkpoint of the folder."""
        trained = Trained.load(replace(self.options, iteration=-1), lambda _: None)
        with self._drawing:
            self.trained = trained

    # ---- the sequence ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> GaussianModel:
        return self.trained.model

    @property
    def name(self) -> str:
        """The folder's name, or its parent's if the folder is just called model."""
        folder = Path(self.options.model_path).resolve()
        return folder.parent.name if folder.name == "model" else folder.name

    @property
    def has_masks(self) -> bool:
        return SEGMENTATION in self.model.heads or self.pipeline == "seg"

    @property
    def table(self) -> LabelTable | None:
        """Of the label map that masks are; None where they are masks of one structure, or there are none."""
        return self.model.labels

    @property
    def labels(self) -> list[dict[str, Any]]:
        """What the mask's values stand for: id, name and colour. A mask's is safe for colour-blind readers."""
        if self.table is not None:
            return [
                {"id": label.id, "name": label.name, "colour": "#{:02x}{:02x}{:02x}".format(*label.colour)}
                for label in self.table
            ]
        return [{"id": 1, "name": "mask", "colour": "#e69f00"}] if self.has_masks else []

    @property
    def channels(self) -> int:
        """Of the images of `draw`: 1 for grey, 3 for colour."""
        return 3 if self.model.label_head == IMAGE else self.model.channels

    @property
    def in_hounsfield(self) -> bool:
        """Whether intensities look like Hounsfield units, which have standard windows."""
        low, high = self.placed.window
        return low <= -20 and high >= 40

    @property
    def shown_window(self) -> tuple[float, float]:
        """Intensities shown as black and white in still pictures: soft tissue for Hounsfield units, else all."""
        low, high = self.placed.window
        return (max(low, -160.0), min(high, 240.0)) if self.in_hounsfield else (low, high)

    @cached_property
    def placed(self) -> Geometry:
        """Where renders lie; if unknown, a stack of voxels of size 1, upright like the frames."""
        if self.geometry is not None and self.geometry.affine is not None:
            return self.geometry
        count, camera = self.model.num_frames, self.trained.camera
        plain = ((-1.0, 0.0, 0.0, 0.0), (0.0, -1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
        return Geometry(
            axes=(0, 1, 2),
            flips=(True, True),
            size=(camera.width, camera.height),
            affine=plain,
            slices=tuple(range(count)),
            slice_count=count,
            positions=tuple(map(float, range(count))),
            window=self.geometry.window
            if self.geometry
            else (0.0, float(2 ** min(self.trained.bits, 16) - 1)),
            bits=16,
            source=self.name,
        )

    @property
    def unit(self) -> str:
        """Of positions: mm, or voxels if the geometry is unknown."""
        return "mm" if self.geometry is not None and self.geometry.affine is not None else "voxels"

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows of a render."""
        return self.trained.camera.width, self.trained.camera.height

    def draw(self, positions: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
        """What render.py writes at ``positions``: images (V, C, H, W) in [0, 1], masks (V, H, W) in [0, 1], or ids of a
        label map, int32. The images of a model that has learned a label map alone are its colours."""
        images, masks, _ = self.drawn(positions)
        return images, masks

    @torch.no_grad()
    def drawn(self, positions: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """`draw`, and how many Gaussians are active at each of ``positions`` (V,)."""
        views = len(positions)
        outputs = [(IMAGE, ACTIVE)]
        if self.has_masks:
            outputs.append((self.model.heads[-1], ACTIVE_SEGMENTATION))
        with self._drawing:
            trained = self.trained
            drawn = render(
                trained.model,
                trained.camera,
                positions,
                [False] * views,
                [Render(view, *output) for output in outputs for view in range(views)],
                trained.background,
                self.options.rasterizer,
                antialiasing=trained.antialiasing,
            )
            active = (drawn.active & ACTIVE).count_nonzero(1).cpu().numpy()
            every = drawn.images.clamp_(0, 1).unflatten(0, (len(outputs), views))
            images = every[0, :, : trained.model.channels]
            masks = every[1, :, : trained.model.channels_of(outputs[1][0])] if self.has_masks else None
            if self.table is None:
                masks = None if masks is None else masks.mean(1)
            else:
                assert masks is not None
                if trained.model.label_head == IMAGE:
                    images = colours_of(images, self.table)
                masks = ids_of(masks, self.table)
        return images.cpu().numpy(), None if masks is None else masks.cpu().numpy(), active

    @torch.no_grad()
    def ellipses(self, position: float, most: int) -> dict[str, Any]:
        """The Gaussians that are active at ``position``, or ``most`` of them, evenly picked.

        ``values`` is (n, 8) float32: centre u, v, half axes in px (one standard deviation), angle of the first from u
        towards v, opacity, sigma, opacity in the last head (masks, if there are any). ``active`` is how many there
        are, ``total`` how many the model has.
        """
        with self._drawing:
            trained = self.trained
            p, camera = trained.model.params, trained.camera
            means, conics, _, active = rasterizer(self.options.rasterizer).fold(
                p["xyz"],
                p["w1"],
                p["m"].flatten(),
                p["sigma"].flatten(),
                p["scaling"],
                p["rotation"].flatten(),
                trained.model.times([position]),
                torch.ones(1, device=trained.model.device),
                camera.pixels_per_unit,
                camera.width,
                camera.height,
            )
            opacities = trained.model.opacities([IMAGE, trained.model.heads[-1]])
            spreads = trained.model.spreads()
            (chosen,) = torch.nonzero(active[0] & ACTIVE, as_tuple=True)
            count = len(chosen)
            if count > most:
                chosen = chosen[torch.linspace(0, count - 1, most, device=chosen.device).long()]
            a, b, c = conics[0, chosen].double().unbind(1)
            inverse = torch.stack([torch.stack([a, b], 1), torch.stack([b, c], 1)], 1)
            covariance = torch.linalg.inv(inverse) - LOW_PASS * torch.eye(2, device=a.device)
            sizes, axes = torch.linalg.eigh(covariance)
            columns = [
                means[0, chosen],
                sizes.flip(1).clamp_min(0).sqrt(),
                torch.atan2(axes[:, 1, 1], axes[:, 0, 1])[:, None],
                opacities[0].flatten()[chosen, None],
                spreads.flatten()[chosen, None],
                opacities[1].flatten()[chosen, None],
            ]
            values = torch.cat([column.float() for column in columns], 1).cpu().numpy()
        return {"values": values, "active": count, "total": len(trained.model)}

    # ---- comparisons -------------------------------------------------------------------------------------------------

    @cached_property
    def heldout_positions(self) -> list[float]:
        test = self.inputs.heldout.get("img") or self.inputs.heldout.get("seg")
        return [] if test is None else test.indices

    def comparisons(self) -> list[str]:
        """What renders can be compared with."""
        task = "seg" if self.pipeline == "seg" else "img"
        names = ["frame", "linear"] if self.inputs.images is not None else []
        names += ["heldout"] if task in self.inputs.heldout else []
        return names + (["reference"] if self.reference is not None else [])

    def against(self, what: str, position: float) -> tuple[np.ndarray, float, str]:
        """An image (C, H, W) in [0, 1] to compare with the render at ``position``, its own position, and a caption."""
        images = self.inputs.images
        if what == "reference" and self.reference is not None:
            return self._resliced(position), position, self.reference.name
        if what == "heldout" and self.heldout_positions:
            test = self.inputs.heldout["seg" if self.pipeline == "seg" else "img"]
            k = int(np.abs(np.array(test.indices) - position).argmin())
            return self._shown(test.frames, [k])[0], test.indices[k], f"held out, slice {test.slices[k]}"
        if images is not None and what in ("frame", "linear"):
            k = min(int(position + 0.5), len(images) - 1)
            if what == "frame" or abs(position - k) < AT_FRAME:
                return self._shown(images, [k])[0], float(k), f"input frame {k}"
            first = min(int(position), len(images) - 2)
            share = np.float32(position - first)
            before, after = self._shown(images, [first, first + 1])
            return before + (after - before) * share, position, f"linear, {first} to {first + 1}"
        raise UserError(f"cannot compare with {what} here: choose from {', '.join(self.comparisons())}")

    def _shown(self, frames: Frames, indices: list[int]) -> np.ndarray:
        """Frames (B, C, H, W) in [0, 1], label maps in their colours."""
        if frames.labels is not None:
            return colours_of_index(frames.index(indices)[:, 0], frames.labels).cpu().numpy()
        return frames(indices, background=self.trained.background.cpu()).cpu().numpy()

    def mask_at(self, position: float) -> np.ndarray | None:
        """The given mask (H, W) of the input or held-out frame at ``position``, like those of `draw`; None where there
        is none."""
        task = self.inputs.heldout.get("seg")
        places = [] if task is None else task.indices
        at = next((k for k, place in enumerate(places) if abs(place - position) < AT_FRAME), None)
        frames = self.inputs.images if self.pipeline == "seg" else self.inputs.masks
        if task is not None and at is not None:
            frames, k = task.frames, at
        elif frames is not None and abs(position - round(position)) < AT_FRAME:
            k = round(position)
            if self.inputs.painted is not None and k not in self.inputs.painted:
                return None
        else:
            return None
        if frames.labels is None:
            return frames([k])[0].mean(0).cpu().numpy()
        ids = np.array([0, *frames.labels.ids], np.int32)
        return ids[frames.index([k])[0, 0].cpu().numpy()]

    def scores(
        self, position: float, image: np.ndarray, mask: np.ndarray | None = None
    ) -> dict[str, Any] | None:
        """PSNR and SSIM of the render (C, H, W) at ``position``, if an input or held-out frame lies there, and Dice of
        the ``mask`` (H, W) if that has one: of a label map the mean over the labels there."""
        for what, places in (
            ("heldout", self.heldout_positions),
            ("frame", range(self.model.num_frames if self.inputs.images is not None else 0)),
        ):
            if any(abs(position - place) < AT_FRAME for place in places):
                truth, _, words = self.against(what, position)
                target = torch.from_numpy(np.ascontiguousarray(truth))[None]
                scores = Scores.of(torch.from_numpy(image)[None], target.expand(-1, len(image), -1, -1))
                given = None if mask is None else self.mask_at(position)
                dice = None if mask is None or given is None else _dice(mask, given)
                return {"of": words, "psnr": scores.mean_psnr, "ssim": scores.mean_ssim, "dice": dice}
        return None

    def _resliced(self, position: float) -> np.ndarray:
        """The reference where the frame at ``position`` lies, (1, H, W) in the window of the frames."""
        assert self.reference is not None
        width, height = self.size
        grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float64)
        points = np.concatenate([grid, np.full((height, width, 1), position)], -1)
        patient = self.placed.to_patient(points, self.size)
        assert patient is not None
        matrix = self.reference.to_voxels
        voxels = patient @ matrix[:3, :3].T + matrix[:3, 3]
        low, high = self.placed.window
        values = map_coordinates(self.reference.values, np.moveaxis(voxels, -1, 0), order=1, cval=low)
        return ((values - low) / (high - low)).clip(0, 1).astype(np.float32)[None]

    # ---- the dense volume --------------------------------------------------------------------------------------------

    def sub_frames(self, most_voxels: int) -> int:
        """Slices per frame that make voxels roughly isotropic, as far as ``most_voxels`` allows."""
        spacing = self.placed.spacing
        assert spacing is not None
        wanted = round(spacing[2] / min(spacing[:2])) if self.unit == "mm" else 4
        slices = max(1, most_voxels // (self.size[0] * self.size[1]))
        fitting = max(1, (slices - 1) // max(1, self.model.num_frames - 1))
        return max(1, min(wanted, fitting, _MOST_SUB_FRAMES))

    def volumes(
        self, sub_frames: int, progress: Callable[[float], object] = lambda _: None
    ) -> tuple[RenderedVolume, RenderedVolume | None]:
        """The sequence rendered densely, as by render.py --nifti: intensities, and the mask (0 and 1) or its ids."""
        grid = Grid(self.placed, self.size, sub_frames)
        images = RenderedVolume(grid, mask=False)
        masks = RenderedVolume(grid, self.table is None, self.table) if self.has_masks else None
        channels = max(self.model.channels_of(head) for head in self.model.heads)
        step = max(1, min(_AT_ONCE, MAX_RENDERS // 2, 4 * _AT_ONCE // channels))
        for first in range(0, len(grid.positions), step):
            batch = grid.positions[first : first + step]
            drawn, inside = self.draw(batch)
            for slot in range(len(batch)):
                images.put(first + slot, drawn[slot].mean(0))
                if masks is not None and inside is not None:
                    masks.put(first + slot, inside[slot])
            progress((first + len(batch)) / len(grid.positions))
        return images, masks


def meshes_of(masks: nibabel.Nifti1Image, table: LabelTable | None = None) -> dict[int, Trimesh]:
    """The surface of a mask volume, or of each label of a label map, in RAS by id; empty ones are left out. Smoothed by
    a voxel, as whole voxels give steps."""
    values = np.asarray(masks.dataobj)
    stack = np.ascontiguousarray(values.T)  # (k, j, i)
    if not values.any():
        return {}
    if table is not None:
        return label_surfaces(stack.astype(np.int32), table.ids, _SMOOTHED, affine=masks.affine)
    return {1: surface(smooth(stack.astype(np.float32), _SMOOTHED), 0.5, masks.affine)}


def _dice(mask: np.ndarray, truth: np.ndarray) -> float | None:
    """Of two masks in [0, 1], or the mean over the labels of two label maps; None where both are empty."""
    if truth.dtype.kind == "f":
        mask, truth = (mask >= 0.5).astype(int), (truth >= 0.5).astype(int)
    ids = np.union1d(np.unique(mask), np.unique(truth))
    found = [
        2 * ((mask == i) & (truth == i)).sum() / ((mask == i).sum() + (truth == i).sum()) for i in ids if i
    ]
    return float(np.mean(found)) if found else None


def train_options_of(folder: Path, **changes: Any) -> TrainOptions:
    """The options of the run in ``folder``, from its ``cfg_args``. Raises `UserError` where it has none."""
    path = folder / "cfg_args"
    if not path.exists():
        raise UserError(f"{path} does not exist, so the training data of this model is unknown")
    saved = read_cfg_args(path)
    names = {option.name for option in fields(TrainOptions) if option.metadata}
    known = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in saved.items()
        if name in names
    }
    return TrainOptions(**{**known, **changes})


def _inputs(options: RenderOptions, say: Callable[[str], object]) -> tuple[Inputs, str]:
    """The frames that the model was trained on and scored on, and its pipeline."""
    folder, pipeline = Path(options.model_path), "img"
    try:
        changes: dict[str, Any] = {"device": "cpu", "data_device": "cpu"}
        if "source_path" in options.given:
            changes["source_path"] = options.source_path
        run = train_options_of(folder, **changes)
        pipeline = run.pipeline
        data = read_data(run, torch.device("cpu"), lambda _: None, fill_in=False)
    except UserError as error:
        say(f"without input frames: {error}")
        return Inputs(missing=str(error)), pipeline
    names = {"img": ("img",), "seg": ("seg",), "joint": ("img", "seg")}[pipeline]
    heldout = {name: test for name, test in zip(names, data.heldout, strict=False) if test is not None}
    return Inputs(data.frames, data.masks, data.painted, heldout), pipeline


def _reference(path: str, geometry: Geometry | None) -> Reference:
    if geometry is None or geometry.affine is None:
        raise UserError(
            f"--reference {path}: the position of the model's frames is unknown, so it cannot be laid over"
        )
    try:
        volume = read_volume(path)
    except UserError as error:  # it may hold several, of which the model's frames are one
        if geometry.volume is None:
            raise UserError(f"--reference: {error}") from error
        volume = read_volume(path, geometry.volume)
    if volume.affine is None or volume.values.ndim != 3:
        raise UserError(
            f"--reference {path} is not a volume with a position in the patient: give a NIfTI file"
        )
    return Reference(np.asarray(volume.values, np.float32), np.linalg.inv(volume.affine), Path(path).name)
