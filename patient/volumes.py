"""A volume as its readers give it (`patient.readers`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Sizes = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class Volume:
    """Voxels and their place."""

    values: np.ndarray
    """(I, J, K), or (I, J, K, 3 or 4) for colours: numbers in the source's own scale."""
    affine: np.ndarray | None
    """Voxel indices to RAS millimetres (4, 4); None where the source does not say."""
    bits: int
    """8 where the source stores bytes, else 16: what frames need to keep it apart."""
    name: str
    index: int | None = None
    """Which volume of a 4-D source."""
    full_scale: tuple[float, float] | None = None
    """What 0 and 1 are, for sources that are pictures already."""
    depths: np.ndarray | None = None
    """Where the slices of axis 2 lie, as increasing indices of the affine; None where they are 0, 1, ..., K - 1."""
    lossy: bool = False
    """Whether the values are near what was measured or drawn, but not it (JPEG, video)."""
    notes: list[str] = field(default_factory=list)
    """What a user should know about how it was read."""
    sizes: Sizes | None = None
    """Millimetres of a voxel along each axis where there is no affine, None where that axis is not known."""
    padded: np.ndarray | None = None
    """(I, J, K) bool: voxels that the source marks as outside what was measured; None where there are none."""
    other_affine: np.ndarray | None = None
    """Another place that the source states for itself (NIfTI's second form), where it differs from `affine`."""
    instances: tuple[str, ...] = ()
    """SOP instance UID of the DICOM file of each slice, which segmentations refer to."""
    frame_of_reference: str | None = None
    """UID of DICOM's frame of reference: what shares it has the same patient millimetres."""


@dataclass(frozen=True)
class Choice:
    """Which volume of a source that holds several, and how its place is read; None where there is nothing to choose."""

    frame: int | None = None
    """Index in a 4-D file, from 0; where there is one alone, it is read whatever the index."""
    series: str | None = None
    """UID of a DICOM series."""
    acquisition: int | None = None
    """Acquisition number of a DICOM series that holds several."""
    echo: int | None = None
    """Echo number, likewise."""
    time: int | None = None
    """Temporal position, likewise."""
    form: str | None = None
    """q or s: which of NIfTI's two affines."""
    resample: float | None = None
    """Millimetres of the regular grid that a tracked sequence is resampled to."""
