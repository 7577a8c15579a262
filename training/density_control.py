"""Adaptive density control: which Gaussians are cloned, split and pruned, and how model and optimizer are rebuilt.

Separate from the model on purpose: :func:`take_rows` is the only place that replaces per-Gaussian tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from arguments import OptimisationOptions, TrainOptions
from gaussian_renderer import rasterizer
from scene.cameras import Camera
from scene.checkpoint import Checkpoint
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE, SEGMENTATION, head_parameters, numbers_per_gaussian
from utils.errors import UserError
from utils.memory import free_memory

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MEMORY_SHARE = 0.5  # of the free memory: what the model and its training may take by default


class DensityControl:
    """Statistics of the Gaussians since the last density step, and the step itself.

    statistics: max_radii2D (N,) px; xyz_gradient_accum (N, 1), sums of |dL/d(screen position)| in NDC units;
        m_gradient_accum (N, 1), sums of |dL/d m_raw|; denom and m_denom (N, 1), how often each was added to.
    """

    def __init__(self, model: GaussianModel, statistics: dict[str, Tensor] | None = None) -> None:
        self.statistics = dict(statistics) if statistics else _zeros(len(model), model.device)

    def observe(
        self,
        radii: Tensor,
        active: Tensor,
        test: int,
        screen_gradients: Tensor,
        m_gradients: Tensor,
        camera: Camera,
        backend: str = "compiled",
    ) -> None:
        """Adds one iteration's views of one head.

        radii: (V, N) px. active: (V, N), the bit ``test`` makes a Gaussian visible. screen_gradients: (V, N, 2),
        dL/d(centre in px). m_gradients: (N, 1). A Gaussian counts once if any view sees it, with its largest radius
        and its largest gradient over the views.
        """
        rasterizer(backend).observe(
            radii, active, screen_gradients, m_gradients, test, camera.width, camera.height, self.statistics
        )

    def step(
        self,
        model: GaussianModel,
        optimizer: torch.optim.Adam,
        iteration: int,
        options: OptimisationOptions,
        extent: float,
        generator: torch.Generator,
    ) -> bool:
        """One density step: clone, then split, then prune; the statistics start over.

        New Gaussians go to the end: kept ones, clones, first children, second children. Where there would be more than
        ``options.max_gaussians`` (0: no bound), only those with the strongest gradients are added. Returns whether
        any were left out.
        """
        s, p = self.statistics, model.params
        gradient = (s["xyz_gradient_accum"] / s["denom"].clamp_min(1))[:, 0]
        m_gradient = (s["m_gradient_accum"] / s["m_denom"].clamp_min(1))[:, 0]
        by_position = gradient >= options.densify_grad_threshold
        by_time = m_gradient >= options.densify_grad_threshold
        small = model.scales().amax(1) <= options.percent_dense * extent
        spreads = model.spreads()
        clone = (by_position & small) | (by_time & (spreads <= options.split_sigma))
        split = (by_position & ~small) | (by_time & (spreads >= options.split_sigma))

        added = clone + split * (options.split_children - 1)  # (N,)
        room = max(options.max_gaussians - len(model), 0) if options.max_gaussians else math.inf
        held_back = int(added.sum()) > room
        if held_back:
            strongest = torch.argsort(torch.maximum(gradient, m_gradient), descending=True, stable=True)
            fits = torch.zeros_like(clone)
            fits[strongest] = added[strongest].cumsum(0) <= room
            clone, split = clone & fits, split & fits

        parents = split.nonzero()[:, 0]
        kept, clones = (~split).nonzero()[:, 0], clone.nonzero()[:, 0]
        children = parents.repeat(options.split_children)
        rows = torch.cat([kept, clones, children])  # source row of each new Gaussian
        fresh = torch.arange(len(rows), device=rows.device) >= len(kept)

        offsets = _draw(p["scaling"][children], p["rotation"][children], generator)
        first_child = len(kept) + len(clones)
        xyz, scaling = p["xyz"].detach()[rows], p["scaling"].detach()[rows]
        xyz[first_child:] += offsets
        scaling[first_child:] -= torch.log(scaling.new_tensor(options.split_shrink))

        opacity = model.opacities(model.heads).detach().amax(0)[rows]  # pruned where every head's is low
        prune = opacity < options.prune_opacity
        if iteration > options.prune_scale_from_iter:
            prune |= torch.exp(scaling[:, [0, 2]]).amax(1) > options.prune_scale
        keep = (~prune).nonzero()[:, 0]
        take_rows(model, optimizer, rows[keep], fresh[keep], {"xyz": xyz[keep], "scaling": scaling[keep]})
        self.statistics = _zeros(len(model), model.device)
        return held_back


def with_bound(
    options: TrainOptions,
    saved: Checkpoint | None,
    device: torch.device,
    channels: int,
    of_masks: int | None = None,
) -> TrainOptions:
    """``options`` with a bound on the number of Gaussians, where none is given: the checkpoint's, so that the run
    goes on as it would have, else as many as the memory is likely to hold. channels: of the image head. of_masks: of
    a segmentation head that has others."""
    before = saved.extras.get("options", {}).get("max_gaussians", 0) if saved else 0
    if options.max_gaussians or type(before) is not int:
        return options
    if before > 0:
        return replace(options, max_gaussians=before)
    most = int(_MEMORY_SHARE * free_memory(device)) // bytes_per_gaussian(options, channels, of_masks)
    start = len(saved.params["xyz"]) if saved else options.num_pts
    if start > most:
        raise UserError(
            f"{start} Gaussians are likely to need more than half of the free memory, which would hold {most}: lower "
            "--num_pts or --batch_size, free some, or say how many to try with --max_gaussians"
        )
    return replace(options, max_gaussians=most)


def bytes_per_gaussian(options: TrainOptions, channels: int, of_masks: int | None = None) -> int:
    """Memory that a Gaussian is likely to take in training; the channels as in `with_bound`."""
    heads = (IMAGE, SEGMENTATION) if options.pipeline == "joint" or options.seg_head_only else (IMAGE,)
    harmonics = (options.sh_degree + 1) ** 2 - 1
    sizes = {"C": channels, "S": of_masks or channels, "R": harmonics, "W": 2 * options.poly_degree}
    raw = numbers_per_gaussian(sizes, heads)
    # The raw values, their gradients, two moments and a copy in a density step; the statistics; and for each image of
    # an iteration what the rasteriser keeps, most of it records of the tiles that a Gaussian reaches (some 100 numbers
    # where Gaussians are as small as after training; more for many labels).
    images = len(heads) * (2 * options.batch_size - 1)
    records = 100 if of_masks is None else 100 * (6 + min(of_masks, 18)) // 8
    return 4 * (5 * raw + 5 + records * images)


def reset_opacity(model: GaussianModel, optimizer: torch.optim.Adam, value: float) -> None:
    """Sets the opacities of all heads to min(opacity, ``value``), and their moments to zero."""
    limit = torch.logit(torch.tensor(value)).item()
    for name in (head_parameters(head).opacity for head in model.heads):
        parameter = model.params[name]
        _replace(
            model,
            optimizer,
            name,
            parameter.detach().clamp_max(limit),
            lambda moment: torch.zeros_like(moment),
        )


def take_rows(
    model: GaussianModel, optimizer: torch.optim.Adam, rows: Tensor, fresh: Tensor, values: dict[str, Tensor]
) -> None:
    """Rebuilds every per-Gaussian tensor from ``rows`` (M,), in step with its moments.

    Moments of ``fresh`` (M,) rows start at 0; ``values`` replace what the rows of a parameter would be. The new
    parameters have no gradient, so the optimizer takes no step on them in the iteration of the exchange.
    """

    def moments(moment: Tensor) -> Tensor:
        return moment[rows] * ~fresh.view(-1, *[1] * (moment.ndim - 1))

    for name, parameter in list(model.params.items()):
        _replace(model, optimizer, name, values.get(name, parameter.detach()[rows]), moments)


def _replace(
    model: GaussianModel,
    optimizer: torch.optim.Adam,
    name: str,
    value: Tensor,
    moments: Callable[[Tensor], Tensor],
) -> None:
    old = model.params[name]
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][i] = new
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        for key in _MOMENTS:
            state[key] = moments(state[key])
        optimizer.state[new] = state
    model.params[name] = new


def _draw(scaling: Tensor, rotation: Tensor, generator: torch.Generator) -> Tensor:
    """Offsets (M, 3) from Gaussians' centres, distributed as the Gaussians are: y stays 0."""
    normal = torch.randn(len(scaling), 2, generator=generator).to(scaling.device)
    along = normal * torch.exp(scaling[:, [0, 2]])  # (M, 2)
    angle = 2 * torch.pi * torch.sigmoid(rotation[:, 0])
    cos, sin = torch.cos(angle), torch.sin(angle)
    # The axes of a rotation about +y in a right-handed frame: (cos, 0, -sin) and (sin, 0, cos).
    x = cos * along[:, 0] + sin * along[:, 1]
    z = -sin * along[:, 0] + cos * along[:, 1]
    return torch.stack([x, torch.zeros_like(x), z], 1).detach()


def _zeros(n: int, device: torch.device) -> dict[str, Tensor]:
    names = ("xyz_gradient_accum", "denom", "m_gradient_accum", "m_denom")
    return {"max_radii2D": torch.zeros(n, device=device)} | {
        name: torch.zeros(n, 1, device=device) for name in names
    }
