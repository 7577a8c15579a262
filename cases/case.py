"""One case, from a volume to its report: which steps there are, in which folder, and what came out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from arguments import train_options
from cases.estimate import Load, load_of, seconds_of
from cases.gpus import gpu_names
from cases.processes import Spawned, Start
from cases.steps import RECORD, STOPPED, Record, Step, digest, versions
from patient.geometry import FILE_NAME, Geometry
from patient.readers.itk_files import read_text_header
from utils.errors import UserError
from utils.timing import in_words

STEPS = ("prepare", "train", "render", "mesh", "report")
"""In order. Each has options of its own: `--train.lambda_seg 2`."""
PROGRAMS = {
    "prepare": "prepare.py",
    "train": "train.py",
    "render": "render.py",
    "mesh": "slices_to_ply.py",
    "report": "report.py",
}
DATA, MODEL, MESHES, REPORT = "data", "model", "meshes", "report.html"
SHOWN = {"images": "render_img", "masks": "render_mask"}
"""Links in a case's folder to what render.py writes in the model's."""
MESH_SUFFIXES = (".ply", ".stl", ".obj", ".glb")
CHECKPOINTS = 500  # iterations: what a preempted run loses at most, a second or so on a GPU

ON_GPU = ("train", "render")
"""Steps that hold a place on a GPU where there is one; the others leave it to the next case. The report's few pictures
are drawn on the same GPU."""

Say = Callable[[str], object]
Place = Callable[[], AbstractContextManager[str | None]]
"""A place on a GPU, held while a step uses it: the GPU as CUDA_VISIBLE_DEVICES names it."""


@dataclass(frozen=True)
class Case:
    """What to do.

    image, labels: files or folders that prepare.py reads; several labels are one file per structure. keep_every: train
    on one slice in N and score the others. interp: rendered slices per frame. minutes: that training may take. steps:
    options of single steps as they stand on the command line, `{"train": ["--lambda_seg", "2"]}`.
    """

    name: str
    image: Path
    labels: tuple[Path, ...] = ()
    preset: str = "published"
    keep_every: int = 1
    interp: int = 4
    device: str = "auto"
    minutes: float | None = None
    steps: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseResult:
    """What a case left in its folder."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @cached_property
    def record(self) -> Record:
        return Record.load(self.folder)

    @property
    def complete(self) -> bool:
        return not self.missing and not self.record.failure

    @property
    def missing(self) -> list[str]:
        """Steps of this case that have not come to a good end."""
        wanted = self.record.options.get("steps_to_do", STEPS)
        done = self.record.steps
        return [name for name in wanted if name not in done or done[name].status != 0]

    def volume(self, kind: str = "img") -> nibabel.Nifti1Image:
        """The dense volume, `img` or `mask`, with its affine. Raises `UserError` where there is none."""
        path = self.model / f"render_{kind}.nii.gz"
        if not path.exists():
            raise UserError(
                f"{path} does not exist: the source has no millimetres, or no such output was rendered"
            )
        return nibabel.Nifti1Image.from_filename(path)

    @property
    def meshes(self) -> list[Path]:
        return sorted(path for path in (self.folder / MESHES).glob("*") if path.suffix in MESH_SUFFIXES)

    @cached_property
    def scores(self) -> dict[str, float]:
        """The last evaluation, by task, frames, method and score: `img/heldout/model/psnr`; of label maps also by name,
        `seg/heldout/model/dice/liver`. Without undefined ones."""
        path = self.model / "evaluation.json"
        if not path.exists():
            return {}
        rows = json.loads(path.read_text(encoding="utf-8"))
        last, names = max((row["iteration"] for row in rows), default=0), self._labels
        found: dict[str, float] = {}
        for row in rows:
            if row["iteration"] == last:
                place = f"{row['task']}/{row['frames']}/{row['method']}"
                known = {name: row.get(name) for name in ("psnr", "ssim", "dice")}
                known |= {
                    f"dice/{names.get(label, label)}": value for label, value in row.get("labels", {}).items()
                }
                found |= {f"{place}/{name}": value for name, value in known.items() if value is not None}
        return found

    @property
    def _labels(self) -> dict[str, str]:
        """Names of a label map's labels, by number."""
        path = self.folder / DATA / FILE_NAME
        table = Geometry.load(path).labels if path.exists() else None
        return {str(label.id): label.name for label in table or ()}


def do_case(
    case: Case,
    folder: Path,
    only: Sequence[str] = STEPS,
    *,
    say: Say = print,
    start: Start = Spawned,
    place: Place | None = None,
) -> CaseResult:
    """Do what is not current of a case, step by step, after a plan with times.

    folder: the case's, held by the caller (`own_folder`). only: the steps to do. start: how their programs are started.
    place: a GPU for those in ON_GPU.

    Returns what came out, also where a step failed or was stopped: see `CaseResult.record.failure`. Raises `UserError`
    where the input does not exist, or a step is asked for whose predecessor is not done.
    """
    names = _names(case)
    if not set(only) & set(names):
        raise UserError(f"nothing to do: this case has the steps {', '.join(names)}, and mesh with a label")
    record, inputs = _load(folder), _inputs(case)
    tell_plan(_plan(case, folder, record, inputs), only, case, folder, say, start is not Spawned)
    _run(case, folder, record, inputs, only, say, start, place)
    return CaseResult(folder)


def plan(case: Case, folder: Path) -> list[tuple[str, str]]:
    """Each step, and `current`, `resume` or `run`."""
    return _plan(case, folder, _load(folder), _inputs(case))


def _plan(case: Case, folder: Path, record: Record, inputs: Mapping[str, str]) -> list[tuple[str, str]]:
    found, before = [], ""
    for name in _names(case):
        step = _step(name, case, folder, inputs, before)
        stopped = name in record.steps and record.steps[name].key == step.key and name == "train"
        current = step.is_current(record)
        found.append((name, "current" if current else "resume" if stopped else "run"))
        before = step.key
    return found


def tell_plan(
    steps: Sequence[tuple[str, str]], only: Sequence[str], case: Case, folder: Path, say: Say, forked: bool
) -> None:
    """A line per step, with the time that it will take as far as that can be told before it starts."""
    load = load_of(case.image, folder / DATA / FILE_NAME, case.keep_every, case.interp, len(case.labels))
    total, known = 0.0, True
    for name, state in steps:
        if name not in only:
            continue
        line = f"  {name:8} {state}"
        if state != "current":
            seconds = _estimate(name, case, load, forked)
            known = known and seconds is not None
            total += seconds or 0.0
            line += f"{'':{9 - len(state)}}{'at most ' if state == 'resume' else ''}{_about(seconds)}"
        say(line)
    if total:
        more = "" if known else "more than "
        say(f"  {more}{_about(total)} in all, by estimate; {RECORD} will have the real times")


def _about(seconds: float | None) -> str:
    return "unknown, as its size is" if seconds is None else f"about {in_words(seconds)}"


def _estimate(name: str, case: Case, load: Load | None, forked: bool) -> float | None:
    words = ["-s", "x", "-m", "x", "--preset", case.preset, *_minutes(case), *case.steps.get("train", ())]
    on_gpu = case.device != "cpu" and bool(gpu_names())
    return None if load is None else seconds_of(name, load, train_options(words), on_gpu, forked)


def _minutes(case: Case) -> list[str]:
    return [] if case.minutes is None else ["--time", f"{case.minutes:g}"]


def _run(
    case: Case,
    folder: Path,
    record: Record,
    inputs: dict[str, str],
    only: Sequence[str],
    say: Say,
    start: Start,
    place: Place | None,
) -> None:
    """Run what is not current, until a step fails that others need; a report can do without a mesh."""
    names = _names(case)
    device = "CPU" if case.device == "cpu" else ", ".join(dict.fromkeys(gpu_names())) or "CPU"
    record.case, record.inputs, record.versions = case.name, inputs, {**versions(), "device": device}
    record.options = {
        "preset": case.preset,
        "keep_every": case.keep_every,
        "interp": case.interp,
        "device": case.device,
        "time": case.minutes,
        "steps": {name: list(given) for name, given in case.steps.items()},
        "steps_to_do": list(names),
    }
    record.steps = {name: step for name, step in record.steps.items() if name in names}
    record.save()
    before, environment = "", dict[str, str]()
    for number, name in enumerate(names, 1):
        step = _step(name, case, folder, inputs, before)
        before = step.key
        if name not in only:
            needed = any(name in _NEEDS[later] for later in names[number:] if later in only)
            if needed and not step.is_current(record):
                raise UserError(f"{name} is not done with these inputs and options: add it to --only")
            continue
        if step.is_current(record):
            say(f"[{number}/{len(names)}] {name}: current")
            continue
        say(f"[{number}/{len(names)}] {name}")
        if name not in record.steps or record.steps[name].key != step.key:  # other inputs or options
            for later in names[number:]:
                record.steps.pop(later, None)
            for made in {"train": (MODEL, MESHES), "mesh": (MESHES,)}.get(name, ()):
                shutil.rmtree(folder / made, ignore_errors=True)
        wanted = name in ON_GPU or (name == "report" and not environment)
        with place() if place and wanted else nullcontext() as gpu:
            if gpu is not None:
                environment["CUDA_VISIBLE_DEVICES"] = gpu
            done = step.run(record, start, environment)
        if done.status == 0:
            _finish(name, case, folder)
        elif done.status in STOPPED or any(name in _NEEDS[later] for later in names):
            return


_NEEDS = {
    "prepare": (),
    "train": ("prepare",),
    "render": ("prepare", "train"),
    "mesh": ("prepare", "train", "render"),
    "report": ("prepare", "train"),
}


def _load(folder: Path) -> Record:
    """The record of a case's folder. Raises `UserError` where what the case would replace is somebody else's."""
    record = Record.load(folder)
    if not record.path.exists():
        for name in (MODEL, MESHES, *SHOWN):
            if (folder / name).exists():
                raise UserError(
                    f"{folder / name} is there without a {RECORD}: it is not a case's; give another -o"
                )
    return record


def _names(case: Case) -> tuple[str, ...]:
    return STEPS if case.labels else tuple(name for name in STEPS if name != "mesh")


def _inputs(case: Case) -> dict[str, str]:
    return {
        str(path): " ".join(digest(part) for part in (path, *_beside(path)))
        for path in (case.image, *case.labels)
    }


def _beside(header: Path) -> list[Path]:
    """The file that holds the voxels of a header alone; their whole folder where it names several."""
    kind = header.suffix.lower()
    if kind in (".hdr", ".img"):
        other = header.with_suffix(".img" if kind == ".hdr" else ".hdr")
    elif kind in (".mhd", ".nhdr"):
        try:
            fields = read_text_header(header).fields
        except UserError:  # prepare.py names what is wrong
            return []
        named = next(
            (fields[key] for key in ("elementdatafile", "data file", "datafile") if key in fields), ""
        )
        several = named.upper().startswith("LIST") or "%" in named
        other = header.parent if several else header.parent / named
        if not named or named.upper() == "LOCAL":
            return []
    else:
        return []
    return [other] if other.exists() else []


def _step(name: str, case: Case, folder: Path, inputs: Mapping[str, str], before: str) -> Step:
    """The command line of one step."""
    data, model = folder / DATA, folder / MODEL
    joint = bool(case.labels)
    device = ["--device", case.device]
    arguments: dict[str, list[str]] = {
        "prepare": [
            *("-i", str(case.image), *(("-l", *map(str, case.labels)) if joint else ()), "-o", str(data)),
            *(("--keep_every", str(case.keep_every)) if case.keep_every > 1 else ()),
            "--force",
        ],
        "train": [
            *("-s", str(data / "img"), "-m", str(model), "--preset", case.preset, *device, *_minutes(case)),
            *(("--pipeline", "joint", "--seg_source_path", str(data / "seg")) if joint else ()),
            *(
                "--start_checkpoint",
                "auto",
                "--checkpoint_interval",
                str(CHECKPOINTS),
                "--keep_checkpoints",
                "1",
            ),
        ],
        "render": [
            *(
                "-m",
                str(model),
                "--interp",
                str(case.interp),
                "--pipeline",
                "both" if joint else "img",
                *device,
            ),
            *(("--nifti",) if _has_affine(data) else ()),
        ],
        "mesh": ["-i", str(model), "-o", str(folder / MESHES), "--inter", str(case.interp), "--preview"],
        "report": ["-m", str(model), "-o", str(folder / REPORT), *_mesh_option(case, folder), *device],
    }
    outputs = {
        "prepare": [data / FILE_NAME],
        "train": [model / "cfg_args", model / "evaluation.json"],
        "render": [model / folder_name for folder_name in (SHOWN.values() if joint else ["render_img"])],
        "mesh": [folder / MESHES],
        "report": [folder / REPORT],
    }
    given = [*arguments[name], *case.steps.get(name, ())]
    return Step(
        name, PROGRAMS[name], given, outputs[name], inputs if name == "prepare" else {}, before, folder
    )


def _mesh_option(case: Case, folder: Path) -> list[str]:
    """The case's mesh for its report, where it has just one."""
    mesh = folder / MESHES / f"{case.name}.ply"
    return ["--mesh", str(mesh)] if mesh.exists() else []


def _has_affine(data: Path) -> bool:
    """Whether prepare.py found out where the frames lie in the patient."""
    return (data / FILE_NAME).exists() and Geometry.load(data / FILE_NAME).affine is not None


def _finish(name: str, case: Case, folder: Path) -> None:
    """What a step leaves under another name than the case's folder has for it."""
    if name == "render":
        for link, target in SHOWN.items():
            if (folder / MODEL / target).is_dir():
                _link(folder / link, Path(MODEL, target))
    if name == "mesh":
        for path in sorted((folder / MESHES).glob(f"{MODEL}*")):
            path.replace(path.with_name(case.name + path.name.removeprefix(MODEL)))


def _link(link: Path, target: Path) -> None:
    """A relative link, which a copy of the folder keeps; a copy where the file system has none."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        shutil.copytree(link.parent / target, link)


def as_file(given: Any, affine: np.ndarray | None, path: Path) -> Path:
    """A path as it is; an array written as NIfTI, so that a second call with the same values finds the same file."""
    if not isinstance(given, np.ndarray):
        return Path(given)
    if given.ndim != 3:
        raise UserError(f"an array of shape {given.shape} is no volume: give (columns, rows, slices)")
    path.parent.mkdir(parents=True, exist_ok=True)
    values = _storable(given)
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    plain = path.with_suffix("")  # a .gz file has the time in it: the same values would be another file
    nibabel.save(image, plain)
    return plain


def _storable(values: np.ndarray) -> np.ndarray:
    """The same values in a type that NIfTI readers know: not bool, nor integers of 64 bits or floats of 16."""
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        small = values.astype(np.int32)
        if not np.array_equal(small, values):
            raise UserError("an array has whole numbers beyond 32 bits: give them as float64")
        return small
    return values.astype(np.float32) if values.dtype == np.float16 else values
