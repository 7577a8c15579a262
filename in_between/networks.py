"""Small convolutional networks, trained in seconds on the data at hand."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
    """The network that `make` returns, trained by `loss(network, i)`, which calls it once with tensors of `shapes`.

    Weights between hidden layers take Muon's steps, all others AdamW's: this reaches the same loss in a third of the
    iterations that AdamW alone needs. All randomness comes from `generator`.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        network = make().to(device)
        with _recorded(network, shapes, device):
            hidden = [
                layer.weight
                for layer in network.modules()
                if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels
            ]
            others = [
                value for value in network.parameters() if all(value is not weight for weight in hidden)
            ]
            optimizers = [
                Muon(hidden, settings.hidden_rate),
                torch.optim.AdamW(others, settings.rate, weight_decay=1e-4, fused=device.type == "cuda"),
            ]
            share = partial(_rate, iterations=settings.iterations)
            schedules = [torch.optim.lr_scheduler.LambdaLR(each, share) for each in optimizers]
            for i in range(settings.iterations):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss(network, i).backward()
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                done((i + 1) / settings.iterations)
    return network.requires_grad_(False)


def _rate(i: int, iterations: int) -> float:
    """Learning rate at iteration i relative to the highest: a short warm-up, then half a cosine."""
    rise = max(1, iterations // 10)
    if i < rise:
        return (i + 1) / rise
    return (1 + math.cos(math.pi * (i - rise) / max(1, iterations - rise))) / 2


class Muon(torch.optim.Optimizer):
    """Steps along the momentum, orthogonalised (Jordan et al. 2024): every direction of a layer learns equally fast.

    Weights are convolutions' (out, in, height, width), all of one shape. Five Newton-Schulz iterations with the
    published coefficients bring all singular values near 1.
    """

    def __init__(
        self, weights: Sequence[Tensor], lr: float, momentum: float = 0.9, decay: float = 1 / 30
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = group["params"]
            gradients = torch.stack([weight.grad.flatten(1) for weight in weights])  # (layers, out, in * 9)
            state = self.state[weights[0]]
            mean = state.setdefault("mean", torch.zeros_like(gradients))
            mean.lerp_(gradients, 1 - group["momentum"])
            steps = _orthogonal(gradients.lerp(mean, group["momentum"]))
            for weight, step in zip(weights, steps, strict=True):
                weight.mul_(1 - group["lr"] * group["decay"]).sub_(step.view_as(weight), alpha=group["lr"])


def _orthogonal(matrices: Tensor) -> Tensor:
    """(B, m, n) with m <= n: the same singular vectors, singular values of about 0.7 to 1.2."""
    x = matrices / (matrices.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


@contextlib.contextmanager
def _recorded(network: nn.Module, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Iterator[None]:
    """On a GPU, records the network's small kernels and replays them for calls with tensors of `shapes`: launched one
    by one, they would wait for Python."""
    if device.type != "cuda":
        yield
        return
    # Recording uses the current GPU, whichever one holds the tensors.
    with torch.cuda.device(device), warnings.catch_warnings():
        # Gradients are summed on a different stream from the recording's: torch waits where it must, and warns.
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
