#!/usr/bin/env python3
"""Makes in_between/rows.npz: initial weights of the self-super-resolution network, before it learns from a volume.

    python -m benchmarks.pretrain_rows

It learns to fill in left-out rows of photographs that come with scikit-image, all of them in the public domain or CC0
(`PICTURES`; see skimage/data/README.txt): no medical data, so none of the scored cases. They are shrunk and blurred at
random to be as smooth as tissue, and their contrast is changed and inverted. Takes minutes on two cores.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ROOT
from in_between.flow import blur
from in_between.networks import trained
from in_between.rows import RowsBetween, between_matrix
from in_between.settings import DEFAULT, NetworkSettings
from utils.errors import ArgumentParser, positive, run
from utils.files import atomic_write
from utils.images import read_image, to_grey

PICTURES = (
    "astronaut.png",  # NASA
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",  # NASA
    "microaneurysms.png",
    "moon.png",  # NASA
    "retina.jpg",
    "rocket.jpg",  # SpaceX
)
SIZES = (1.0, 0.7, 0.5, 0.35, 0.25)  # of each picture
GAPS = (2, 3, 4, 2, 3, 6, 2, 8)  # pixels from row to row, in turn
LONGEST = 97  # rows of a patch


def pictures() -> list[Tensor]:
    """Grey pictures, (H, W) in [0, 1], each in several sizes."""
    folder, out = Path(skimage.data.__file__).parent, []
    for name in PICTURES:
        whole = torch.from_numpy(to_grey(read_image(folder / name)))[None, None]
        for share in SIZES:
            size = [round(share * side) for side in whole.shape[2:]]
            if min(size) > LONGEST:
                out.append(F.interpolate(whole, size=size, mode="bilinear", antialias=True)[0, 0])
    return out


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=positive, default=4000, metavar="N", help="(default: 4000)")
    parser.add_argument("--out", type=Path, default=ROOT / "in_between" / "rows.npz", help="file to write")
    given = parser.parse_args()
    images, settings = pictures(), DEFAULT.rows
    weights = torch.tensor([float(image.numel()) for image in images]).sqrt()
    generator = torch.Generator().manual_seed(0)
    start, average = time.process_time(), 0.0

    def patch(image: Tensor, rows: int, columns: int) -> Tensor:
        y, x = (
            int(torch.randint(side - taken + 1, (1,), generator=generator))
            for side, taken in zip(image.shape, (rows, columns), strict=True)
        )
        cut = image[y : y + rows, x : x + columns]
        contrast, sign, mean = torch.rand(3, generator=generator).tolist()
        contrast = (0.3 + 1.2 * contrast) * (1 if sign < 0.5 else -1)
        return (cut - cut.mean()) * contrast + 0.15 + 0.5 * mean

    def loss(network: RowsBetween, drawn: Tensor) -> Tensor:
        nonlocal average
        i = int(drawn)
        gap = GAPS[i % len(GAPS)]
        count = min(settings.rows, (LONGEST - 1) // gap + 1)
        chosen = torch.multinomial(weights, settings.network.batch, True, generator=generator).tolist()
        turned = [images[k].T if i % 2 else images[k] for k in chosen]
        cuts = torch.stack([patch(image, (count - 1) * gap + 1, settings.columns) for image in turned])
        sigma = 1.2 * float(torch.rand(1, generator=generator))
        if sigma > 0.3:
            cuts = blur(cuts[:, None], sigma)[:, 0]
        bits = int(torch.randint(4, (1,), generator=generator))
        cuts = cuts.clamp(0, 1).flip([axis for axis in (1, 2) if bits & axis])
        truth = torch.einsum("srl,blw->bsrw", between_matrix(count, gap).to(cuts), cuts)
        error = 1000 * (network(cuts[:, None, ::gap]) - truth).square().mean()
        average += (error.item() - average) / min(i + 1, 200)
        if i % 200 == 199:
            print(
                f"{i + 1}: loss {average:.3f}, {time.process_time() - start:.0f} processor seconds",
                flush=True,
            )
        return error

    long = NetworkSettings(settings.network.width, settings.network.depth, given.iterations)
    network = trained(
        lambda: RowsBetween(settings, None), torch.tensor, loss, long, torch.device("cpu"), generator
    )
    values = {name: value.numpy().astype(np.float16) for name, value in network.state_dict().items()}
    with atomic_write(given.out) as unfinished:
        np.savez(unfinished, **values)
    print(f"{sum(value.size for value in values.values())} weights in {given.out}")


if __name__ == "__main__":
    run(main)
