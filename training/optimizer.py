"""Adam with a named group per parameter, and the schedule of rates and harmonics."""

from __future__ import annotations

import math

import torch

from arguments import OptimisationOptions
from scene.gaussian_model import GaussianModel
from scene.parameters import PARAMETERS, SEGMENTATION, SEGMENTATION_HEAD
from utils.compiler import spare_the_compiler


def make_optimizer(
    model: GaussianModel,
    options: OptimisationOptions,
    head_only: bool = False,
    kind: type[torch.optim.Adam] = torch.optim.Adam,
) -> torch.optim.Adam:
    """Adam, or the subclass ``kind``, with one named group per parameter, in the order of the published checkpoint.
    `set_rates` sets the rate of xyz. With ``head_only`` one group, "seg_head", and everything else is frozen."""
    spare_the_compiler()
    if head_only:
        for name, parameter in model.named_parameters().items():
            parameter.requires_grad_(name in SEGMENTATION_HEAD)
        parameters = [model.params[name] for name in SEGMENTATION_HEAD]
        groups = [{"params": parameters, "lr": options.seg_head_lr, "name": "seg_head"}]
        return kind(groups, lr=0.0, eps=options.adam_eps)
    rates = {name: _rate(name, options) for name in model.params}
    groups = [{"params": [model.params[name]], "lr": rate, "name": name} for name, rate in rates.items()]
    if model.uses_dff:  # behind the geometry and the image head, before the segmentation head
        place = sum(PARAMETERS[name].head != SEGMENTATION for name in model.params)
        times = {"params": [model.time_func], "lr": options.time_func_lr, "name": "time_func"}
        groups.insert(place, times)
    return kind(groups, lr=0.0, eps=options.adam_eps)


def _rate(name: str, options: OptimisationOptions) -> float:
    parameter = PARAMETERS[name]
    if parameter.rate is None:
        return 0.0
    rate: float = getattr(options, parameter.rate)
    return rate / getattr(options, parameter.divisor) if parameter.divisor else rate


def set_rates(
    model: GaussianModel,
    optimizer: torch.optim.Adam,
    iteration: int,
    options: OptimisationOptions,
    extent: float,
) -> None:
    """The schedule: xyz's rate decays log-linearly, relative to ``extent``, and at regular intervals one more degree of
    the harmonics comes into use."""
    share = min(max(iteration / options.position_lr_max_steps, 0), 1)
    log_rate = (1 - share) * math.log(options.position_lr_init) + share * math.log(options.position_lr_final)
    for group in optimizer.param_groups:
        if group["name"] == "xyz":
            group["lr"] = extent * math.exp(log_rate)
    if iteration % options.sh_degree_interval == 0:
        model.active_sh_degree = min(model.active_sh_degree + 1, model.sh_degree)
