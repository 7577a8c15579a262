"""`point_cloud.ply`: the raw parameters of all Gaussians as columns of a table, in the published layout.

Element `vertex`, float32, binary little endian: x y z nx ny nz f_dc_0..2 f_rest_* opacity scale_0..2 rot_0
m_0 sigma_0 w1_0..w1_(2P-1). Where there is a segmentation head, its columns are ours: seg_opacity seg_f_dc_*
seg_f_rest_*, last, and named so that the published reader, which looks for prefixes, passes over them. Element
`time`: one row, time_func_0... Harmonics are stored channel by channel, as splat viewers read them.

A head that shows a label map has one channel per label instead of three; a comment names each label, in order.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from patient.labels import LabelTable
from scene.checkpoint import as_grey, label_colours
from scene.parameters import COLOURS, PARAMETERS, SEGMENTATION_HEAD, Parameter
from utils.errors import UserError
from utils.files import atomic_write

# Columns in the published order; those of the segmentation head, which are ours, come last.
_ORDER = [*(name for name in PARAMETERS if name not in SEGMENTATION_HEAD), *SEGMENTATION_HEAD]
_MAX_HEADER = 4 << 20  # bytes; a column for each of 50 thousand frames fits
_LOGITS = "time_func holds logits of learned frame times"  # a comment that distinguishes (K - 1, 1) from (K,)
_LABEL = "label "  # a comment per label begins so


def write_point_cloud(
    path: str | os.PathLike[str],
    params: Mapping[str, Tensor],
    time_func: Tensor,
    labels: LabelTable | None = None,
) -> None:
    """Write the raw parameters (named and shaped as in `Checkpoint.params`) and `time_func` to `path`. labels: of the
    label map that the last head shows."""
    in_threes = COLOURS - label_colours(params, labels)
    values = {name: value.detach().float().cpu() for name, value in params.items()}
    columns: list[tuple[str, Tensor]] = []
    for name in _ORDER:
        if name in values:
            colour = values[name]
            if name in in_threes:
                colour = colour.expand(-1, -1, 3)
            flat = (colour.transpose(1, 2) if name in COLOURS else colour).flatten(1)  # all of red first
            columns += zip(PARAMETERS[name].column_names(flat.shape[1]), flat.unbind(1), strict=True)
        if name == "xyz":
            columns += ((normal, torch.zeros(len(values[name]))) for normal in ("nx", "ny", "nz"))

    times = time_func.detach().float().cpu().flatten()
    header = [
        "ply",
        "format binary_little_endian 1.0",
        *([f"comment {_LOGITS}"] if time_func.ndim == 2 else []),
        *(f"comment {_LABEL}{json.dumps(label)}" for label in (labels.to_json() if labels else [])),
        f"element vertex {len(columns[0][1])}",
        *(f"property float {name}" for name, _ in columns),
        "element time 1",
        *(f"property float time_func_{k}" for k in range(len(times))),
        "end_header",
    ]
    table = torch.stack([column for _, column in columns], dim=1)  # (N, columns)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(("\n".join(header) + "\n").encode("ascii"))
        for block in (table, times):
            block.numpy().astype("<f4", copy=False).tofile(file)


def read_point_cloud(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Read such a file: the raw parameters as in `Checkpoint.params` and time_func, (K,) or (K - 1, 1).

    Colours are grey (C = 1) where all three channels are equal; logits of DFF are marked by a comment of ours.

    Raises `UserError` where it is not one, before anything of the size that it claims is allocated.
    """
    try:
        with open(path, "rb") as file:
            elements, comments = _read_header(path, file.read(_MAX_HEADER))
            columns, num_points, start = elements["vertex"]
            times, _, times_start = elements["time"]
            file.seek(start)
            table = np.fromfile(file, "<f4", num_points * len(columns)).reshape(num_points, len(columns))
            file.seek(times_start)
            durations = torch.from_numpy(np.fromfile(file, "<f4", len(times)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error

    place = {name: i for i, name in enumerate(columns)}

    def numbered(prefix: str) -> int:
        return sum(re.fullmatch(rf"{prefix}_\d+", name) is not None for name in columns)

    labels = _labels(path, comments)
    with_head = "seg_opacity" in place
    sizes = {"C": 3, "S": 3, "W": numbered("w1")}
    if labels is not None:
        sizes["S" if with_head else "C"] = len(labels)
    if numbered("f_rest") % sizes["C"]:
        each = "three" if sizes["C"] == 3 else str(sizes["C"])
        raise UserError(f"{path} has {numbered('f_rest')} columns f_rest_*, not {each} for each harmonic")
    sizes["R"] = numbered("f_rest") // sizes["C"]

    def taken(parameter: Parameter) -> Tensor:  # (N, ...)
        names = parameter.column_names(parameter.size(sizes))
        missing = [name for name in names if name not in place]
        if missing:
            raise UserError(f"{path} has no column {missing[0]}: it is not a point cloud of this method")
        values = torch.from_numpy(table[:, [place[name] for name in names]].astype(np.float32))
        if parameter.is_colour:
            channels = sizes[str(parameter.shape[-1])]
            return values.view(num_points, channels, len(names) // channels).transpose(1, 2).contiguous()
        return values.view(num_points, *(sizes[n] if isinstance(n, str) else n for n in parameter.shape))

    present = [name for name in _ORDER if name not in SEGMENTATION_HEAD or with_head]
    params = {name: taken(PARAMETERS[name]) for name in present}
    return as_grey(params, labels), durations[:, None] if _LOGITS in comments else durations


def labels_of_point_cloud(path: str | os.PathLike[str]) -> LabelTable | None:
    """The labels of the label map that the last head shows; None where it shows none. Raises `UserError`."""
    try:
        with open(path, "rb") as file:
            return _labels(path, _read_header(path, file.read(_MAX_HEADER))[1])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _labels(path: str | os.PathLike[str], comments: list[str]) -> LabelTable | None:
    told = [comment.removeprefix(_LABEL) for comment in comments if comment.startswith(_LABEL + "{")]
    try:
        return LabelTable.from_json([json.loads(label) for label in told]) if told else None
    except ValueError as error:
        raise UserError(f"{path} names labels that cannot be read: {error}") from error


def write_points(path: str | os.PathLike[str], points: Tensor, colours: Tensor) -> None:
    """Write bare points (N, 3) with colours (N, 3) in [0, 1], as in `input.ply`: 8-bit red, green, blue."""
    table = np.zeros(
        len(points),
        [(n, "<f4") for n in ("x", "y", "z", "nx", "ny", "nz")]
        + [(n, "u1") for n in ("red", "green", "blue")],
    )
    for name, column in zip("xyz", points.detach().float().cpu().unbind(1), strict=True):
        table[name] = column.numpy()
    for name, column in zip(("red", "green", "blue"), colours.detach().cpu().unbind(1), strict=True):
        table[name] = (column.clamp(0, 1) * 255).round().numpy()
    kinds = {"f": "float", "u": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property {kinds[table.dtype[name].kind]} {name}" for name in table.dtype.names or ()]
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(("\n".join([*header, "end_header"]) + "\n").encode("ascii"))
        table.tofile(file)


def _read_header(
    path: str | os.PathLike[str], start: bytes
) -> tuple[dict[str, tuple[list[str], int, int]], list[str]]:
    """Element name -> (columns, rows, offset of its data in the file), and the comments.

    Every claim is checked: float32 columns only, one row of time, and as many bytes as the file really has.
    """

    def fault(what: str) -> UserError:
        return UserError(f"{path} is not a point cloud of this method: {what}")

    if not re.match(rb"ply\r?\n", start):
        raise fault("it does not begin as a PLY file")
    end = re.search(rb"\nend_header\r?\n", start)
    if not end:
        raise fault("its header has no end")
    lines = start[: end.start()].decode("ascii", "replace").splitlines()[1:]
    if not lines or lines[0].split() != ["format", "binary_little_endian", "1.0"]:
        raise fault(
            "it is not binary little endian but " + (" ".join(lines[0].split()[1:2]) if lines else "empty")
        )

    comments: list[str] = []
    declared: list[tuple[str, int, list[str]]] = []
    for line in lines[1:]:
        match line.split():
            case ["comment" | "obj_info", *words]:
                comments.append(" ".join(words))
            case ["element", name, rows] if rows.isdecimal():
                declared.append((name, int(rows), []))
            case ["property", "float" | "float32", name] if declared and name not in declared[-1][2]:
                declared[-1][2].append(name)
            case []:
                pass
            case _:
                raise fault(f"its header says {line.strip()[:80]!r}, where float columns are expected")

    elements: dict[str, tuple[list[str], int, int]] = {}
    offset = end.end()
    for name, count, columns in declared:
        elements[name] = columns, count, offset
        offset += 4 * count * len(columns)
    for name in ("vertex", "time"):
        if name not in elements:
            raise fault(f"it has no element {name}")
    if elements["time"][1] != 1:
        raise fault(f"it has {elements['time'][1]} rows of time, not 1")
    size = Path(path).stat().st_size
    if offset > size:
        raise fault(f"its header claims {offset:,} bytes, the file has {size:,}")
    return elements, comments
