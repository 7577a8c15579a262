"""The fixed camera in front of the plane y = 0, and its mirror behind it.

World: x right, z up, y away from the camera. The camera stands at (0, -distance, 0) and looks along +y, so
that image right is +x and image down is -z. The mirror camera stands at (0, +distance, 0) and looks back: its
image is the left-right flip. Pixel centres lie on integers. A point (x, 0, z) is seen at

    u = f x / d + (W - 1) / 2,    v = -f z / d + (H - 1) / 2,    f = W / (2 h),    h = tan(0.6911112070083618
    / 2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HORIZONTAL_FIELD_OF_VIEW = 0.6911112070083618  # radians
NEAR, FAR = 0.01, 100.0  # of the clip volume; drawing does not depend on depth


@dataclass(frozen=True)
class Camera:
    """A pinhole camera at ``distance`` plane units in front of the plane, ``width`` x ``height`` px."""

    width: int
    height: int
    distance: float = 1.0

    def __post_init__(self) -> None:
        if self.width <= 0 or self.height <= 0 or not self.distance > 0:
            raise ValueError(f"a camera needs a positive width, height and distance, got {self}")

    @property
    def aspect(self) -> float:
        return self.width / self.height

    @property
    def tan_fov_x(self) -> float:
        """tan of half the horizontal field of view."""
        return math.tan(HORIZONTAL_FIELD_OF_VIEW / 2)

    @property
    def tan_fov_y(self) -> float:
        """tan of half the vertical field of view: pixels are square."""
        return self.tan_fov_x / self.aspect

    @property
    def focal(self) -> float:
        """Focal length in px, the same along both axes."""
        return self.width / (2 * self.tan_fov_x)

    @property
    def pixels_per_unit(self) -> float:
        """Pixels per plane unit."""
        return self.focal / self.distance

    @property
    def half_width(self) -> float:
        """R: the image shows x in [-R, R], plane units."""
        return self.distance * self.tan_fov_x

    @property
    def half_height(self) -> float:
        """T: the image shows z in [-T, T], plane units."""
        return self.half_width / self.aspect

    def position(
        self,
        mirrored: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Camera centre (3,), world."""
        y = self.distance if mirrored else -self.distance
        return torch.tensor([0.0, y, 0.0], dtype=dtype, device=device)

    def view_matrix(
        self,
        mirrored: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """World to view, (4, 4) in the row-vector convention: ``p_view = [p, 1] @ view_matrix``."""
        side = -1.0 if mirrored else 1.0
        return torch.tensor(
            [
                [side, 0.0, 0.0, 0.0],
                [0.0, 0.0, side, 0.0],
                [0.0, -1.0, 0.0, 0.0],
                [0.0, 0.0, self.distance, 1.0],
            ],
            dtype=dtype,
            device=device,
        )

    def projection_matrix(
        self,
        mirrored: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """World to clip, (4, 4) in the row-vector convention: the view matrix times the perspective."""
        depth = FAR / (FAR - NEAR)
        perspective = torch.tensor(
            [
                [1 / self.tan_fov_x, 0.0, 0.0, 0.0],
                [0.0, 1 / self.tan_fov_y, 0.0, 0.0],
                [0.0, 0.0, depth, 1.0],
                [0.0, 0.0, -depth * NEAR, 0.0],
            ],
            dtype=dtype,
            device=device,
        )
        return self.view_matrix(mirrored, dtype, device) @ perspective

    def entries(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The contents of ``cameras.json``, as 3-D Gaussian splatting programs write it: one entry per frame.

        ``rotation`` is camera to world (its columns are the camera's right, down and forward axes), ``fx``
        and ``fy`` are in px. All frames share the camera: their times are not part of this format.
        """
        return [
            {
                "id": i,
                "img_name": name,
                "width": self.width,
                "height": self.height,
                "position": self.position().tolist(),
                "rotation": self.view_matrix()[:3, :3].tolist(),
                "fy": self.focal,
                "fx": self.focal,
            }
            for i, name in enumerate(names)
        ]
