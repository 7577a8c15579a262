#!/usr/bin/env python3
"""Render the frames of a trained model, and frames between them.

    python render.py -m OUTPUT --interp 4

writes OUTPUT/render_img/00000_0.png, 00000_1.png, ...; --help lists every option.
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import re
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from arguments import RenderOptions, render_options
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, MAX_RENDERS, Render, editing, render
from patient.geometry import FILE_NAME, Geometry
from patient.label_channels import ids_of
from patient.labels import Label, LabelTable
from patient.reformats import Plane, Reformat
from patient.rendered_volume import Grid, RenderedVolume
from patient.writers import DicomCase, SeriesVolume
from pictures.video import Shot, video_format, write_video
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE, SEGMENTATION
from scene.trained import Trained
from utils.errors import UserError, run
from utils.files import atomic_folder
from utils.images import WRITABLE, limit_pixels, write_image, write_levels
from utils.spherical_harmonics import to_colour
from utils.threads import processors

# What the views that are rendered together may take, unless one alone takes more. A view takes the output of `fold` for
# each Gaussian, a few entries per Gaussian in the tiles' lists, and the image, as floats, levels and bytes.
MEMORY = 2**30  # bytes
BYTES_PER_GAUSSIAN, BYTES_PER_VALUE = 100, 16
WRITERS = min(32, processors())  # threads that encode images while the next ones are rendered

EXACT = (".png", ".tif", ".tiff")  # image files that hold ids

Say = Callable[[str], object]


@dataclass(frozen=True)
class Output:
    """A folder of images: which head they show, by which activity test, and what labels if it is a label map."""

    folder: Path
    head: str
    test: int
    labels: LabelTable | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """A sequence of files, one per position, and volumes of them."""

    folder: Path
    output: int
    """Place of what they are made from among the renderer's outputs."""
    labels: LabelTable | None
    """Of a label map: files and volume hold ids."""
    share_of: int | None
    """Place in its table of the label whose shares they hold."""
    volume: RenderedVolume | None
    """Of evenly spaced slices, if it is wanted."""
    masks: SeriesVolume | None = None
    """On the slices of a DICOM series, likewise."""
    plane: Reformat | None = None
    """Across the frames, likewise."""

    @property
    def volumes(self) -> list[RenderedVolume | SeriesVolume | Reformat]:
        return [volume for volume in (self.volume, self.masks, self.plane) if volume is not None]

    def values(self, images: Sequence[Tensor]) -> Tensor:
        """(V, C, H, W) of these images (V, C, H, W) of each output, in [0, 1]; of a label map ids, C = 1."""
        own = images[self.output]
        if self.labels is not None:
            return ids_of(own, self.labels)[:, None]
        return own if self.share_of is None else own[:, [self.share_of]]

    @property
    def file_type(self) -> type:
        """Of ids, the smallest that holds them; of levels with more than 8 bits."""
        return np.uint16 if self.labels is None else self.labels.dtype


@dataclass(frozen=True)
class Renderer:
    """Positions in the sequence -> images of every output."""

    model: GaussianModel
    camera: Camera
    background: Tensor  # (C,)
    outputs: Sequence[Output]
    rasterizer: str
    antialiasing: bool
    mask: editing.PointMask | None
    modify: editing.Modification | None

    @torch.no_grad()
    def __call__(self, positions: Sequence[float]) -> list[Tensor]:
        """Images (V, C, H, W) of each output at ``positions`` (frame index plus fraction), with its head's C."""
        if self.mask is None and self.modify is None:
            return self._splat(self.model, positions)
        every = [self._edited(position) for position in positions]
        return [torch.cat(views) for views in zip(*every, strict=True)]

    def _splat(self, model: GaussianModel, positions: Sequence[float]) -> list[Tensor]:
        """All outputs from one fold and one blend."""
        views = len(positions)
        renders = [Render(view, out.head, out.test) for out in self.outputs for view in range(views)]
        drawn = render(
            model,
            self.camera,
            positions,
            [False] * views,
            renders,
            self.background,
            self.rasterizer,
            antialiasing=self.antialiasing,
        )
        images = drawn.images.split(views)
        return [own[:, : model.channels_of(out.head)] for own, out in zip(images, self.outputs, strict=True)]

    def _edited(self, position: float) -> list[Tensor]:
        """One view, (1, C, H, W) of each output, of the Gaussians that the mask keeps, changed by the user's
        function."""
        cut = editing.cut(self.model, position)
        drawn = torch.stack([cut.active(out.test) for out in self.outputs])  # (outputs, N)
        if self.mask is not None:
            some = drawn.any(0)
            some = some.masked_scatter(some, self.mask.near(cut.means[some], position))
            if self.modify is None:
                return self._splat(editing.subset(self.model, some), [position])
            drawn &= some
        assert self.modify is not None
        cut = self.modify(cut)
        images = []
        for out, some in zip(self.outputs, drawn, strict=True):
            opacities = self.model.opacities([out.head])[0]
            colours = to_colour(self.model.raw_colours([out.head], self.camera))[0]
            behind = self.model.background_of(out.head, self.background)
            images.append(
                editing.draw(cut, some, opacities, colours, self.camera, behind, self.antialiasing)[None]
            )
        return images


def main() -> None:
    options = render_options()
    limit_pixels(options.max_pixels)
    check(options)

    def say(message: str) -> None:
        if not options.quiet:
            print(message, flush=True)

    kind = video_format(options.video_format) if options.video else None
    modify = editing.Modification(options.modify) if options.modify else None
    trained = Trained.load(options, say)
    model, path = trained.model, trained.path
    mask = editing.PointMask(options.mask_path, model.num_frames) if options.mask_path else None
    outputs = outputs_of(options, model)
    check_labels(options, outputs)
    if outputs[-1].test == ACTIVE_SEGMENTATION and SEGMENTATION not in model.heads:
        print(f"{path} has no segmentation head: masks come from its image head", flush=True)
    keep_geometry(options, model.num_frames, say)

    renderer = Renderer(
        model,
        trained.camera,
        trained.background,
        outputs,
        options.rasterizer,
        trained.antialiasing,
        mask,
        modify,
    )
    case = dicom_case(renderer, options)
    streams = streams_of(renderer, options, case)
    names = write_images(renderer, trained.bits, streams, options, say)
    if options.nifti:
        write_volumes(streams, say)
    if case is not None:
        write_dicom(case, streams, options, say)
    write_planes(streams, trained.bits, say)
    if kind is not None:
        write_sequence(renderer, names, kind, options, say)
    if options.uncertainty:
        write_uncertainty(renderer, options, say)
    if options.html:
        write_page(options, say)
    if options.generate_points_path:
        folder = editing.write_points(model, options.generate_points_path, outputs[-1].test)
        say(f"active centres of {model.num_frames} frames in {folder}")


def check(options: RenderOptions) -> None:
    """Refuse what can be refused before anything is read."""
    if options.extension.lower() not in WRITABLE:
        raise UserError(f"--extension {options.extension}: images are written as {', '.join(WRITABLE)}")
    if options.modify and options.rasterizer == "oracle":
        raise UserError("--modify needs the compiled rasteriser: leave out --rasterizer oracle")
    if options.dicom_seg is not None and options.pipeline == "img":
        raise UserError("--dicom-seg writes masks: add --pipeline both, or seg")
    if options.dicom_seg is None and not options.dicom:
        for option in ("dicom_source", "anonymous"):
            if getattr(options, option):
                raise UserError(f"--{option} is about --dicom and --dicom-seg: give one of them too")
    if options.uncertainty and (options.modify or options.mask_path):
        raise UserError(
            "--uncertainty is of the model as it was trained: leave out --modify and --mask_path, or it"
        )
    if options.html and (options.modify or options.mask_path):
        raise UserError("--html shows the model as it was trained: leave out --modify and --mask_path, or it")


def outputs_of(options: RenderOptions, model: GaussianModel) -> list[Output]:
    """The outputs of ``--pipeline``. Masks come from the segmentation head, or without one from the image head."""
    folder = Path(options.model_path)
    images = Output(folder / "render_img", IMAGE, ACTIVE)
    masks = Output(folder / "render_mask", model.heads[-1], ACTIVE_SEGMENTATION)
    outputs = {"img": [images], "seg": [masks], "both": [images, masks]}[options.pipeline]
    return [replace(out, labels=model.labels if out.head == model.label_head else None) for out in outputs]


def check_labels(options: RenderOptions, outputs: Sequence[Output]) -> None:
    """Refuse what label maps cannot be written as, and probabilities where nothing is a label map."""
    labelled = any(out.labels is not None for out in outputs)
    if labelled and options.extension.lower() not in EXACT:
        raise UserError(
            f"--extension {options.extension}: a label map needs exact numbers, so its images are {' or '.join(EXACT)}"
        )
    if options.probabilities and not labelled:
        raise UserError(
            "--probabilities is for models of label maps (--pipeline seg or both): this shows images or one mask, "
            "whose renders are soft already"
        )


def keep_geometry(options: RenderOptions, num_frames: int, say: Say) -> None:
    """If another program's train.py left no frames.json in the model folder, copy that of the source frames."""
    kept = Path(options.model_path) / FILE_NAME
    if kept.exists() or not options.source_path:
        return
    geometry = Geometry.find(options.source_path)
    if geometry is not None and len(geometry.slices) == num_frames:
        geometry.save(kept)
        say(f"where the frames lie in the patient: {kept}")


def streams_of(renderer: Renderer, options: RenderOptions, case: DicomCase | None) -> list[Stream]:
    """What to write: every output, with ``--probabilities`` every label's shares, with ``--nifti`` and ``--dicom`` each
    as a volume."""
    grid = None
    size = renderer.camera.width, renderer.camera.height
    if options.nifti or options.dicom:
        option = "--nifti" if options.nifti else "--dicom"
        grid = Grid(geometry_of(renderer, options, option), size, options.interp, option)
    geometry = geometry_of(renderer, options, "--plane") if options.plane else None
    plane = (
        Plane.parse(options.plane, geometry, options.plane_spacing) if options.plane and geometry else None
    )
    streams = []
    for number, out in enumerate(renderer.outputs):
        mask = out.folder.name == "render_mask" and out.labels is None
        volume = RenderedVolume(grid, mask, out.labels) if grid else None
        if case and options.dicom and volume:
            case.check_dense(volume)
        masks = case.masks() if case and options.dicom_seg and out.folder.name == "render_mask" else None
        across = Reformat(plane, geometry, size, out.labels, mask) if plane and geometry else None
        streams.append(Stream(out.folder, number, out.labels, None, volume, masks, across))
        if options.probabilities and out.labels is not None:
            shares = (
                options.nifti and grid and replace(grid, geometry=replace(grid.geometry, window=(0.0, 1.0)))
            )
            for place, name in enumerate(out.labels.file_names().values()):
                folder = out.folder.with_name("render_probabilities") / name
                volume = RenderedVolume(shares, mask=False) if shares else None
                streams.append(Stream(folder, number, None, place, volume))
    return streams


def geometry_of(renderer: Renderer, options: RenderOptions, option: str) -> Geometry:
    """Where the frames lie, for ``option``. Refuses models without a place in a patient, or in colour."""
    path = Path(options.model_path) / FILE_NAME
    if not path.exists():
        raise UserError(
            f"{option}: there is no {path} to say where the frames lie; train on a folder of prepare.py, or give it "
            "here with -s"
        )
    geometry, model = Geometry.load(path), renderer.model
    if len(geometry.slices) != model.num_frames:
        raise UserError(
            f"{option}: {path} is for {len(geometry.slices)} frames, the model for {model.num_frames}: put the "
            "frames.json of these frames there"
        )
    if model.channels != 1 and model.label_head != IMAGE:
        raise UserError(
            f"{option}: a volume holds one intensity, and this is a colour model: leave out {option}"
        )
    return geometry


def dicom_case(renderer: Renderer, options: RenderOptions) -> DicomCase | None:
    """For ``--dicom`` and ``--dicom-seg``: the series that the files will belong to."""
    if not options.dicom and not options.dicom_seg:
        return None
    option = "--dicom-seg" if options.dicom_seg else "--dicom"
    labels = next((out.labels for out in renderer.outputs if out.labels is not None), LabelTable())
    if not labels and options.pipeline != "img":
        labels = LabelTable((Label.of(1, options.dicom_seg or "mask"),))
    geometry = geometry_of(renderer, options, option)
    return DicomCase(geometry, options.dicom_source, options.anonymous, labels, option)


def views_at_once(renderer: Renderer, positions: int, chunks: int) -> int:
    """How many views to render together: what --chunks asks for, as far as MEMORY allows."""
    camera, model, outputs = renderer.camera, renderer.model, len(renderer.outputs)
    channels = max(map(model.channels_of, model.heads))
    pixels = outputs * channels * camera.width * camera.height
    fitting = MEMORY // (BYTES_PER_GAUSSIAN * len(model) + BYTES_PER_VALUE * pixels)
    return max(1, min(-(-positions // chunks), fitting, MAX_RENDERS // outputs))


def write_images(
    renderer: Renderer, bits: int, streams: Sequence[Stream], options: RenderOptions, say: Say
) -> list[str]:
    """Render chunk after chunk while threads write what is done; at most two chunks are in memory, or one image per
    thread. Fills the streams' volumes too. Returns the names of the files in each stream's folder, in order."""
    last = renderer.model.num_frames - 1
    numbers = [(k, i) for k in range(last) for i in range(options.interp)]
    numbers += [(last, i) for i in range(options.interp if options.beyond else 1)]
    names = {k + i / options.interp: f"{k:05d}_{i}{options.extension}" for k, i in numbers}
    volumes = [
        [
            (volume, {position: slot for slot, position in enumerate(volume.positions)})
            for volume in own.volumes
        ]
        for own in streams
    ]
    positions = sorted(names.keys() | {position for own in volumes for _, slots in own for position in slots})
    bits = 8 if bits == 8 else 16
    if bits > 8 and options.extension.lower() in (".jpg", ".jpeg"):
        say("JPEG holds 8 bits per channel: these frames' 16 bits are rounded")
        bits = 8

    floats = options.extension.lower() == ".npy"
    write: Callable[[Path, np.ndarray], None] = write_image if floats else write_levels
    step = views_at_once(renderer, len(positions), options.chunks)
    waiting: deque[Future[None]] = deque()
    most = max(step * len(streams), WRITERS)
    with (
        ThreadPoolExecutor(WRITERS) as writers,
        tqdm(total=len(names) * len(streams), desc="rendering", unit="image", disable=options.quiet) as bar,
    ):
        for first in range(0, len(positions), step):
            batch = positions[first : first + step]
            images = [own.clamp_(0, 1) for own in renderer(batch)]  # (V, C, H, W) of each output
            for stream, own in zip(streams, volumes, strict=True):
                values = stream.values(images)
                for volume, slots in own:
                    for position, image in zip(batch, values.cpu().numpy(), strict=True):
                        if position in slots:
                            volume.put(slots[position], image[0])
                stored = values if floats or stream.labels else levels_of(values, bits)
                for position, array in zip(batch, stored.movedim(1, -1).cpu().numpy(), strict=True):
                    if position in names:
                        array = array.astype(stream.file_type) if array.dtype == np.int32 else array
                        waiting.append(writers.submit(write, stream.folder / names[position], array))
            while len(waiting) > most:
                waiting.popleft().result()  # raises what the thread raised
                bar.update()
        while waiting:
            waiting.popleft().result()
            bar.update()
    for stream in streams:
        removed = remove_older(stream.folder, set(names.values()), options.extension)
        say(
            f"{len(names)} images in {stream.folder}"
            + (f" ({removed} of an earlier render removed)" if removed else "")
        )
    return list(names.values())


def levels_of(images: Tensor, bits: int) -> Tensor:
    """Values in [0, 1] as a file's levels: uint8, or int32 for 16 bits, since not every device has uint16."""
    levels = (images.nan_to_num(0) * (2**bits - 1)).round_()
    return levels.to(torch.uint8 if bits == 8 else torch.int32)


def write_volumes(streams: Sequence[Stream], say: Say) -> None:
    volumes = {stream.folder: stream.volume for stream in streams if stream.volume}
    for folder, volume in volumes.items():
        path = folder.with_name(f"{folder.name}.nii.gz")
        volume.write(path)
        shape = " x ".join(map(str, volume.values.shape))
        say(f"{shape} voxels in {path}")
    if any(not volume.grid.geometry.evenly_spaced for volume in volumes.values()):
        say("  the frames are unevenly spaced: slices are drawn at even steps between them")


def write_planes(streams: Sequence[Stream], bits: int, say: Say) -> None:
    for stream in streams:
        if stream.plane is None:
            continue
        path = stream.folder.with_name(stream.folder.name.replace("render_", "render_plane_") + ".nii.gz")
        stream.plane.write(path)
        shape = stream.plane.plane.shape
        if shape[2] == 1:
            picture, values = path.with_name(path.name.replace(".nii.gz", ".png")), stream.plane.values[0]
            if stream.labels is None:
                write_image(picture, values, 8 if bits == 8 else 16)
            else:
                write_levels(picture, values.astype(stream.file_type))
        size = " x ".join(map(str, shape[:2] if shape[2] == 1 else shape))
        say(f"{size} points of {np.linalg.norm(stream.plane.plane.affine[:3, 0]):.4g} mm in {path}")


def write_dicom(case: DicomCase, streams: Sequence[Stream], options: RenderOptions, say: Say) -> None:
    for note in case.series.notes:
        say(f"  note: {note}")
    if options.anonymous:
        say("  note: --anonymous leaves out attributes; what is burned into the pixels stays")
    if options.dicom:
        made = [(s.folder.with_suffix(".dcm"), s.volume) for s in streams if s.volume and s.share_of is None]
        image = next((one for one in made if not one[1].holds_masks), None)
        mask = next((one for one in made if one[1].holds_masks), None)
        labels = case.write_dense(image, mask)
        for path, volume in made:
            say(f"{len(volume.positions)} slices in {path}")
        if labels is not None:
            say(f"  segments: {labels.words()}")
    masks = next((stream.masks for stream in streams if stream.masks), None)
    if masks is not None:
        path = Path(options.model_path) / "render_seg.dcm"
        labels = case.write_masks(path, masks)
        say(f"masks on {len(masks.positions)} slices of {case.series.path} in {path}: {labels.words()}")


def write_sequence(
    renderer: Renderer, names: Sequence[str], kind: str, options: RenderOptions, say: Say
) -> None:
    """Write the video of the rendered images, up to the last frame."""
    assert options.video is not None
    folders = [out.folder for out in renderer.outputs]
    tables = [out.labels for out in renderer.outputs]
    shots = [
        Shot([folder / name for folder in folders], *divmod(k, options.interp), options.interp, tables)
        for k, name in enumerate(names[: (renderer.model.num_frames - 1) * options.interp + 1])
    ]
    geometry_file = Path(options.model_path) / FILE_NAME
    spacing = Geometry.load(geometry_file).spacing if geometry_file.exists() else None
    what = "both" if len(folders) > 1 else folders[0].name.removeprefix("render_")
    path = Path(options.model_path) / f"render_{what}.{kind}"
    write_video(path, shots, options.video, spacing[1] / spacing[0] if spacing else 1.0)
    say(f"{len(shots)} images, {len(shots) / options.video:.1f} s, in {path}")
    if kind == "gif" and options.video_format == "auto":
        say("  (pip install imageio-ffmpeg for MP4)")


def write_uncertainty(renderer: Renderer, options: RenderOptions, say: Say) -> None:
    """The expected absolute error of the images up to the last frame, as 16-bit images of the frames' full scale and,
    with --nifti, in the source's intensities; of masks, probabilities."""
    from viewer.case import Case
    from viewer.uncertainty import model_error

    error = model_error(Case.open(options, say=lambda _: None), say, options.quiet)
    last = renderer.model.num_frames - 1
    names = {
        k + i / options.interp: f"{k:05d}_{i}.png"
        for k in range(last + 1)
        for i in range(options.interp if k < last else 1)
    }
    grid = None
    if options.nifti:
        geometry = geometry_of(renderer, options, "--nifti")
        grid = Grid(geometry, (renderer.camera.width, renderer.camera.height), options.interp)
    positions = sorted({*names, *(grid.positions if grid else ())})
    step = views_at_once(renderer, len(positions), options.chunks)
    for number, out in enumerate(renderer.outputs):
        of_images = out.folder.name == "render_img"
        if not of_images and (out.labels is not None or not error.has_masks):
            say("masks have no expected error here: only one mask per frame has")
            continue
        folder = out.folder.with_name("uncertainty_img" if of_images else "uncertainty_mask")
        volume = None
        if grid is not None:
            low, high = grid.geometry.window if of_images else (0.0, 1.0)
            volume = RenderedVolume(grid, False, span=high - low)
        with atomic_folder(folder) as unfinished:
            for first in range(0, len(positions), step):
                some = positions[first : first + step]
                drawn = renderer(some)[number].clamp(0, 1)
                found = error.images(drawn, some) if of_images else error.masks(drawn, some)
                for position, image in zip(some, found.cpu().numpy(), strict=True):
                    if position in names:
                        write_image(unfinished / names[position], image.transpose(1, 2, 0), 16)
                    if volume is not None and position in volume.positions:
                        volume.put(volume.positions.index(position), image[0])
        say(f"expected absolute error as {len(names)} images in {folder}")
        if volume is not None:
            volume.write(folder.with_name(f"{folder.name}.nii.gz"))
            say(f"  and in {folder.name}.nii.gz")


def write_page(options: RenderOptions, say: Say) -> None:
    """The dense volume, its mask and its surface as one page."""
    from viewer.case import Case
    from viewer.pages import write_volume_page

    path = Path(options.model_path) / "render.html"
    write_volume_page(Case.open(options, say=say), path, options.interp if options.interp > 1 else None)
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, to open in a browser and to send")


def remove_older(folder: Path, names: set[str], extension: str) -> int:
    """Remove images of an earlier render that are not among ``names``: left between the new ones, they would make the
    sequence a mixture of two models."""
    older = [
        file
        for file in folder.iterdir()
        if re.fullmatch(r"\d{5,}_\d+", file.stem) and file.suffix == extension and file.name not in names
    ]
    for file in older:
        file.unlink()
    return len(older)


if __name__ == "__main__":
    run(main)
