"""Pages of a case to send: the dense volume with its mask and mesh, alone or in a report."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np

from patient.meshes import decimate, mesh_bytes
from pictures.pages import document, escape
from utils.files import atomic_write
from viewer.case import Case, meshes_of

MOST_VOXELS = 9_000_000  # of the volume in a page; about 5 MB compressed and in base64
_MOST_TRIANGLES = 60_000  # of all meshes

STYLE = """
.solid { position: relative; height: min(70vh, 640px); border: 1px solid var(--line); border-radius: 6px; }
.solid { overflow: hidden; }
.solid canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.solid .waiting { position: absolute; inset: 0; display: grid; place-content: center; margin: 0; color: var(--faint); }
.solid .waiting[hidden] { display: none; }
.tools { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 8px 0; font-size: 13px; }
.tools label { display: flex; gap: 6px; align-items: center; }
.legend i { width: 11px; height: 11px; border-radius: 2px; }
@media print { .solid, .tools { display: none; } }
"""


def solid(case: Case, sub_frames: int | None = None) -> tuple[str, dict[str, bytes], str]:
    """Three planes and 3-D of a case for a page: its HTML, its parts, and the script that runs it."""
    images, masks = case.volumes(sub_frames or case.sub_frames(MOST_VOXELS))
    image = smaller(images.image, MOST_VOXELS)
    parts = {"image.nii": image.to_bytes()}
    mask = None
    if masks is not None:
        mask = smaller(masks.image, MOST_VOXELS, labels=True)
        parts["mask.nii"] = mask.to_bytes()
    parts |= mesh_parts(case, mask, _MOST_TRIANGLES)
    low, high = case.placed.window
    shown_low, shown_high = case.shown_window
    layouts = {
        "planes": "Planes and 3-D",
        "axial": "Axial",
        "coronal": "Coronal",
        "sagittal": "Sagittal",
        "solid": "3-D",
    }
    buttons = "".join(
        f'<button data-layout="{name}" aria-pressed="{str(name == "planes").lower()}">{words}</button>'
        for name, words in layouts.items()
    )
    step = (high - low) / 500
    sliders = (
        f'<label>Level <input class="level" type="range" min="{low:g}" max="{high:g}" step="{step:g}" '
        f'value="{(shown_low + shown_high) / 2:g}"></label>'
        f'<label>Width <input class="width" type="range" min="{step:g}" max="{high - low:g}" step="{step:g}" '
        f'value="{shown_high - shown_low:g}"></label>'
    )
    if masks is not None:
        sliders += (
            '<label>Mask <input class="opacity" type="range" min="0" max="1" step="0.05" value="0.9"></label>'
        )
        sliders += '<label><input class="outlined" type="checkbox" checked>Outline</label>'
    unit = "mm" if case.unit == "mm" else "voxels"
    markup = (
        f'<div id="solid"><div class="solid"><canvas></canvas><p class="waiting">unpacking the volume …</p></div>'
        f'<div class="tools">{buttons}{sliders}<span class="faint number"><span class="place"></span> {unit}</span>'
        f"</div>{_legend(case)}</div>"
    )
    given = case.mesh is not None
    about = {"labels": case.labels, "low": shown_low, "high": shown_high, "given": given}
    return markup, parts, f"mountParts(document.getElementById('solid'), {json.dumps(about)});"


def _legend(case: Case) -> str:
    """The labels of a label map, to switch on and off."""
    if case.table is None:
        return ""
    items = "".join(
        f'<label><input class="label" type="checkbox" checked data-id="{label["id"]}">'
        f'<i style="background: {label["colour"]}"></i>{escape(label["name"])}</label>'
        for label in case.labels
    )
    return f'<div class="tools legend">{items}</div>'


def mesh_parts(
    case: Case, masks: nibabel.Nifti1Image | None, most_triangles: int | None = None
) -> dict[str, bytes]:
    """Meshes for a page: the one that was given, as mesh.ply; else those of the masks, of a label map mesh_<id>.ply."""
    meshes = {1: case.mesh} if case.mesh is not None else {}
    table = case.table if case.mesh is None else None
    if not meshes and masks is not None:
        meshes = meshes_of(masks, table)
    parts, total = {}, sum(len(mesh.faces) for mesh in meshes.values())
    for number, mesh in meshes.items():
        if most_triangles is not None and total > most_triangles and find_spec("fast_simplification"):
            with suppress(ValueError):  # if simplifying would open it, keep all triangles
                mesh = decimate(mesh, 1 - most_triangles / total)
        parts["mesh.ply" if table is None else f"mesh_{number}.ply"] = mesh_bytes(mesh, "ply")
    return parts


def write_volume_page(case: Case, path: Path, sub_frames: int | None = None) -> None:
    """The dense volume, its mask and mesh as one page that opens from a file."""
    markup, parts, script = solid(case, sub_frames)
    model, (width, height) = case.model, case.size
    body = (
        f"<main><h1>{escape(case.name)}</h1><p class='faint'>{model.num_frames} frames of {width} × {height}, "
        f"rendered densely; iteration {case.trained.iteration}, {len(model):,} Gaussians. Between the frames it is "
        f"interpolation, not a measurement.</p>{markup}"
        "<p class='faint'>Click or drag: crosshair. Right drag: window. Wheel: slice. In 3-D, drag turns.</p></main>"
    )
    style = (
        STYLE
        + "main { max-width: 1200px; margin: 0 auto; padding: 18px; } h1 { font-size: 20px; margin: 0; }"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(document(f"{case.name} – MedGS", body, parts, [script], style), encoding="utf-8")


def smaller(image: nibabel.Nifti1Image, most: int, labels: bool = False) -> nibabel.Nifti1Image:
    """The volume in bytes, at most ``most`` voxels: every second, third ... along its longest axes if it has more.

    Intensities keep their scale; a mask keeps its values.
    """
    values, affine = np.asarray(image.dataobj), image.affine.copy()
    steps = [1, 1, 1]
    while np.prod([-(-side // step) for side, step in zip(values.shape, steps, strict=True)]) > most:
        sides = [side / step for side, step in zip(values.shape, steps, strict=True)]
        steps[int(np.argmax(sides))] += 1
    values = values[:: steps[0], :: steps[1], :: steps[2]]
    affine[:3, :3] *= steps
    out = nibabel.Nifti1Image(values if labels else (values >> 8).astype(np.uint8), affine)
    out.header.set_xyzt_units("mm")
    if not labels:
        slope, intercept = image.header.get_slope_inter()
        # A level of 8 bits stands for 257 of 16: 255 and 65535 are the same value.
        out.header.set_slope_inter(257 * slope, intercept)
    return out
