"""Ends a run at the first value that is not finite, and names it: a NaN Gaussian is not drawn, so the loss alone
would never show it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from scene.checkpoint import all_of
from scene.gaussian_model import GaussianModel
from utils.errors import UserError


def magnitudes(model: GaussianModel) -> dict[str, Tensor]:
    """The largest absolute value, () each, of every gradient and parameter; not finite if any of its values is
    not."""
    parameters = model.named_parameters()
    named = {f"gradient of {name}": parameter.grad for name, parameter in parameters.items()}
    named |= {name: parameter.detach() for name, parameter in parameters.items()}
    present = {name: value for name, value in named.items() if value is not None and value.numel()}
    return dict(zip(present, torch._foreach_norm(list(present.values()), torch.inf), strict=True))


def moments(model: GaussianModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The same of the optimizer's moments."""
    return {
        f"{key} (of Adam) of {name}": moment.norm(torch.inf)
        for name, parameter in model.named_parameters().items()
        for key, moment in optimizer.state.get(parameter, {}).items()
        if moment.numel()
    }


def not_finite(folder: Path, name: str, iteration: int) -> UserError:
    """The error of a run with its output in ``folder`` where ``name`` is not finite."""
    earlier = [f"chkpnt{n}.pth" for n in all_of(folder) if n < iteration]
    kept = f"; {earlier[-1]} is kept" if earlier else ""
    return UserError(
        f"iteration {iteration}: the {name} is not finite{kept}; lower the learning rates or the weights "
        "of the losses (--debug looks at every iteration)"
    )
