"""A volume as its readers give it (`patient.readers`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


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


@dataclass(frozen=True)
class Choice:
    """Which volume of a source that holds several; None where there is nothing to choose."""

    frame: int | None = None
    """Index in a 4-D file, from 0; where there is one alone, it is read whatever the index."""
    series: str | None = None
    """UID of a DICOM series."""
