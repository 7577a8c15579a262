"""LPIPS, a perceptual distance between images: a network from an optional package."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

WEIGHTS = "alexnet-owt-7be5be79.pth"


def lpips_distance() -> tuple[Callable[..., float] | None, str]:
    """LPIPS (AlexNet) of two images (1, C, H, W) in [0, 1], or None where it is not
    installed; and its version, or what is missing. Nothing is downloaded."""
    for package in ("torchvision", "lpips"):
        if find_spec(package) is None:
            return None, f"left out: {package} is not installed (pip install torchvision lpips)"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not weights.is_file():
        load = "python -c 'import torchvision.models as m; m.alexnet(weights=\"DEFAULT\")'"
        return None, f"left out: AlexNet's weights are not at {weights}; this fetches them: {load}"
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(network(*(image.float().expand(-1, 3, -1, -1) for image in (a, b)), normalize=True))

    return distance, "AlexNet, version 0.1"
