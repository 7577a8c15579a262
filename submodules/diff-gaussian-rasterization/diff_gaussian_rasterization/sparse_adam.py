"""Adam on the rows that a view saw: the optimiser that programs switch to where the rasteriser offers it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SparseGaussianAdam(torch.optim.Adam):
    """Adam (Kingma and Ba 2015) whose step moves visible Gaussians only; moments of the others stay as they are.

    Without bias correction, since each Gaussian has had a number of steps of its own. State and groups are those of
    torch.optim.Adam; every group has one parameter, of N rows.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, eps: float) -> None:
        super().__init__(params=params, lr=lr, eps=eps)

    @torch.no_grad()
    def step(self, visibility: Tensor, N: int) -> None:  # type: ignore[override]
        """visibility: bool (N,), which Gaussians move; N: how many there are."""
        if visibility.shape != (N,):
            raise ValueError(f"visibility must have shape ({N},), got {tuple(visibility.shape)}")
        visibility = visibility.bool()
        for group in self.param_groups:
            (parameter,) = group["params"]
            if parameter.grad is None:
                continue
            if len(parameter) != N:
                raise ValueError(f"{group.get('name', 'a parameter')} has {len(parameter)} rows, not {N}")
            beta1, beta2 = group["betas"]
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            mean, square, gradient = state["exp_avg"], state["exp_avg_sq"], parameter.grad
            seen = visibility.view(N, *[1] * (parameter.dim() - 1))
            # Where, not indices: those would wait for the device.
            mean.copy_(torch.where(seen, beta1 * mean + (1 - beta1) * gradient, mean))
            square.copy_(torch.where(seen, beta2 * square + (1 - beta2) * gradient**2, square))
            parameter.sub_(torch.where(seen, group["lr"] * mean / (square.sqrt() + group["eps"]), 0))
