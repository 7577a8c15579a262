"""Small convolutional networks, trained in seconds on the data at hand."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from in_between.progress import Done, unheard
from in_between.settings import NetworkSettings

Network = TypeVar("Network", bound=nn.Module)


def trained(
    make: Callable[[], Network],
    loss: Callable[[Network, int], Tensor],
    shapes: Sequence[tuple[int, ...]],
    settings: NetworkSettings,
    device: torch.device,
    generator: torch.Generator,
    done: Done = unheard,
) -> Network:
    """The network that `make` returns, after AdamW on `loss(network, i)`, which calls it once with tensors of `shapes`.

    All randomness comes from `generator`.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        network = make().to(device)
        with _recorded(network, shapes, device):
            optimizer = torch.optim.AdamW(
                network.parameters(), lr=settings.rate, weight_decay=1e-4, fused=device.type == "cuda"
            )
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, settings.rate, total_steps=settings.iterations
            )
            for i in range(settings.iterations):
                optimizer.zero_grad()
                loss(network, i).backward()
                optimizer.step()
                schedule.step()
                done((i + 1) / settings.iterations)
    return network.requires_grad_(False)


@contextlib.contextmanager
def _recorded(network: nn.Module, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Iterator[None]:
    """On a GPU, records the network's small kernels and replays them for calls with tensors of `shapes`: launched one
    by one, they would wait for Python."""
    if device.type != "cuda":
        yield
        return
    # Recording works on the current GPU, whichever the tensors are on.
    with torch.cuda.device(device), warnings.catch_warnings():
        # Gradients are summed on another stream than they are recorded on: torch waits where it must, and says so.
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        torch.cuda.make_graphed_callables(
            network, tuple(torch.zeros(shape, device=device) for shape in shapes)
        )
        yield
        torch.cuda.synchronize()  # a recording's memory must outlive its last replay
        vars(network).pop("forward", None)


class ContinuedEdges(nn.Module):
    """One more pixel on each side, a copy of the outermost: torch's own padding has no deterministic gradient on a
    GPU."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., :1], x, x[..., -1:]], -1)
        return torch.cat([x[..., :1, :], x, x[..., -1:, :]], -2)


def convolutions(inputs: int, settings: NetworkSettings, last: nn.Conv2d) -> nn.Sequential:
    """`settings.depth` - 1 convolutions of 3 x 3, and `last`, which starts as the zero function."""
    layers: list[nn.Module] = []
    for channels in [inputs] + [settings.width] * (settings.depth - 2):
        layers += [ContinuedEdges(), nn.Conv2d(channels, settings.width, 3), nn.LeakyReLU(0.1)]
    assert last.bias is not None
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def flipped(patches: Tensor, generator: torch.Generator) -> Tensor:
    """Patches (B, H, W, ...), flipped along H, W, both or neither, at random."""
    bits = int(torch.randint(4, (1,), generator=generator))
    return patches.flip([axis for axis in (1, 2) if bits & axis])
