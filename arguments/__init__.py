"""Every option and every number of a run: documented dataclass fields from which the command lines are made.

A field's metadata holds its help, its short flag, its choices, its range and where its number comes from, so
that a new option is one entry here. The namespace is flat: `TrainOptions` and `RenderOptions` inherit the
groups, which makes a `TrainOptions` an `OptimisationOptions` too, for functions that need no more than that.

    options = train_options()          # from sys.argv
    OptimisationOptions().lambda_l1    # the defaults, without a command line
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from utils.errors import ArgumentParser, UserError
from utils.files import atomic_write
from utils.images import MAX_PIXELS

if TYPE_CHECKING:
    import torch

# Where a number comes from; the command line's help explains the terms.
_KERBL = "3DGS"
_PAPER = "paper"
_RELEASE = "release"
_OURS = "ours"
AUTO = "auto"
"""The value of `start_checkpoint` that stands for the newest readable checkpoint of the output folder."""
_SOURCES = (
    "Where a number comes from: paper = MedGS, arXiv 2509.16806; release = the authors' released program, "
    "where the paper prints no value; 3DGS = 3D Gaussian Splatting, Kerbl et al. 2023."
)


def _option(
    default: Any,
    help: str,
    *,
    source: str = "",
    short: str | None = None,
    kind: type | None = None,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    saved: bool = False,
    bare: Any = None,
    also: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line option.

    The value's type is that of `default`, or `kind` where None is the default; a tuple holds whole numbers.
    `low` and `high` are inclusive bounds, `above` is an exclusive one. render.py takes `saved` options from
    `cfg_args` where the command line does not give them. `bare` is what the flag means without a value. `also` is a
    second flag for it.
    """
    kind = kind or type(default)
    return field(
        default=default,
        metadata={
            "help": help,
            "source": source,
            "short": short,
            "kind": kind,
            "choices": choices,
            "low": low,
            "high": high,
            "above": above,
            "saved": saved,
            "bare": bare,
            "also": also,
        },
    )


@dataclass(frozen=True)
class MachineOptions:
    """the machine"""

    device: str = _option(
        "auto", "where to compute: auto (a CUDA device if there is one), cuda, cuda:N or cpu"
    )
    rasterizer: str = _option(
        "compiled",
        "compiled kernels, or the dense PyTorch oracle (slow; for checking)",
        choices=("compiled", "oracle"),
    )
    quiet: bool = _option(False, "print warnings and errors only")
    debug: bool = _option(
        False, "add the traceback to errors, and stop at the first value that is not finite"
    )

    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    """Names of the options that the command line gave, as opposed to saved or default ones."""

    def __post_init__(self) -> None:
        for option in _options(type(self)):
            _check(option, getattr(self, option.name), f"--{option.name}")
        _check_device(self.device, "--device")


@dataclass(frozen=True)
class DataOptions:
    """the frames and the camera"""

    source_path: str = _option(
        "", "data root: its original/ holds the frames 0000.png, 0001.png, ...", short="s", saved=True
    )
    images: str = _option(
        "original",
        "the frames' folder under the data root; 'images', the default of other 3DGS "
        "programs, means original where there is no images/",
        short="i",
        saved=True,
    )
    resolution: int = _option(
        -1,
        "1, 2, 4, 8 divide the frames' size, any other number is a width in pixels, "
        "-1 keeps frames of up to 1600 px",
        short="r",
        source=_KERBL,
        saved=True,
    )
    white_background: bool = _option(
        False, "white instead of black behind transparent frames and splats", short="w", saved=True
    )
    distance: float = _option(
        1.0, "distance d of the camera from the plane of the frame", source=_RELEASE, above=0, saved=True
    )
    antialiasing: bool = _option(
        False,
        "lower the opacities of thin Gaussians, to compensate for the 0.3 px^2 that every Gaussian is widened by; "
        "render.py draws a model as it was trained",
        saved=True,
    )
    max_pixels: int = _option(
        MAX_PIXELS, "refuse image files of more pixels: a small file can claim any size", low=1, saved=True
    )

    @property
    def frames_folder(self) -> Path:
        """The folder that the frames are read from (see `folder_of`)."""
        return self.folder_of(self.source_path)

    def folder_of(self, root: str | os.PathLike[str]) -> Path:
        """The folder of frames under the data root `root`.

        3D Gaussian splatting programs call it `images` by default, so that stands in old `cfg_args`, although
        the frames of this method's layout lie in `original`.
        """
        folder = Path(root) / self.images
        return Path(root) / "original" if self.images == "images" and not folder.is_dir() else folder


@dataclass(frozen=True)
class ModelOptions:
    """the model"""

    poly_degree: int = _option(
        7,
        "degree P of the polynomial path of a Gaussian's centre in time (2 suits masks)",
        source=_PAPER,
        low=0,
        high=32,  # kMaxDegree in the operators' csrc/common/constants.h
    )
    sh_degree: int = _option(
        0, "degree of the spherical harmonics of a Gaussian's colour", source=_RELEASE, low=0, high=3
    )
    num_pts: int = _option(100_000, "number of Gaussians at the start", source=_RELEASE, low=1)
    start: str = _option(
        "random",
        "where they start: random, uniformly over the plane and in time, all grey; or frames, mostly on edges and "
        "contours of the frames, with the colours found there (scene/image_start.py)",
        choices=("random", "frames"),
        source=_RELEASE,
    )
    camera: str = _option(
        "mirror",
        "mirror: train on the frames and their left-right flipped copies; one: on the frames",
        choices=("mirror", "one"),
        source=_PAPER,
    )
    use_dff: bool = _option(False, "learn the frames' times")
    gs_type: str = _option("gs", "kind of Gaussians", choices=("gs",))


@dataclass(frozen=True)
class OptimisationOptions:
    """losses, rates and density control"""

    # Losses
    lambda_img: float = _option(1.0, "joint: weight of the image loss", source=_RELEASE, low=0)
    lambda_seg: float = _option(
        1.0, "joint: weight of the segmentation loss (2 or 3 works well)", source=_RELEASE, low=0
    )
    lambda_l1: float = _option(2.0, "img: weight of L1", source=_RELEASE, low=0)
    lambda_dssim: float = _option(0.25, "img: weight of 1 - SSIM", source=_RELEASE, low=0)
    lambda_ibfr: float = _option(
        0.5, "img: weight of in-between frame regularisation (IBFR)", source=_RELEASE, low=0
    )
    lambda_sigma: float = _option(0.25, "img: weight of the regularisation of sigma", source=_RELEASE, low=0)
    lambda_l1_seg: float = _option(
        2.0, "seg: weight of L1; a label map's cross-entropy gets a quarter of it", source=_RELEASE, low=0
    )
    lambda_sigma_seg: float = _option(
        0.5, "seg: weight of the regularisation of sigma", source=_RELEASE, low=0
    )
    sigma_until_iter: int = _option(20_000, "regularise sigma while iteration < this", source=_RELEASE, low=0)
    sigma_low_views: float = _option(
        2.0,
        "lower bound of sigma, divided by the number of training views (flipped copies count)",
        source=_RELEASE,
        low=0,
    )
    sigma_high: float = _option(1.0, "upper bound of sigma", source=_RELEASE, above=0)
    lambda_ibfr_dssim: float = _option(
        0.0, "img: weight of 1 - SSIM of in-between frames", source=_RELEASE, low=0
    )
    lambda_ibfr_seg: float = _option(0.0, "seg: weight of IBFR", source=_RELEASE, low=0)
    ibfr_target: str = _option(
        "linear",
        "what IBFR expects between two frames: their linear blend, or a prediction from their motion and from "
        "how the anatomy looks from the side (in_between/prediction.py)",
        choices=("linear", "motion"),
        source=_PAPER,
    )
    ibfr_from_iter: int = _option(10_000, "IBFR while iteration >= this", source=_PAPER, low=0)
    ibfr_skip: int = _option(
        0, "leave IBFR out of the first of every N iterations (0: never)", source=_OURS, low=0
    )
    ibfr_alpha_min: float = _option(
        0.2, "IBFR: lowest position between two frames", source=_PAPER, low=0, high=1
    )
    ibfr_alpha_max: float = _option(
        0.8, "IBFR: highest position between two frames", source=_PAPER, low=0, high=1
    )

    # Batches
    batch_size: int = _option(3, "neighbouring frames rendered per iteration", source=_PAPER, low=1)
    random_background: bool = _option(False, "a random background behind transparent frames")

    # Rates of Adam
    extent_per_distance: float = _option(
        1.1, "scene extent E divided by the distance d", source=_RELEASE, above=0
    )
    position_lr_init: float = _option(
        1.6e-4, "rate of xyz at the start, relative to E", source=_KERBL, above=0
    )
    position_lr_final: float = _option(
        1.6e-6, "rate of xyz at the end of its log-linear decay, relative to E", source=_KERBL, above=0
    )
    position_lr_max_steps: int = _option(30_000, "iterations of that decay", source=_KERBL, low=1)
    feature_lr: float = _option(2.5e-3, "rate of f_dc", source=_KERBL, low=0)
    feature_rest_divisor: float = _option(
        20.0, "the rate of f_rest is feature_lr divided by this", source=_KERBL, above=0
    )
    opacity_lr: float = _option(2.5e-2, "rate of opacity", source=_KERBL, low=0)
    scaling_lr: float = _option(5e-3, "rate of scaling", source=_KERBL, low=0)
    rotation_lr: float = _option(1e-3, "rate of rotation", source=_KERBL, low=0)
    m_lr: float = _option(1e-3, "rate of m, the centre in time", source=_RELEASE, low=0)
    sigma_lr: float = _option(1e-3, "rate of sigma, the spread in time", source=_RELEASE, low=0)
    w1_lr: float = _option(1e-3, "rate of w1, the polynomial path", source=_RELEASE, low=0)
    time_func_lr: float = _option(1e-3, "rate of the frames' times, with --use_dff", source=_RELEASE, low=0)
    seg_head_lr: float = _option(
        2.5e-3, "rate of the segmentation head, with --seg_head_only", source=_RELEASE, low=0
    )
    adam_eps: float = _option(1e-15, "epsilon of Adam", source=_KERBL, low=0)
    sh_degree_interval: int = _option(
        1000, "iterations between two degrees of the harmonics coming into use", source=_KERBL, low=1
    )

    # Density control
    densification_interval: int = _option(100, "iterations between two density steps", source=_KERBL, low=1)
    densify_from_iter: int = _option(
        500,
        "density steps while iteration > this; with a white background, the opacities "
        "are reset at this one too",
        source=_KERBL,
        low=0,
    )
    densify_until_iter: int = _option(
        20_000, "density control while iteration < this", source=_RELEASE, low=0
    )
    densify_grad_threshold: float = _option(
        2e-4,
        "clone or split where the mean gradient reaches this (of the position, in NDC units, or of m)",
        source=_KERBL,
        low=0,
    )
    percent_dense: float = _option(
        0.01, "split Gaussians of a scale above this times E, clone the others", source=_KERBL, low=0
    )
    split_sigma: float = _option(
        1.0,
        "where the gradient of m is high: split from this sigma up, clone up to it",
        source=_RELEASE,
        above=0,
    )
    split_children: int = _option(
        2, "number of Gaussians that replace one that is split", source=_KERBL, low=1
    )
    split_shrink: float = _option(1.6, "a split divides the scales by this", source=_KERBL, above=0)
    prune_opacity: float = _option(0.01, "prune Gaussians of lower opacity", source=_RELEASE, low=0, high=1)
    prune_scale: float = _option(
        0.11, "prune Gaussians of larger scale, in plane units", source=_RELEASE, above=0
    )
    prune_scale_from_iter: int = _option(3000, "prune by scale once iteration > this", source=_KERBL, low=0)
    max_gaussians: int = _option(
        0,
        "upper bound on the number of Gaussians; 0: as many as half of the free memory is likely to hold",
        low=0,
    )
    opacity_reset_interval: int = _option(
        3000, "iterations between two resets of the opacities", source=_KERBL, low=1
    )
    opacity_reset_value: float = _option(
        0.01, "a reset lowers the opacities to this", source=_KERBL, above=0, high=0.99
    )
    average_from_iter: int = _option(
        0,
        "score, save and render running averages of the parameters, which start with the update of this iteration "
        "and start over after a density step or a reset of the opacities (0: never)",
        source=_RELEASE,
        low=0,
    )
    average_decay: float = _option(
        0.998, "share of a running average that is kept in each iteration", source=_OURS, low=0, high=1
    )


@dataclass(frozen=True)
class RunOptions:
    """the run"""

    preset: str = _option(
        "published",
        "defaults of the other options: the paper's (published); for the best frames in between (best); nearly as "
        "good, in a fifth of the iterations (fast); or a useful result in minutes on a CPU (quick)",
        choices=("published", "best", "fast", "quick"),
    )
    model_path: str = _option("", "output folder (default: a fresh one under ./output/)", short="m")
    pipeline: str = _option("img", "which losses apply", choices=("img", "seg", "joint"))
    seg_source_path: str | None = _option(
        None, "joint: data root of the masks, with the same frames", kind=str
    )
    slice_thickness: str = _option(
        "",
        "of a frame, in mm (in distances between frames where those are unknown in mm), or header, for what the DICOM "
        "files say: frames are then drawn as means over it, while in-between frames and renders stay thin; nothing: "
        "frames are taken for thin cuts",
        source=_OURS,
    )
    seg_head_only: bool = _option(
        False, "with --pipeline seg and --start_checkpoint: train the segmentation head alone"
    )
    start_checkpoint: str | None = _option(
        None,
        "resume from this chkpnt<n>.pth, or with auto from the newest readable one in the output folder, if there "
        "is one; joint from an image-only one: take its weights, add a segmentation head, start at 0",
        kind=str,
    )
    eval: bool = _option(
        False,
        "hold out every --eval_every-th frame and report scores on them; not needed where the data root has "
        "heldout/ (prepare.py --keep_every)",
    )
    eval_every: int = _option(
        8, "--eval: the last of each N frames is held out, but never the last of all", source=_KERBL, low=2
    )
    iterations: int = _option(30_000, "iterations to train", source=_KERBL, low=1)
    time: float | None = _option(
        None,
        "minutes that the whole run may take: as many iterations as fit, and a schedule that stretches to them",
        kind=float,
        above=0,
    )
    scale_schedule: bool = _option(
        False,
        "with --preset published: scale every iteration at which something begins or ends with --iterations, as the "
        "other presets do",
    )
    test_iterations: tuple[int, ...] = _option(
        (5000, 10_000, 15_000, 20_000, 25_000, 30_000, 40_000, 100_000), "evaluate at these iterations"
    )
    save_iterations: tuple[int, ...] = _option(
        (30_000,), "save the point cloud at these iterations and the last"
    )
    checkpoint_iterations: tuple[int, ...] = _option((), "save a checkpoint at these iterations and the last")
    checkpoint_interval: int = _option(0, "also save a checkpoint every N iterations; 0: off", low=0)
    keep_checkpoints: int = _option(
        0, "keep only the newest N checkpoints in the output folder; 0: all", low=0
    )
    report: bool = _option(
        False,
        "end with report.html in the output folder: scores, pictures, the volume and the mesh in one file",
    )
    save_xyz: bool = _option(
        False, "save the centres, xyz/<iteration>.pt, at 1, 5001, 10001, ... and the last"
    )
    seed: int = _option(0, "seed of all random numbers", source=_KERBL, low=0, high=2**63 - 1)
    data_device: str = _option(
        "auto", "where the frames are kept: auto (with the computation), cuda, cuda:N or cpu"
    )
    deterministic: bool = _option(
        False, "bit-identical results in every run on a GPU, at some cost (results on a CPU always are)"
    )
    debug_from: int = _option(-1, "turn --debug on at this iteration", low=-1)
    detect_anomaly: bool = _option(
        False, "PyTorch's anomaly detection: where a NaN in a gradient comes from (slow)"
    )


@dataclass(frozen=True)
class TrainOptions(MachineOptions, OptimisationOptions, ModelOptions, DataOptions, RunOptions):
    """Everything that train.py can be told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_device(self.data_device, "--data_device")
        _check_resolution(self.resolution)
        if not self.source_path:
            raise UserError("no data root: give -s ROOT, where ROOT/original/ holds the frames")
        if self.pipeline == "joint" and not self.seg_source_path:
            raise UserError("--pipeline joint needs the masks too: give --seg_source_path ROOT")
        if self.start_checkpoint == AUTO and not self.model_path:
            raise UserError("--start_checkpoint auto looks in the output folder: give that too, -m FOLDER")
        sized = (
            self.preset != "published" and "num_pts" not in self.given
        )  # sized by the data later, within the bound
        if self.max_gaussians and self.num_pts > self.max_gaussians and not sized:
            raise UserError(
                f"--num_pts {self.num_pts} starts with more Gaussians than --max_gaussians {self.max_gaussians} allows"
            )
        if self.seg_head_only and (self.pipeline != "seg" or not self.start_checkpoint):
            raise UserError(
                "--seg_head_only trains an existing model's head: add --pipeline seg --start_checkpoint FILE"
            )
        if self.ibfr_skip == 1:
            raise UserError(
                "--ibfr_skip 1 leaves IBFR out of every iteration: give 2 or more, or 0 for all with it"
            )
        if self.ibfr_alpha_min > self.ibfr_alpha_max:
            raise UserError("--ibfr_alpha_min is above --ibfr_alpha_max: swap them")


@dataclass(frozen=True)
class RenderOptions(MachineOptions, DataOptions):
    """what to render"""

    model_path: str = _option("", "the trained model's folder", short="m")
    iteration: int = _option(-1, "chkpnt<iteration>.pth is rendered; -1: the newest", low=-1)
    interp: int = _option(1, "images per frame: n - 1 between each frame and the next", low=1)
    beyond: bool = _option(False, "also the n - 1 images after the last frame, which are extrapolated")
    pipeline: str = _option(
        "img", "img: render_img/; seg: render_mask/; both", choices=("img", "seg", "both")
    )
    chunks: int = _option(
        1,
        "render in at least that many slices of the sequence: more take less memory, and give the same files",
        low=1,
    )
    extension: str = _option(".png", "of the image files")
    nifti: bool = _option(
        False,
        "also write the rendered sequence as render_img.nii.gz, render_mask.nii.gz: in the source's intensities "
        "and position",
    )
    probabilities: bool = _option(
        False,
        "of a label map, also write each label's share of every pixel: render_probabilities/<label>/, and with --nifti "
        "render_probabilities/<label>.nii.gz",
    )
    dicom: bool = _option(
        False,
        "also write the rendered sequence as DICOM files of many frames, derived from the source series: "
        "render_img.dcm and, as segmentation, render_mask.dcm",
    )
    dicom_seg: str | None = _option(
        None,
        "also write the masks on the source series' own slices as a DICOM segmentation, render_seg.dcm; TEXT names the "
        "structure (default: mask; label maps have their own names)",
        kind=str,
        bare="mask",
        also="--dicom-seg",
    )
    dicom_source: str | None = _option(
        None,
        "--dicom, --dicom-seg: folder of the source series (default: where prepare.py found it)",
        kind=str,
    )
    anonymous: bool = _option(
        False, "--dicom, --dicom-seg: leave out the patient's and the study's names, numbers and dates"
    )
    plane: str | None = _option(
        None,
        "also write a plane across the frames, render_plane_img.png and .nii.gz: nine numbers in RAS millimetres, a "
        "point and the directions to the right and down, such as '0,-20,35 1,0,0 0,0,-1'; or isotropic: the volume "
        "with cubic voxels",
        kind=str,
    )
    plane_spacing: float | None = _option(
        None,
        "--plane: millimetres between its points (default: the frames' smaller pixel side)",
        kind=float,
        above=0,
    )
    uncertainty: bool = _option(
        False,
        "also write the expected absolute error of every pixel, calibrated on the frames that the model was trained "
        "on: uncertainty_img/ and, of a mask, its probability to be wrong, uncertainty_mask/; with --nifti as volumes "
        "too",
    )
    html: bool = _option(
        False,
        "also write the sequence as render.html: three planes and 3-D with mask and mesh, in one file that opens in a "
        "browser",
    )
    video: float | None = _option(
        None,
        "also write it as a video of X frames per second (15 if X is left out): MP4, or GIF if imageio-ffmpeg is "
        "not installed",
        kind=float,
        above=0,
        high=1000,
        bare=15.0,
    )
    video_format: str = _option(
        "auto", "kind of video; mp4 needs imageio-ffmpeg", choices=("auto", "mp4", "gif")
    )
    poly_degree: int | None = _option(
        None, "the model's P (default: the checkpoint's, which it must equal)", kind=int, low=0
    )
    modify: str | None = _option(
        None,
        "FILE.py:FUNCTION, called as f(means (N,3), scales (N,3), quaternions wxyz (N,4), t) on the "
        "Gaussians at time t; the three that it returns are drawn",
        kind=str,
    )
    generate_points_path: str | None = _option(
        None,
        "folder to save the active centres of every frame in: means3Dmasked/00000.pt, (M, 3) in plane units",
        kind=str,
    )
    mask_path: str | None = _option(
        None, "folder of such points: draw only Gaussians close to them", kind=str
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_resolution(self.resolution)
        if not self.model_path:
            raise UserError("no model: give -m FOLDER, the folder that train.py wrote")
        if not re.fullmatch(r"\.\w+", self.extension):
            raise UserError(f"--extension {self.extension}: give a dot and a file type, like .png")
        if self.modify is not None and not re.fullmatch(r".+\.py:[A-Za-z_]\w*", self.modify):
            raise UserError(f"--modify {self.modify}: give FILE.py:FUNCTION")


Options = TypeVar("Options", TrainOptions, RenderOptions)

IGNORED: dict[str, Any] = {
    "depths": "",
    "train_test_exp": False,
    "convert_SHs_python": False,
    "compute_cov3D_python": False,
    "optimizer_type": "default",
    "position_lr_delay_mult": 0.01,
    "prune_non_used_gaussians_interval": 0,
    "exposure_lr_init": 0.01,
    "exposure_lr_final": 0.001,
    "exposure_lr_delay_steps": 0,
    "exposure_lr_delay_mult": 0.0,
    "depth_l1_weight_init": 1.0,
    "depth_l1_weight_final": 0.01,
    "ip": "127.0.0.1",
    "port": 6009,
    "disable_viewer": False,
}
"""Options of published command lines that cannot mean anything here: there are no depth maps, exposures,
or viewers. Their values stand in `cfg_args`, where the published reader looks for them."""

_IGNORED_BY_RENDER = (
    "skip_train",
    "skip_test",
    "eval",
    "sh_degree",
    "num_pts",
    "camera",
    "start",
    "use_dff",
    "gs_type",
    "data_device",
)
_SHORT_IGNORED = {"depths": "d"}


_IN_BETWEEN = {
    "start": "frames",
    "poly_degree": 2,
    "ibfr_target": "motion",
    "ibfr_from_iter": 1,
    "lambda_ibfr_seg": 2.0,
}
_FAST = _IN_BETWEEN | {
    "opacity_reset_interval": 100_000,
    "lambda_ibfr": 5.0,
    "lambda_ibfr_dssim": 0.6,
    "ibfr_alpha_min": 0.0,
    "ibfr_alpha_max": 1.0,
    "average_decay": 0.99,
    # More frames per iteration, each with a smaller share of the loss; and twice the rates.
    "batch_size": 9,
    "position_lr_init": 3.2e-4,
    "feature_lr": 5e-3,
    "scaling_lr": 1e-2,
    "rotation_lr": 2e-3,
    "m_lr": 2e-3,
    "sigma_lr": 2e-3,
    "w1_lr": 2e-3,
}
PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "best": _IN_BETWEEN
    | {
        "iterations": 6000,
        "position_lr_max_steps": 6000,
        "densify_from_iter": 100,
        "densify_until_iter": 4000,
        "sigma_until_iter": 4000,
        "lambda_ibfr": 3.5,
        "lambda_ibfr_dssim": 0.4,
        "ibfr_skip": 3,
        "sigma_low_views": 0.5,
        "densify_grad_threshold": 1.7e-4,
        "average_from_iter": 5400,
        "average_decay": 0.995,
    },
    "fast": _FAST
    | {
        "iterations": 1200,
        "position_lr_max_steps": 1200,
        "densify_from_iter": 200,
        "densify_until_iter": 800,
        "sigma_until_iter": 800,
        "average_from_iter": 1000,
        "densify_grad_threshold": 2e-4,
    },
    "quick": _FAST
    | {
        "camera": "one",
        "iterations": 720,
        "position_lr_max_steps": 720,
        "densify_until_iter": 0,  # all Gaussians from the start: new ones would have too little time to learn
        "sigma_until_iter": 480,
        "average_from_iter": 600,
    },
}
"""Defaults of --preset other than the fields' own; chosen by held-out frames (benchmarks/README.md). Sizes and
schedules follow the data and --iterations (training/schedule.py)."""


# ---- command line -> options -------------------------------------------------------------------------------


def train_parser() -> argparse.ArgumentParser:
    """The command line of train.py. Its namespace holds only what was given; `merge` adds the defaults."""
    parser = _parser(TrainOptions, "Train a model on a sequence of frames, on masks, or on both.")
    _add_ignored(parser, IGNORED)
    return parser


def render_parser() -> argparse.ArgumentParser:
    """The command line of render.py. Its namespace holds only what was given; `merge` adds the rest."""
    parser = _parser(RenderOptions, "Render the frames of a trained model, and frames between them.")
    _add_ignored(parser, (*IGNORED, *_IGNORED_BY_RENDER))
    return parser


def train_options(arguments: Sequence[str] | None = None) -> TrainOptions:
    """The options of train.py from the command line (`sys.argv` if None), checked. Raises `UserError`."""
    given = _parse(train_parser(), arguments)
    options = merge(TrainOptions, given, preset=PRESETS[given.get("preset", "published")])
    return options if options.model_path else replace(options, model_path=f"output/{uuid.uuid4().hex[:10]}")


def render_options(arguments: Sequence[str] | None = None) -> RenderOptions:
    """The options of render.py: those of the command line, then of the model's `cfg_args`, then the defaults.

    Raises `UserError`, also where there is a `cfg_args` that cannot be read; without one, the defaults serve.
    """
    return model_options(_parse(render_parser(), arguments))


def model_options(given: Mapping[str, Any]) -> RenderOptions:
    """The same for any program that draws a trained model; given: name -> value, as its command line had it."""
    path = Path(given.get("model_path", "")) / "cfg_args"
    saved = read_cfg_args(path) if given.get("model_path") and path.exists() else {}
    return merge(RenderOptions, given, saved, str(path))


def merge(
    kind: type[Options],
    given: Mapping[str, Any],
    saved: Mapping[str, Any] | None = None,
    saved_in: str = "cfg_args",
    preset: Mapping[str, Any] | None = None,
) -> Options:
    """Options of `kind`: what the command line gave, else what was saved with the run, else the preset's default.

    given: name -> value, as explicitly given (`vars` of a parser's namespace).
    saved: name -> value, as read from the file `saved_in`; only what describes the data is taken from it.
    """
    options = {option.name: option for option in _options(kind)}
    values: dict[str, Any] = dict(preset or {})
    for name, value in (saved or {}).items():
        if name in options and options[name].metadata["saved"] and value is not None:
            values[name] = _check(options[name], value, f"{saved_in}: {name}")
            if name == "resolution":
                _check_resolution(value, f"{saved_in}: {name}")
    values.update({name: value for name, value in given.items() if name in options})
    return kind(**values, given=frozenset(given) & frozenset(options))


def resolve_device(name: str) -> torch.device:
    """auto, cuda, cuda:N or cpu -> the device. Raises `UserError` where CUDA is asked for and not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            raise UserError(
                f"device {name}: PyTorch sees {count} CUDA devices here; take another, or --device cpu"
            )
    return device


# ---- options <-> cfg_args ----------------------------------------------------------------------------------


def write_cfg_args(path: str | os.PathLike[str], options: TrainOptions) -> None:
    """Write the options to `path` as the text `Namespace(key=literal, ...)`, with absolute data roots."""
    values = {option.name: getattr(options, option.name) for option in _options(type(options))}
    for name in ("source_path", "seg_source_path"):
        if values[name]:
            values[name] = os.path.abspath(values[name])
    values = {**IGNORED, **values}
    literals = (
        f"{name}={list(value) if isinstance(value, tuple) else value!r}" for name, value in values.items()
    )
    with atomic_write(path) as temporary:
        temporary.write_text(f"Namespace({', '.join(literals)})", encoding="utf-8")


def read_cfg_args(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the text `Namespace(key=literal, ...)` at `path`. Nothing in it is ever executed.

    Raises `UserError` where it is anything else: an expression that needs evaluating, or not text at all.
    """
    refusal = UserError(
        f"{path} is not Namespace(key=literal, ...): it is refused, and never executed; "
        "restore the file, or remove it and give the options on the command line"
    )
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(1_000_000)
        call = ast.parse(text.strip(), mode="eval").body
        if (
            not isinstance(call, ast.Call)
            or not isinstance(call.func, ast.Name)
            or call.func.id != "Namespace"
            or call.args
        ):
            raise refusal
        values = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise refusal
            values[keyword.arg] = ast.literal_eval(keyword.value)
        return values
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise refusal from error


# ---- how fields become arguments ---------------------------------------------------------------------------


def _options(kind: type) -> Iterator[Field[Any]]:
    return (option for option in fields(kind) if option.metadata)


def _parser(kind: type, description: str) -> argparse.ArgumentParser:
    """A parser of all options of `kind`, in one help group for each of the classes that it is made of."""
    parser = ArgumentParser(description=description, epilog=_SOURCES, argument_default=argparse.SUPPRESS)
    seen: set[str] = set()
    for base in reversed(kind.__mro__[:-1]):
        new = [option for option in _options(base) if option.name not in seen]
        group = parser.add_argument_group((base.__doc__ or "").strip())
        for option in new:
            _add_option(group, option)
        seen.update(option.name for option in new)
    return parser


def _add_option(group: argparse._ArgumentGroup, option: Field[Any]) -> None:
    about = option.metadata
    kind = about["kind"]
    flags = [f"-{about['short']}"] if about["short"] else []
    source = f", {about['source']}" if about["source"] else ""
    hidden = kind is bool or option.default in (None, "", ())
    text = about["help"] + ("" if hidden else f" (default: {_shown(option.default)}{source})")
    arguments: dict[str, Any] = {"help": text.replace("%", "%%"), "choices": about["choices"]}
    if kind is bool:
        arguments.update(nargs="?", const=True, type=_boolean, metavar="BOOL")
    elif kind is tuple:
        arguments.update(nargs="*", type=int, metavar="N", action=_StoreTuple)
    elif not about["choices"]:
        arguments.update(type=kind, metavar={int: "N", float: "X", str: "TEXT"}[kind])
        if about["bare"] is not None:
            arguments.update(nargs="?", const=about["bare"])
    flags.append(f"--{option.name}")
    group.add_argument(*flags, *filter(None, [about["also"]]), dest=option.name, **arguments)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _boolean(text: str) -> bool:
    """True or False in words; `bool("False")` would be True."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


class _StoreTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


class _Ignore(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.ignored = [*getattr(namespace, "ignored", []), option_string]


def _add_ignored(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    for name in names:
        short = [f"-{_SHORT_IGNORED[name]}"] if name in _SHORT_IGNORED else []
        parser.add_argument(*short, f"--{name}", nargs="*", action=_Ignore, help=argparse.SUPPRESS)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """What was given, name -> value; says on stderr which options were ignored."""
    given = vars(parser.parse_args(arguments))
    if ignored := given.pop("ignored", None):
        print(f"ignored: {', '.join(dict.fromkeys(ignored))} (no meaning in this program)", file=sys.stderr)
    return given


# ---- checks ------------------------------------------------------------------------------------------------


def _check(option: Field[Any], value: Any, name: str) -> Any:
    """`value` if it suits `option`; else a `UserError` that calls it `name`."""
    about = option.metadata
    kind = about["kind"]
    if value is None and option.default is None:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name} is {value!r}: give a {kind.__name__}")
    if about["choices"] and value not in about["choices"]:
        raise UserError(f"{name} is {value!r}: choose from {', '.join(about['choices'])}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} is {value}: give a finite number")
    for bound, holds, words in (
        (about["low"], lambda b: value >= b, "of at least"),
        (about["high"], lambda b: value <= b, "of at most"),
        (about["above"], lambda b: value > b, "above"),
    ):
        if bound is not None and not holds(bound):
            raise UserError(f"{name} is {value}: give a number {words} {bound}")
    return value


def _check_device(name: str, flag: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"{flag} {name}: choose from auto, cuda, cuda:N, cpu")


def _check_resolution(resolution: int, name: str = "--resolution") -> None:
    if resolution != -1 and resolution < 1:
        raise UserError(f"{name} is {resolution}: give -1, a divisor (1, 2, 4, 8) or a width in pixels")
