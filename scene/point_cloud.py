"""`point_cloud.ply`: the raw parameters of all Gaussians as columns of a table, in the published layout.

Element `vertex`, float32, binary little endian: x y z nx ny nz f_dc_0..2 f_rest_* opacity scale_0..2 rot_0
m_0 sigma_0 w1_0..w1_(2P-1). Where there is a segmentation head, its columns are ours: seg_opacity seg_f_dc_*
seg_f_rest_*, last, and named so that the published reader, which looks for prefixes, passes over them. Element
`time`: one row, time_func_0... Harmonics are stored channel by channel, as splat viewers read them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scene.checkpoint import as_grey
from utils.errors import UserError
from utils.files import atomic_write

_MAX_HEADER = 4 << 20  # bytes; a column for each of 50 thousand frames fits
_LOGITS = "time_func holds logits of learned frame times"  # a comment that tells (K - 1, 1) from (K,)


def write_point_cloud(path: str | os.PathLike[str], params: Mapping[str, Tensor], time_func: Tensor) -> None:
    """Write the raw parameters (named and shaped as in `Checkpoint.params`) and `time_func` to `path`."""
    values = {name: value.detach().float().cpu() for name, value in params.items()}
    xyz = values["xyz"]
    columns: list[tuple[str, Tensor]] = [
        *zip("xyz", xyz.unbind(1), strict=True),
        *((name, torch.zeros(len(xyz))) for name in ("nx", "ny", "nz")),
        *_colour_columns("f_dc", values["f_dc"]),
        *_colour_columns("f_rest", values["f_rest"]),
        ("opacity", values["opacity"][:, 0]),
    ]
    for prefix, name in (
        ("scale", "scaling"),
        ("rot", "rotation"),
        ("m", "m"),
        ("sigma", "sigma"),
        ("w1", "w1"),
    ):
        columns += ((f"{prefix}_{i}", column) for i, column in enumerate(values[name].flatten(1).unbind(1)))
    if "opacity_seg" in values:
        columns.append(("seg_opacity", values["opacity_seg"][:, 0]))
        columns += _colour_columns("seg_f_dc", values["f_dc_seg"])
        columns += _colour_columns("seg_f_rest", values["f_rest_seg"])

    times = time_func.detach().float().cpu().flatten()
    header = [
        "ply",
        "format binary_little_endian 1.0",
        *([f"comment {_LOGITS}"] if time_func.ndim == 2 else []),
        f"element vertex {len(xyz)}",
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

    Colours are grey (C = 1) where all three channels are equal; logits of DFF are known by a comment of ours.

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

    def take(names: list[str]) -> Tensor:  # (N, len(names))
        missing = [name for name in names if name not in place]
        if missing:
            raise UserError(f"{path} has no column {missing[0]}: it is no point cloud of this method")
        return torch.from_numpy(table[:, [place[name] for name in names]].astype(np.float32))

    def count(prefix: str) -> int:
        return sum(re.fullmatch(rf"{prefix}_\d+", name) is not None for name in columns)

    def numbered(prefix: str, number: int) -> Tensor:
        return take([f"{prefix}_{i}" for i in range(number)])

    def colours(prefix: str, number: int) -> Tensor:  # (N, number / 3, 3)
        if number % 3:
            raise UserError(f"{path} has {number} columns {prefix}_*, not three for each harmonic")
        return numbered(prefix, number).view(num_points, 3, number // 3).transpose(1, 2).contiguous()

    harmonics = count("f_rest")
    params = {
        "xyz": take(["x", "y", "z"]),
        "f_dc": colours("f_dc", 3),
        "f_rest": colours("f_rest", harmonics),
        "opacity": take(["opacity"]),
        "scaling": numbered("scale", 3),
        "rotation": numbered("rot", 1),
        "m": numbered("m", 1),
        "sigma": numbered("sigma", 1)[:, :, None],
        "w1": numbered("w1", count("w1")),
    }
    if "seg_opacity" in place:
        params["f_dc_seg"] = colours("seg_f_dc", 3)
        params["f_rest_seg"] = colours("seg_f_rest", harmonics)
        params["opacity_seg"] = take(["seg_opacity"])
    return as_grey(params), durations[:, None] if _LOGITS in comments else durations


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


def _colour_columns(prefix: str, colours: Tensor) -> list[tuple[str, Tensor]]:
    """(N, R, C) -> 3R named columns, all of red first; grey ones three times."""
    flat = colours.expand(-1, -1, 3).transpose(1, 2).flatten(1)
    return [(f"{prefix}_{i}", column) for i, column in enumerate(flat.unbind(1))]


def _read_header(
    path: str | os.PathLike[str], start: bytes
) -> tuple[dict[str, tuple[list[str], int, int]], list[str]]:
    """Element name -> (columns, rows, offset of its data in the file), and the comments.

    Every claim is checked: float32 columns only, one row of time, and as many bytes as the file really has.
    """

    def fault(what: str) -> UserError:
        return UserError(f"{path} is no point cloud of this method: {what}")

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
