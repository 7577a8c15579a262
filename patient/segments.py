"""Segments: structures of one source, each with its own name and mask; they may overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from patient.readers.common import listed
from utils.errors import UserError


@dataclass(frozen=True)
class Segment:
    """One structure."""

    number: int
    """Its number in the source, from 1."""
    name: str
    layer: int
    """The layer that holds its mask."""
    value: int
    """The number that its voxels have in that layer."""
    colour: tuple[int, int, int] | None = None
    """Red, green, blue, 0 to 255, if the source gives them."""


@dataclass(frozen=True)
class Segments:
    """What a segmentation file holds: DICOM SEG, RTSTRUCT, a layered .seg.nrrd, or one layer per structure.

    Layers are label maps: segments that do not overlap share one, as in 3D Slicer's files.
    """

    path: str
    segments: tuple[Segment, ...]
    layers: tuple[np.ndarray, ...]
    """(I, J, K) each, whole numbers, 0 outside."""
    affine: np.ndarray | None
    """Voxel indices to RAS millimetres (4, 4)."""
    depths: np.ndarray | None = None
    """As `Volume.depths`."""
    notes: list[str] = field(default_factory=list)
    """What a user should know about how it was read."""

    def mask(self, segment: Segment) -> np.ndarray:
        """(I, J, K) bool."""
        return self.layers[segment.layer] == segment.value

    def find(self, words: Sequence[str | float] | None) -> tuple[Segment, ...]:
        """Segments by number or name; all if `words` is None or ("all",). Raises UserError, which lists them."""
        if words is None or [str(word) for word in words] == ["all"]:
            return self.segments
        chosen = []
        for word in words:
            text = f"{word:g}" if isinstance(word, float) else str(word)
            found = [s for s in self.segments if text == str(s.number)]
            found = found or [s for s in self.segments if text.casefold() == s.name.casefold()]
            if not found:
                raise UserError(f"{self.path} has no segment {text}: it has {self.words()}")
            if len(found) > 1:
                numbers = ", ".join(str(s.number) for s in found)
                raise UserError(
                    f"{self.path} has {len(found)} segments named {text}: say which by number, {numbers}"
                )
            chosen.append(found[0])
        return tuple(dict.fromkeys(chosen))

    def label_map(self, chosen: Sequence[Segment]) -> tuple[np.ndarray, int]:
        """(I, J, K) uint16 of the segments' numbers, and how many voxels are in several: the first gets those."""
        numbers = np.zeros(self.layers[0].shape if self.layers else (0, 0, 0), np.uint16)
        overlap = 0
        for segment in chosen:
            mask = self.mask(segment)
            free = numbers == 0
            overlap += int(np.count_nonzero(mask & ~free))
            numbers[mask & free] = segment.number
        return numbers, overlap

    def words(self) -> str:
        """Numbers and names for a message."""
        return listed((f"{s.number} {s.name}" for s in self.segments), 12) or "none"


def layered(
    masks: Sequence[tuple[int, np.ndarray]], shape: tuple[int, ...]
) -> tuple[list[np.ndarray], list[int]]:
    """Numbered masks as few label maps without overlap (first fit), and the layer of each mask."""
    layers: list[np.ndarray] = []
    where = []
    for number, mask in masks:
        at = next((k for k, layer in enumerate(layers) if not layer[mask].any()), len(layers))
        if at == len(layers):
            layers.append(np.zeros(shape, np.uint16))
        layers[at][mask] = number
        where.append(at)
    return layers, where
