"""Masks between frames: a small network that learns how contours follow the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from in_between.classical import signed_distances
from in_between.networks import ContinuedEdges, convolutions, corners_of, pixels_of, trained
from in_between.progress import Done, unheard
from in_between.settings import ContourSettings


def distances_of(masks: Tensor, gap: float = 1.0, background: bool = False) -> Tensor:
    """Signed distances in pixels (`classical.signed_distances`) of masks (K, 1, H, W), inside where >= 0.5."""
    inside = (masks[:, 0] >= 0.5).cpu().numpy()
    return torch.from_numpy(signed_distances(inside, gap=gap, background=background))[:, None].to(
        masks.device
    )


def with_areas(distances: Tensor, areas: Tensor, most: float) -> Tensor:
    """Signed distances (B, 1, H, W), raised or lowered by at most ``most`` until so many pixels (B,) are above 0."""
    values = distances.flatten(1).sort(1, descending=True).values
    count = areas.round().long()[:, None]
    last = values.shape[1] - 1
    edges = values.gather(1, (count - 1).clamp(0, last)), values.gather(1, count.clamp(0, last))
    shift = (-(edges[0] + edges[1]) / 2).clamp(-most, most)
    return distances + torch.where(count > 0, shift, 0.0).view(-1, 1, 1, 1)


class Contours(nn.Module):
    """The correction to signed distances (B, 1, H, W) carried along the motion, given what the image shows."""

    def __init__(self, channels: int, settings: ContourSettings) -> None:
        super().__init__()
        network = settings.network
        *layers, last = convolutions(2 + channels, network, nn.Conv2d(network.width, 1, 3))
        self.layers = nn.Sequential(*layers, ContinuedEdges(), last)

    def forward(self, moved: Tensor, still: Tensor, images: Tensor) -> Tensor:
        seen = [moved.clamp(-8, 8) / 4, still.clamp(-8, 8) / 4, 4 * (images - 0.3)]
        return 4 * self.layers(torch.cat(seen, 1))


def learn_contours(
    moved: Tensor,
    still: Tensor,
    images: Tensor,
    masks: Tensor,
    settings: ContourSettings,
    generator: torch.Generator,
    done: Done = unheard,
) -> Contours | None:
    """Trains on the frames between two others, whose masks are known; None where none shows a contour."""
    channels, height, width = images.shape[1:]
    size, batch = min(settings.patch, height, width), settings.network.batch
    near = (moved.abs().minimum(still.abs()) < 2)[:, 0].nonzero().cpu()  # the pixels in question
    if not len(near):
        return None
    everything = (
        torch.cat([moved, still, images, masks], 1).permute(0, 2, 3, 1).flatten(0, 2)
    )  # (K H W, C + 3)
    window = torch.arange(size, device=images.device)

    def draw(_: int) -> Tensor:
        pick = near[torch.randint(len(near), (batch,), generator=generator)]
        k, y, x = pick.unbind(1)
        y, x = (
            (at - size // 2).clamp_min(0).clamp_max(most)
            for at, most in ((y, height - size), (x, width - size))
        )
        return corners_of((k * height + y) * width + x, (size, size), (width, 1), generator)

    def loss(network: Contours, drawn: Tensor) -> Tensor:
        patch = everything[pixels_of(drawn, window, window)].permute(0, 3, 1, 2)
        moved, still, seen, truth = patch.split([1, 1, channels, 1], 1)
        logits = 4 * (moved + network(moved, still, seen))
        return F.binary_cross_entropy_with_logits(logits, truth)

    return trained(
        lambda: Contours(channels, settings), draw, loss, settings.network, images.device, generator, done
    )
