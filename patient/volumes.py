"""A volume as the readers return it (`patient.readers`)."""

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
    """Voxel indices to RAS millimetres (4, 4); None if the source does not say."""
    bits: int
    """8 if the source stores bytes, else 16: what frames need to keep its values distinct."""
    name: str
    index: int | None = None
    """Which volume of a 4-D source."""
    full_scale: tuple[float, float] | None = None
    """The values of 0 and 1, for sources that are already pictures."""
    depths: np.ndarray | None = None
    """Where the slices of axis 2 lie, as increasing indices of the affine; None where they are 0, 1, ..., K - 1."""
    lossy: bool = False
    """Whether compression changed the values (JPEG, video)."""
    notes: list[str] = field(default_factory=list)
    """What a user should know about how it was read."""
    sizes: Sizes | None = None
    """Without an affine: millimetres of a voxel along each axis, None where unknown."""
    padded: np.ndarray | None = None
    """(I, J, K) bool: voxels that the source marks as not measured; None if there are none."""
    other_affine: np.ndarray | None = None
    """A second affine in the source (NIfTI's other form), if it differs from `affine`."""
    instances: tuple[str, ...] = ()
    """SOP instance UID of the DICOM file of each slice, which segmentations refer to."""
    frame_of_reference: str | None = None
    """UID of DICOM's frame of reference: volumes that share it share patient coordinates."""
    thickness: float | None = None
    """Of the slices of axis 2, mm (DICOM's SliceThickness)."""


@dataclass(frozen=True)
class Choice:
    """Which volume of a source that holds several, and how its place is read; None where no choice is made."""

    frame: int | None = None
    """Index in a 4-D file, from 0; a single volume is read whatever the index."""
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
