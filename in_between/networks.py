"""Small convolutional networks, trained in seconds on the data at hand."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from in_between.progress import Done, unheard
from in_between.settings import NetworkSettings

Network = TypeVar("Network", bound=nn.Module)
_UNRECORDED = 3  # iterations on a GPU before one is recorded: torch sets up its libraries in the first


def trained(
    make: Callable[[], Network],
    draw: Callable[[int], Tensor],
    loss: Callable[[Network, Tensor], Tensor],
    settings: NetworkSettings,
    device: torch.device,
    generator: torch.Generator,
    done: Done = unheard,
) -> Network:
    """The network that `make` returns, trained by `loss(network, drawn)`, where `draw(i)` says on the CPU, as integers,
    which patches iteration i sees.

    Weights between hidden layers take Muon's steps, all others AdamW's: this reaches the same loss in a third of the
    iterations that AdamW alone needs. All randomness comes from `generator`.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        network = make().to(device)
        count = settings.iterations
        drawn = torch.stack([draw(i) for i in range(count)]).to(
            device
        )  # of all iterations, as a GPU must not wait
        hidden = [
            layer.weight
            for layer in network.modules()
            if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels
        ]
        others = [value for value in network.parameters() if all(value is not weight for weight in hidden)]
        muon, adamw = Muon(hidden, settings.hidden_rate), AdamW(others, settings.rate, count, device)
        shares = torch.tensor([_rate(i, count) for i in range(count)], device=device)
        now = torch.zeros(1, dtype=torch.long, device=device)

        def iterate() -> None:
            loss(network, drawn[now][0]).backward()
            share = shares[now]
            muon.step(share)
            adamw.step(share, now)
            network.zero_grad(set_to_none=True)
            now.add_(1)

        with _repeated(iterate, device) as repeat:
            for i in range(count):
                repeat()
                done((i + 1) / count)
    return network.requires_grad_(False)


@contextlib.contextmanager
def _repeated(iterate: Callable[[], None], device: torch.device) -> Iterator[Callable[[], None]]:
    """Yields `iterate`; on a GPU a form of it that is recorded once it has run a few times, and then replayed: launched
    one by one, its small kernels would wait for Python."""
    if device.type != "cuda":
        yield iterate
        return
    graph, runs = torch.cuda.CUDAGraph(), 0
    side = torch.cuda.Stream(device)  # the default stream cannot be recorded

    def repeat() -> None:
        nonlocal runs
        if runs < _UNRECORDED:
            iterate()
        else:
            if runs == _UNRECORDED:
                graph.capture_begin(capture_error_mode="thread_local")
                iterate()  # does nothing yet
                graph.capture_end()
            graph.replay()
        runs += 1

    # Recording uses the current GPU, whichever one holds the tensors.
    with torch.cuda.device(device):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            yield repeat
        torch.cuda.current_stream().wait_stream(side)
        side.synchronize()  # a recording's memory must outlive its last replay


def _rate(i: int, iterations: int) -> float:
    """Learning rate at iteration i relative to the highest: a short warm-up, then half a cosine."""
    rise = max(1, iterations // 10)
    if i < rise:
        return (i + 1) / rise
    return (1 + math.cos(math.pi * (i - rise) / max(1, iterations - rise))) / 2


class Muon:
    """Steps along the momentum, orthogonalised (Jordan et al. 2024): every direction of a layer learns equally fast.

    Weights are convolutions' (out, in, height, width), all of one shape. Five Newton-Schulz iterations with the
    published coefficients bring all singular values near 1.
    """

    def __init__(
        self, weights: Sequence[Tensor], rate: float, momentum: float = 0.9, decay: float = 1 / 30
    ) -> None:
        self.weights, self.rate, self.momentum, self.decay = weights, rate, momentum, decay
        self.mean = torch.stack(
            [torch.zeros_like(weight).flatten(1) for weight in weights]
        )  # (layers, out, in * 9)

    @torch.no_grad()
    def step(self, share: Tensor) -> None:
        """One step; share: () or (1,), of the highest learning rate."""
        rate = self.rate * share
        gradients = torch.stack(
            [weight.grad.flatten(1) for weight in self.weights if weight.grad is not None]
        )
        self.mean.lerp_(gradients, 1 - self.momentum)
        steps = _orthogonal(gradients.lerp(self.mean, self.momentum)) * rate
        for weight, step in zip(self.weights, steps, strict=True):
            weight.mul_(1 - rate * self.decay).sub_(step.view_as(weight))


class AdamW:
    """Loshchilov and Hutter 2019, with all that changes from step to step on the device, so that steps can be recorded.
    (torch's own imports torch's compiler.)"""

    _BETAS, _EPSILON, _DECAY = (0.9, 0.999), 1e-8, 1e-4

    def __init__(self, weights: Sequence[Tensor], rate: float, steps: int, device: torch.device) -> None:
        self.weights, self.rate = list(weights), rate
        self.first = [torch.zeros_like(weight) for weight in weights]
        self.second = [torch.zeros_like(weight) for weight in weights]
        ends = torch.arange(1, steps + 1, dtype=torch.float64)
        first, second = (1 - beta**ends for beta in self._BETAS)
        self._corrections = torch.stack([1 / first, second.rsqrt()], 1).float().to(device)  # (steps, 2)

    @torch.no_grad()
    def step(self, share: Tensor, number: Tensor) -> None:
        """Step `number` (1,), from 0; share: () or (1,), of the highest learning rate."""
        of_first, of_second = self._corrections[number][0].unbind()
        rate = (self.rate * share).squeeze()
        for weight, first, second in zip(self.weights, self.first, self.second, strict=True):
            assert weight.grad is not None
            first.lerp_(weight.grad, 1 - self._BETAS[0])
            second.mul_(self._BETAS[1]).addcmul_(weight.grad, weight.grad, value=1 - self._BETAS[1])
            step = first / (second.sqrt().mul_(of_second).add_(self._EPSILON))
            weight.mul_(1 - rate * self._DECAY).sub_(step.mul_(rate * of_first))


def _orthogonal(matrices: Tensor) -> Tensor:
    """(B, m, n) with m <= n: the same singular vectors, singular values of about 0.7 to 1.2."""
    x = matrices / (matrices.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


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


def corners_of(
    first: Tensor, size: tuple[int, int], strides: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Patches of `size` whose first pixels are at `first` (B,) in a flattened array, with these strides along their two
    axes, all flipped along one, both or neither at random: (B, 3), the corner where each begins and its two strides."""
    bits = int(torch.randint(4, (1,), generator=generator))
    along = list(strides)
    for axis in (0, 1):
        if bits >> axis & 1:
            first = first + (size[axis] - 1) * along[axis]
            along[axis] = -along[axis]
    return torch.stack([first, *(torch.full_like(first, stride) for stride in along)], 1)


def pixels_of(corners: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Where the pixels of patches (B, 3) lie (`corners_of`), (B, H, W). down, across: arange(H), arange(W)."""
    first, rows, columns = corners[:, :, None, None].unbind(1)
    return first + rows * down[:, None] + columns * across
