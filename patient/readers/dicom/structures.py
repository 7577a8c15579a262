"""DICOM structure sets (RTSTRUCT): closed contours as masks on the slices of their image.

The rule: a pixel is inside a structure if its centre lies inside an odd number of the structure's contours on that
slice. So an inner contour is a hole, and so is the inner loop of a keyhole contour. A contour belongs to the slice
nearest to its middle, within half a gap; points a little off that plane are projected on it.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from nibabel.affines import apply_affine
from skimage.draw import polygon

from patient.geometry import swap_ras_lps
from patient.readers.dicom.files import Header, items, number, numbers, text
from patient.readers.dicom.segments import check_reference
from patient.segments import Segment, Segments, layered
from patient.volumes import Volume
from utils.errors import UserError

_FLAT = 0.5  # of a slice: how far apart the points of one contour may lie across the slices
_NOTED = 0.05  # of a slice: from where that is said
_SAME_PLANE = 0.05  # of a slice


def read(header: Header, reference: Volume | None) -> Segments:
    """The structures of a set on the grid of `reference`, which must have an affine."""
    path = header.path
    if reference is None or reference.affine is None:
        raise UserError(
            f"{path} is a structure set: contours in millimetres, which need an image with a place (-i)"
        )
    notes: list[str] = []
    check_reference(header, reference, _referenced(header), notes)
    names = {
        int(which): text(item, "ROIName") or f"structure {which:g}"
        for item in items(header.dataset, "StructureSetROISequence")
        if (which := number(item, "ROINumber")) is not None
    }
    shape = reference.values.shape[:3]
    masks: dict[int, np.ndarray] = {}
    colours: dict[int, tuple[int, int, int]] = {}
    left_out = points = beyond = 0
    bent = 0.0
    for item in items(header.dataset, "ROIContourSequence"):
        which = number(item, "ReferencedROINumber")
        if which is None or int(which) < 1:
            continue
        colour = numbers(item, "ROIDisplayColor", 3)
        if colour is not None and (colour >= 0).all() and (colour <= 255).all():
            colours[int(which)] = tuple(int(level) for level in colour)  # type: ignore[assignment]
        contours = []
        for contour in items(item, "ContourSequence"):
            data = numbers(contour, "ContourData")
            kind = text(contour, "ContourGeometricType")
            if not kind.startswith("CLOSED"):
                points += 1
            elif data is None or data.size % 3 or data.size < 9:
                raise UserError(
                    f"{path} is damaged: a contour of {names.get(int(which), which)} has no points"
                )
            else:
                contours.append(
                    apply_affine(np.linalg.inv(reference.affine), swap_ras_lps(data.reshape(-1, 3)))
                )
        mask, outside, thinned, off = _fill(str(path), contours, reference)
        bent = max(bent, off)
        beyond += outside
        left_out += thinned
        if mask.any():
            masks[int(which)] = mask
    if points:
        notes.append(f"{points} contours are points or open lines, which enclose nothing")
    if bent > _NOTED:
        notes.append(f"points of a contour lie up to {bent:.2g} slices apart: they are projected on one")
    if beyond:
        notes.append(f"{beyond} contours lie on no slice of {reference.name}")
    if left_out:
        notes.append(f"{left_out} contours lie between slices, where nearer ones are")
    empty = [name for which, name in names.items() if which not in masks]
    if empty:
        notes.append(f"structures without any voxel: {', '.join(empty[:8])}")
    layers, where = layered(sorted(masks.items()), shape)
    found = [
        Segment(which, names.get(which, f"structure {which}"), layer, which, colours.get(which))
        for which, layer in zip(sorted(masks), where, strict=True)
    ]
    if not found:
        raise UserError(f"{path} has no closed contour on the slices of {reference.name}")
    return Segments(str(path), tuple(found), tuple(layers), reference.affine, reference.depths, notes)


def _referenced(header: Header) -> set[str]:
    """Instance UIDs of the images that contours were drawn on."""
    found = set()
    for frame in items(header.dataset, "ReferencedFrameOfReferenceSequence"):
        for study in items(frame, "RTReferencedStudySequence"):
            for series in items(study, "RTReferencedSeriesSequence"):
                for image in items(series, "ContourImageSequence"):
                    found.add(text(image, "ReferencedSOPInstanceUID"))
    return found


def _fill(path: str, contours: list[np.ndarray], reference: Volume) -> tuple[np.ndarray, int, int, float]:
    """The mask (I, J, K) of closed contours in voxel indices, how many lie on no slice, how many between slices, and
    how far a contour's points lie apart across the slices."""
    shape = reference.values.shape[:3]
    mask = np.zeros(shape, bool)
    if not contours:
        return mask, 0, 0, 0.0
    spread = np.max([np.ptp(contour, axis=0) for contour in contours], axis=0)
    axis = int(spread.argmin())
    if spread[axis] > _FLAT:
        raise UserError(
            f"{path}: its contours do not lie in planes of {reference.name}'s voxels: resample the image"
        )
    first, second = (other for other in range(3) if other != axis)
    places = np.arange(shape[axis], dtype=float)
    if axis == 2 and reference.depths is not None:
        places = reference.depths
    gap = float(np.median(np.diff(places))) if len(places) > 1 else 1.0
    on_slice: dict[int, list[tuple[float, np.ndarray]]] = defaultdict(list)
    outside = 0
    for contour in contours:
        depth = float(contour[:, axis].mean())
        slot = int(np.abs(places - depth).argmin())
        if abs(places[slot] - depth) > 0.5 * gap + 1e-6:
            outside += 1
        else:
            on_slice[slot].append((depth, contour))
    view = np.moveaxis(mask, axis, 0)
    thinned = 0
    for slot, those in on_slice.items():
        nearest = min(abs(depth - places[slot]) for depth, _ in those)
        for depth, contour in those:
            if abs(depth - places[slot]) > nearest + _SAME_PLANE * gap:
                thinned += 1
                continue
            inside = np.zeros(view.shape[1:], bool)
            inside[polygon(contour[:, first], contour[:, second], inside.shape)] = True
            view[slot] ^= inside
    return mask, outside, thinned, float(spread[axis])
