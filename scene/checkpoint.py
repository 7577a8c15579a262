"""Checkpoints `chkpnt<n>.pth`: the published format, read without executing anything in it, and written so
that either program reads the other's files. What else an exact resume needs goes under one key of our own.

The file is `torch.save((state, n))`. Published programs read all keys of `state` except `medgs`, which is ours:
    channels      C of the model. Published colours have three; grey ones of ours are repeated for the file.
    labels        id, name and colour of each label, where the last head shows a label map. Its colours are stored as
                  they are, a channel per label; published programs have no such head.
    statistics    m_gradient_accum, m_denom
    moments       index -> exp_avg, exp_avg_sq of grey colours, exactly
    extras        what the run keeps beside: see `_EXTRAS`
"""

from __future__ import annotations

import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from patient.labels import LabelTable
from scene import compact
from scene.parameters import COLOURS, IMAGE, PARAMETERS, SEGMENTATION, SEGMENTATION_HEAD
from utils.errors import UserError
from utils.files import atomic_write

# Parameter -> key and shape in the file. N is the number of Gaussians.
_PARAMS: dict[str, tuple[str, tuple[int | str, ...]]] = {
    name: (parameter.key, ("N", *parameter.shape)) for name, parameter in PARAMETERS.items()
}
_STATISTICS: dict[str, tuple[int | str, ...]] = {
    "max_radii2D": ("N",),
    "xyz_gradient_accum": ("N", 1),
    "denom": ("N", 1),
}
_OUR_STATISTICS: dict[str, tuple[int | str, ...]] = {"m_gradient_accum": ("N", 1), "m_denom": ("N", 1)}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_COMPACT = "medgs_compact"  # the key that marks a compact model
_KEPT = (
    "width",
    "height",
    "distance",
    "bits",
    "numbers",
    "background",
    "options",
)  # extras of a compact model
_EXTRAS: dict[str, type | tuple[type, ...]] = {
    "width": int,  # of the frames, px, and so
    "height": int,
    "distance": (int, float),  # of the camera, plane units
    "bits": int,  # of the frames
    "numbers": list,  # of the frames, as in their names
    "pixels": str,  # a digest of the frames' levels
    "options": dict,  # of the run, by name
    "background": Tensor,  # (C,)
    "random": Tensor,  # state of the generator that all random numbers come from
    "trained": dict,  # parameter -> what training goes on with, where `params` are running averages
    "gradients": dict,  # parameter -> gradient; the iteration's update is to come (see `Training.save_checkpoint`)
}


@dataclass(eq=False)
class Checkpoint:
    """The full state of a run, in an iteration before its update. Where ``extras`` has "trained", ``params`` and
    ``time_func`` are running averages, and ``optimizer`` belongs to what is trained.

    params: raw values by name, float32, as in `scene.parameters`; C is 1 (grey) or 3, or the number of labels.
    time_func: (K,) durations of the frames, or (K - 1, 1) logits of learned ones (DFF).
    spatial_lr_scale: the scene extent E that xyz's rate is scaled by.
    statistics: max_radii2D (N,), xyz_gradient_accum, denom, m_gradient_accum, m_denom (N, 1), where kept.
    optimizer: state_dict in the layout of torch.optim.Adam with named groups, each of the parameter of its
        name (or the group seg_head of opacity_seg, f_dc_seg, f_rest_seg); None for none.
    extras: plain values and tensors that published files know nothing of, named in `_EXTRAS`; empty for those.
    """

    iteration: int
    params: dict[str, Tensor]
    time_func: Tensor
    active_sh_degree: int
    spatial_lr_scale: float
    statistics: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    labels: LabelTable | None = None
    """Of the label map that the last head shows, a channel for each."""

    def to(self, device: torch.device | str) -> Checkpoint:
        """The same checkpoint with params, time_func and statistics on ``device``."""
        self.time_func = self.time_func.to(device)
        for tensors in (self.params, self.statistics):
            tensors.update({name: tensor.to(device) for name, tensor in tensors.items()})
        return self

    @property
    def uses_dff(self) -> bool:
        return self.time_func.ndim == 2

    @property
    def num_frames(self) -> int:
        """K."""
        return self.time_func.shape[0] + self.uses_dff

    @property
    def poly_degree(self) -> int:
        """P."""
        return self.params["w1"].shape[1] // 2

    @property
    def sh_degree(self) -> int:
        """D."""
        return math.isqrt(self.params["f_rest"].shape[1] + 1) - 1

    @property
    def channels(self) -> int:
        """C of the image head: 1 for grey, 3 for colour, one per label where it shows a label map."""
        return self.params["f_dc"].shape[2]

    @property
    def antialiasing(self) -> bool | None:
        """Whether it was trained with antialiasing; None where the file does not say."""
        known: bool | None = self.extras.get("options", {}).get("antialiasing")
        return known

    @property
    def has_seg_head(self) -> bool:
        return "opacity_seg" in self.params


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path` in the published format. The file is complete or not there."""
    params = checkpoint.params
    in_threes = COLOURS - label_colours(
        params, checkpoint.labels
    )  # of which published files have three channels
    state: dict[str, Any] = {
        "version": 2,
        "active_sh_degree": int(checkpoint.active_sh_degree),
        "spatial_lr_scale": float(checkpoint.spatial_lr_scale),
        "polynomial_degree": checkpoint.poly_degree,
        # Learned times are a parameter; fixed ones would only gather gradients.
        "time_func": _own(checkpoint.time_func, as_parameter=checkpoint.uses_dff),
    }
    for name, (key, _) in _PARAMS.items():
        if name not in params:
            state[key] = torch.empty(0)
        else:
            # Plain tensors would stay frozen in the published program.
            state[key] = _own(
                _in_colour(params[name]) if name in in_threes else params[name], as_parameter=True
            )

    num_points, device = params["xyz"].shape[0], params["xyz"].device
    for name, shape in _STATISTICS.items():
        zeros = torch.zeros([num_points, *shape[1:]], device=device)  # type: ignore[list-item]
        state[name] = _own(checkpoint.statistics.get(name, zeros))

    optimizer = _plain(checkpoint.optimizer)
    moments: dict[int, dict[str, Tensor]] = {}
    if optimizer is not None and checkpoint.channels == 1:
        for index, name in _indexed_params(optimizer):
            entry = optimizer["state"].get(index)
            if entry and name in in_threes:
                moments[index] = {key: entry[key] for key in _MOMENTS}
                # The loss averages over channels, so each of three equal ones gets a third of the gradient.
                entry["exp_avg"] = _own(_in_colour(entry["exp_avg"] / 3))
                entry["exp_avg_sq"] = _own(_in_colour(entry["exp_avg_sq"] / 9))
    state["optimizer_state"] = optimizer
    state["medgs"] = {
        "channels": checkpoint.channels,
        **({} if checkpoint.labels is None else {"labels": checkpoint.labels.to_json()}),
        "statistics": {k: _own(v) for k, v in checkpoint.statistics.items() if k in _OUR_STATISTICS},
        "moments": moments,
        "extras": _plain(checkpoint.extras),
    }
    # Through a Python file object, so that a full disk raises the system's error.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save((state, int(checkpoint.iteration)), file)


def save_compact(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write what is needed to draw ``checkpoint``, and nothing that only training needs. `load_checkpoint` reads it
    like any checkpoint; other programs find none of their keys in it. The file is complete or not there."""
    state = {
        _COMPACT: 1,
        "iteration": checkpoint.iteration,
        "active_sh_degree": checkpoint.active_sh_degree,
        "spatial_lr_scale": checkpoint.spatial_lr_scale,
        "time_func": checkpoint.time_func.detach().float().cpu().clone(),
        "labels": None if checkpoint.labels is None else checkpoint.labels.to_json(),
        "extras": _plain({name: checkpoint.extras[name] for name in _KEPT if name in checkpoint.extras}),
        **compact.pack(checkpoint.params),
    }
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def _read_compact(path: str | os.PathLike[str], state: dict[str, Any]) -> Checkpoint:
    try:
        if state[_COMPACT] != 1:
            raise ValueError(f"version {state[_COMPACT]}")
        return Checkpoint(
            int(state["iteration"]),
            compact.unpack(state),
            state["time_func"],
            int(state["active_sh_degree"]),
            float(state["spatial_lr_scale"]),
            extras=dict(state["extras"]),
            labels=None if state.get("labels") is None else LabelTable.from_json(state["labels"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is a damaged compact model ({error}): export it again") from error


def load_checkpoint(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> Checkpoint:
    """Read `chkpnt<n>.pth`, ours or a published one, without executing anything in it.

    map_location: where params, time_func and statistics go. The optimizer's state stays on the CPU, as optimizers
    move what they load, and so do the extras, as random states belong there.

    Published models whose three channels are equal everywhere become grey, C = 1. Raises `UserError` for a
    file that is missing, damaged, of another kind, or asks for code, and names the key at fault.
    """
    contents = _load(path)
    if isinstance(contents, dict) and _COMPACT in contents:
        return _read_compact(path, contents).to(map_location)
    if not isinstance(contents, (tuple, list)) or len(contents) != 2:
        raise UserError(f"{path} is not a checkpoint of this program: it is not a pair (state, iteration)")
    state, iteration = contents
    if isinstance(state, (tuple, list)):
        raise UserError(
            f"{path} is a checkpoint of the older format, a tuple of {len(state)}, which leaves out the "
            "parameters of time (m, sigma, w1, time_func): nothing can be rendered from it, train again"
        )
    if not isinstance(state, dict) or type(iteration) is not int or iteration < 0:
        raise UserError(f"{path} is not a checkpoint of this program: it is not a pair (state, iteration)")
    return _Reader(path, state).checkpoint(iteration).to(map_location)


def newest(model_path: str | os.PathLike[str]) -> Path:
    """The checkpoint of `model_path` with the highest iteration. Raises `UserError` where there is none."""
    return find(model_path, -1)


def find(model_path: str | os.PathLike[str], iteration: int) -> Path:
    """`chkpnt<iteration>.pth` of `model_path`, for -1 the newest. Raises `UserError` listing the others."""
    folder = Path(model_path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one that train.py wrote (-m)")
    found = all_of(folder)
    if not found:
        raise UserError(
            f"{folder} holds no checkpoint chkpnt<n>.pth: train the model first, or give another -m"
        )
    if iteration == -1:
        return found[max(found)]
    if iteration not in found:
        there = ", ".join(map(str, sorted(found)))
        raise UserError(f"{folder} holds no chkpnt{iteration}.pth: there are iterations {there}")
    return found[iteration]


def all_of(folder: Path) -> dict[int, Path]:
    """The checkpoints of `folder` by iteration, ascending; none where there is no such folder."""
    found = {
        int(match[1]): file
        for file in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"chkpnt(\d+)\.pth", file.name)) and file.is_file()
    }
    return dict(sorted(found.items()))


def newest_readable(folder: Path, map_location: torch.device | str) -> tuple[Path, Checkpoint] | None:
    """The readable checkpoint of `folder` with the highest iteration, or None where none can be read. Says on
    stderr why it passes over others."""
    for path in reversed(all_of(folder).values()):
        try:
            return path, load_checkpoint(path, map_location)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
    return None


def as_grey(params: dict[str, Tensor], labels: LabelTable | None = None) -> dict[str, Tensor]:
    """`params` with one colour channel where all three are equal in every colour, else as they are. Those of a head
    that shows ``labels`` stay as they are in any case."""
    threes = COLOURS - label_colours(params, labels)
    colours = [params[name] for name in threes if name in params]
    if all(torch.equal(colour, colour[:, :, :1].expand_as(colour)) for colour in colours):
        return {name: value[:, :, :1].clone() if name in threes else value for name, value in params.items()}
    return params


# ---- writing -----------------------------------------------------------------------------------------------


def label_colours(params: Collection[str], labels: LabelTable | None) -> set[str]:
    """The colours among ``params`` that have a channel per label: those of the last head."""
    if labels is None:
        return set()
    head = SEGMENTATION if "opacity_seg" in params else IMAGE
    return {name for name in COLOURS if PARAMETERS[name].head == head}


def _in_colour(values: Tensor) -> Tensor:
    return values.expand(-1, -1, 3)


def _own(tensor: Tensor, as_parameter: bool = False) -> Tensor:
    """The tensor, detached, in a storage of its own size: `torch.save` writes whole storages."""
    tensor = tensor.detach()
    if (
        not tensor.is_contiguous()
        or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    ):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(tensor) if as_parameter else tensor


def _plain(value: Any) -> Any:
    """A copy of nested containers in which numbers are Python's own and tensors are detached."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value)) if isinstance(value, list) else tuple(map(_plain, value))
    if isinstance(value, Tensor):
        return _own(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise TypeError(f"checkpoints hold plain values and tensors, not {type(value).__name__}")


def _indexed_params(optimizer: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """(index in the optimizer's state, parameter's name) of each parameter of its groups."""
    for group in optimizer["param_groups"]:
        names = SEGMENTATION_HEAD if group["name"] == "seg_head" else (group["name"],)
        yield from zip(group["params"], names, strict=True)


# ---- reading -----------------------------------------------------------------------------------------------


def _numpy_scalar(module: str) -> Any:
    """numpy's function that unpickles a scalar, under the name that it has in files of one major version.

    Published files hold numpy floats (extent, rates). PyTorch 2.4 knows an allowed function by its own name
    only, so this is a function of that name.
    """
    rebuild = np.float64(0).__reduce__()[0]

    def scalar(dtype: np.dtype, data: bytes) -> float:
        return float(rebuild(dtype, data))

    scalar.__module__, scalar.__qualname__ = module, scalar.__name__
    return scalar


_ALLOWED = [
    _numpy_scalar("numpy.core.multiarray"),
    _numpy_scalar("numpy._core.multiarray"),
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]


def _load(path: str | os.PathLike[str]) -> Any:
    torch.serialization.add_safe_globals(_ALLOWED)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; any later failure is due to the file's content
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with file:
            _check_archive(path, file)
            return torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except UserError:
        raise
    except Exception as error:  # damaged archives and pickles raise anything
        if isinstance(error, pickle.UnpicklingError) and (match := re.search(r"GLOBAL (\S+)", str(error))):
            raise UserError(
                f"{path} is refused: it asks for {match[1]}, which no checkpoint needs"
            ) from error
        raise UserError(f"{path} is damaged, or no checkpoint: take another one, or train again") from error


def _check_archive(path: str | os.PathLike[str], file: BinaryIO) -> None:
    """Refuses an archive that would be larger in memory than on disk: torch compresses nothing."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise UserError(f"{path} is refused: it is compressed, which checkpoints are not")
            if sum(record.file_size for record in archive.infolist()) > os.fstat(file.fileno()).st_size:
                raise UserError(f"{path} is refused: it claims to hold more than the file does")
    file.seek(0)


class _Reader:
    """The schema of the file: every key is looked up, and complained about, in one place."""

    def __init__(self, path: str | os.PathLike[str], state: dict[Any, Any]) -> None:
        self.path = path
        self.state = state
        self.sizes = {"C": 3, "S": 3}  # the latter becomes the number of labels, where there is a label head

    def checkpoint(self, iteration: int) -> Checkpoint:
        if self.value(self.state, "version", int) != 2:
            raise self.fault("version", f"is {self.state['version']}, not 2")
        labels = self._labels()
        if labels is not None:
            self.sizes["S" if self._has_seg_head() else "C"] = len(labels)
        present = [name for name in _PARAMS if name not in SEGMENTATION_HEAD or self._has_seg_head()]
        params = {name: self.tensor(self.state, *_PARAMS[name]) for name in present}
        statistics = {
            key: self.tensor(self.state, key, shape, finite=False)
            for key, shape in _STATISTICS.items()
            if self.value(self.state, key, Tensor).shape != (0,)
            or not self.sizes["N"]  # empty where none are kept
        }
        checkpoint = Checkpoint(
            iteration,
            params,
            self._time_func(),
            self.value(self.state, "active_sh_degree", int),
            float(self.value(self.state, "spatial_lr_scale", (int, float))),
            statistics,
            labels=labels,
        )
        degree = checkpoint.sh_degree
        if (degree + 1) ** 2 - 1 != self.sizes["R"]:
            raise self.fault("_features_rest", f"has {self.sizes['R']} harmonics, not (D + 1)^2 - 1")
        if not 0 <= checkpoint.active_sh_degree <= degree:
            raise self.fault(
                "active_sh_degree", f"is {checkpoint.active_sh_degree}, with harmonics up to {degree}"
            )
        if not math.isfinite(checkpoint.spatial_lr_scale):
            raise self.fault("spatial_lr_scale", "is not finite")
        if 2 * self.value(self.state, "polynomial_degree", int) != self.sizes["W"]:
            raise self.fault("polynomial_degree", f"is not half of the {self.sizes['W']} columns of _w1")
        checkpoint.optimizer = self._optimizer(params)
        if "medgs" in self.state:
            self._take_ours(checkpoint, self.value(self.state, "medgs", dict))
        else:
            checkpoint.params = as_grey(params)
            if checkpoint.channels == 1:
                self._fold_moments(checkpoint.optimizer)
        return checkpoint

    def fault(self, key: object, what: str) -> UserError:
        return UserError(f"{self.path}: {key} {what}; the file is damaged or of another program")

    def value(self, values: Mapping[Any, Any], key: object, kind: type | tuple[type, ...]) -> Any:
        if key not in values:
            raise self.fault(key, "is missing")
        value = values[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fault(key, f"is a {type(value).__name__}")
        return value

    def tensor(
        self,
        values: Mapping[Any, Any],
        key: str,
        shape: tuple[int | str, ...],
        finite: bool = True,
        label: str = "",
    ) -> Tensor:
        """values[key], a float32 tensor of `shape`, whose letters get their sizes where they first occur; errors
        call it `label`."""
        tensor = self.value(values, key, Tensor).detach()
        key = label or key
        fits = tensor.ndim == len(shape)
        if fits:
            for size, wanted in zip(tensor.shape, shape, strict=True):
                fits &= size == (self.sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
        if not fits:
            expected = ", ".join(str(self.sizes.get(d, d)) if isinstance(d, str) else str(d) for d in shape)
            raise self.fault(key, f"has the shape {tuple(tensor.shape)}, not ({expected})")
        if tensor.dtype != torch.float32 or tensor.layout != torch.strided:
            raise self.fault(key, f"holds {tensor.dtype}, not plain float32")
        if finite and not tensor.isfinite().all():
            raise self.fault(key, "holds values that are not finite")
        return tensor

    def _has_seg_head(self) -> bool:
        """Published files without one hold torch.empty(0) there, the oldest ones nothing."""
        values = [self.state.get(_PARAMS[name][0]) for name in SEGMENTATION_HEAD]
        return any(isinstance(value, Tensor) and value.ndim > 1 for value in values)

    def _labels(self) -> LabelTable | None:
        ours = self.state.get("medgs")
        if not isinstance(ours, dict) or ours.get("labels") is None:
            return None
        try:
            labels = LabelTable.from_json(self.value(ours, "labels", list))
        except ValueError as error:
            raise self.fault("labels", f"are no table of labels ({error})") from error
        if len(labels) < 2:
            raise self.fault("labels", f"are {len(labels)}, not two or more")
        return labels

    def _time_func(self) -> Tensor:
        if self.value(self.state, "time_func", Tensor).ndim == 2:
            return self.tensor(self.state, "time_func", ("K - 1", 1))
        return self.tensor(self.state, "time_func", ("K",))

    def _optimizer(self, params: dict[str, Tensor]) -> dict[str, Any] | None:
        """The optimizer's state, checked against the parameters as they are in the file."""
        key = "optimizer_state"
        if key in self.state and self.state[key] is None:
            return None
        optimizer = self.value(self.state, key, dict)
        entries = self.value(optimizer, "state", dict)
        shapes = {name: tuple(value.shape) for name, value in params.items()}
        shapes["time_func"] = tuple(self.state["time_func"].shape)
        try:
            indexed = dict(_indexed_params(optimizer))
            unknown = set(indexed.values()) - set(shapes)
        except (KeyError, TypeError, ValueError) as error:
            raise self.fault(key, "has groups that are not named, one parameter each") from error
        if unknown:
            raise self.fault(key, f"has a group {unknown.pop()}, which the model lacks")
        for index, entry in entries.items():
            if index not in indexed or not isinstance(entry, dict):
                raise self.fault(key, f"has an entry {index!r} of no group")
            name = indexed[index]
            for moment in _MOMENTS if entry else ():
                self.tensor(entry, moment, shapes[name], label=f"{moment} of {name}")
            if entry:
                step = self.value(entry, "step", (int, float, Tensor))
                if (isinstance(step, Tensor) and step.numel() != 1) or not 0 <= float(step) < math.inf:
                    raise self.fault(f"step of {name}", "is no count")
        return optimizer

    def _take_ours(self, checkpoint: Checkpoint, ours: dict[Any, Any]) -> None:
        """What the file says beyond the published format, exactly."""
        statistics = self.value(ours, "statistics", dict)
        for key in _OUR_STATISTICS.keys() & statistics.keys():
            checkpoint.statistics[key] = self.tensor(statistics, key, _OUR_STATISTICS[key], finite=False)
        channels = self.value(ours, "channels", int)
        if channels == 1:
            self._take_grey(checkpoint, ours)
        elif channels != checkpoint.channels:
            raise self.fault("channels", f"is {channels}, not 1 or {checkpoint.channels}")
        checkpoint.extras = self._extras(checkpoint, self.value(ours, "extras", dict))

    def _extras(self, checkpoint: Checkpoint, extras: dict[Any, Any]) -> dict[str, Any]:
        """The known extras, each of the right type: files of later versions may have more."""
        known = {key: self.value(extras, key, kind) for key, kind in _EXTRAS.items() if key in extras}
        for key, others in {"width": ("height", "distance", "bits"), "random": ("background",)}.items():
            for other in others if key in known else ():
                self.value(known, other, _EXTRAS[other])
        if min(known.get("width", 1), known.get("height", 1), known.get("bits", 1)) < 1:
            raise self.fault("width, height or bits", "is not positive")
        if len(known.get("numbers", "")) not in (0, checkpoint.num_frames):
            raise self.fault("numbers", f"are not those of {checkpoint.num_frames} frames")
        if not isinstance(known.get("options", {}).get("antialiasing", False), bool):
            raise self.fault("option 'antialiasing'", "is neither True nor False")
        for name, value in known.get("options", {}).items():
            for part in value if isinstance(value, list) else [value]:
                if part is not None and not isinstance(part, (bool, int, float, str)):
                    raise self.fault(f"option {name!r}", f"is a {type(part).__name__}")
        if "background" in known:
            self.tensor(known, "background", (checkpoint.channels,))
        if "random" in known:
            try:
                torch.Generator().set_state(known["random"])
            except (RuntimeError, TypeError) as error:
                raise self.fault("random", "is not the state of a random generator") from error
        learned = {**checkpoint.params, "time_func": checkpoint.time_func}
        for key, what in (("gradients", "the gradient of"), ("trained", "the trained")):
            for name in known.get(key, {}):
                if name not in learned:
                    raise self.fault(key, f"names {name!r}, which the model lacks")
                self.tensor(known[key], name, tuple(learned[name].shape), label=f"{what} {name}")
        if missing := learned.keys() - known.get("trained", learned).keys():
            raise self.fault("trained", f"lacks {min(missing)!r}")
        return known

    def _take_grey(self, checkpoint: Checkpoint, ours: dict[Any, Any]) -> None:
        """Grey colours have one channel; their moments are in `ours`, exactly."""
        in_threes = COLOURS - label_colours(checkpoint.params, checkpoint.labels)
        for name in in_threes & checkpoint.params.keys():
            checkpoint.params[name] = checkpoint.params[name][:, :, :1].clone()
        if checkpoint.optimizer is None:
            return
        moments = self.value(ours, "moments", dict)
        for index, name in _indexed_params(checkpoint.optimizer):
            entry = checkpoint.optimizer["state"].get(index)
            if entry and name in in_threes:
                exact = self.value(moments, index, dict)
                shape = checkpoint.params[name].shape
                entry.update({moment: self.tensor(exact, moment, tuple(shape)) for moment in _MOMENTS})

    def _fold_moments(self, optimizer: dict[str, Any] | None) -> None:
        """Moments of three equal channels -> those of the one: its gradient is the sum of theirs."""
        if optimizer is None:
            return
        for index, name in _indexed_params(optimizer):
            entry = optimizer["state"].get(index)
            if entry and name in COLOURS:
                entry["exp_avg"] = entry["exp_avg"].sum(2, keepdim=True)
                entry["exp_avg_sq"] = 3 * entry["exp_avg_sq"].sum(2, keepdim=True)
