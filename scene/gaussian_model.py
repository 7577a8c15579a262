"""The model: N Folded-Gaussians, the times of the frames, and one or two appearance heads on the same geometry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from arguments import ModelOptions, OptimisationOptions
from scene.cameras import Camera
from utils.spherical_harmonics import C0, basis, from_colour

IMAGE, SEGMENTATION = "img", "seg"
"""Names of the heads. Plain segmentation training uses the image head; a segmentation head is its copy beside it."""

GEOMETRY = ("xyz", "scaling", "rotation", "m", "sigma", "w1")
_SUFFIX = {IMAGE: "", SEGMENTATION: "_seg"}

# Initial values (method of the release).
_GREY = 127 / 255
_OPACITY = 0.1
_SIGMA_RANGE = (0.01, 1.0)
_MIN_SQUARED_DISTANCE = 1e-7
_LOGIT_EPS = 1e-6  # keeps the logit of a uniform draw finite


class GaussianModel:
    """Raw parameters by the names of their optimizer groups, and what they mean when active.

    params: xyz (N, 3), f_dc (N, 1, C), f_rest (N, (D+1)^2 - 1, C), opacity (N, 1), scaling (N, 3), rotation (N, 1),
        m (N, 1), sigma (N, 1, 1), w1 (N, 2P); with a segmentation head also f_dc_seg, f_rest_seg, opacity_seg.
        C is 1 for grey data and 3 for colour.
    time_func: (K,) frame durations, or (K - 1, 1) logits of learned ones, a parameter then (`--use_dff`).
    """

    def __init__(self, params: Mapping[str, Tensor], time_func: Tensor, active_sh_degree: int = 0) -> None:
        self.params = {
            name: nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
            for name, value in params.items()
        }
        self.time_func = nn.Parameter(time_func.detach().clone(), requires_grad=time_func.ndim == 2)
        self.active_sh_degree = active_sh_degree
        k = self.num_frames
        self._earlier = torch.ones(k, k, dtype=time_func.dtype, device=time_func.device).tril(
            -1
        )  # frames before each

    @classmethod
    def random(
        cls,
        options: ModelOptions,
        camera: Camera,
        num_frames: int,
        channels: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        durations: Sequence[float] | None = None,
    ) -> GaussianModel:
        """N = ``options.num_pts`` Gaussians, uniform over the plane and over time; drawn on the CPU, so that a seed
        means the same model everywhere.

        durations: (K,) of the frames, of sum 1; None where they are evenly spaced, 1 / K each. Learned times start
        from them.
        """
        from simple_knn._C import distCUDA2

        n, p, rest = options.num_pts, options.poly_degree, (options.sh_degree + 1) ** 2 - 1

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.empty(shape).uniform_(low, high, generator=generator)

        xyz = torch.zeros(n, 3)
        xyz[:, 0] = uniform(-camera.half_width, camera.half_width, n)
        xyz[:, 2] = uniform(-camera.half_height, camera.half_height, n)
        w1 = uniform(-1, 1, n, 2 * p)
        m = torch.logit(uniform(0, 1, n, 1), eps=_LOGIT_EPS)
        sigma = torch.log(uniform(*_SIGMA_RANGE, n, 1, 1))
        rotation = torch.logit(uniform(0, 1, n, 1), eps=_LOGIT_EPS)
        xyz = xyz.to(device)
        distances = distCUDA2(xyz).clamp_min(_MIN_SQUARED_DISTANCE)  # (N,)
        params = {
            "xyz": xyz,
            "f_dc": torch.full((n, 1, channels), from_colour(_GREY)),
            "f_rest": torch.zeros(n, rest, channels),
            "opacity": torch.full((n, 1), math.log(_OPACITY / (1 - _OPACITY))),
            "scaling": torch.log(torch.sqrt(distances))[:, None].repeat(1, 3),
            "rotation": rotation,
            "m": m,
            "sigma": sigma,
            "w1": w1,
        }
        time_func = torch.tensor(durations or [1 / num_frames] * num_frames)
        if (
            options.use_dff and num_frames > 1
        ):  # logits, whose softmax are the durations of all frames but the last
            gaps = time_func[:-1, None]
            time_func = torch.log(gaps / gaps.max())
        params = {name: value.to(device) for name, value in params.items()}
        return cls(params, time_func.to(device))

    def named_parameters(self) -> dict[str, Tensor]:
        """All that training changes, the frame times too."""
        return {**self.params, "time_func": self.time_func}

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.params["xyz"].shape[0]

    @property
    def device(self) -> torch.device:
        return self.params["xyz"].device

    @property
    def channels(self) -> int:
        return self.params["f_dc"].shape[2]

    @property
    def num_frames(self) -> int:
        return self.time_func.shape[0] + self.uses_dff

    @property
    def poly_degree(self) -> int:
        return self.params["w1"].shape[1] // 2

    @property
    def sh_degree(self) -> int:
        return math.isqrt(self.params["f_rest"].shape[1] + 1) - 1

    @property
    def uses_dff(self) -> bool:
        """Are the frame times learned?"""
        return self.time_func.ndim == 2

    @property
    def heads(self) -> tuple[str, ...]:
        return (IMAGE, SEGMENTATION) if "opacity_seg" in self.params else (IMAGE,)

    def add_segmentation_head(self) -> None:
        """A second head, a copy of the image head."""
        for name in head_parameters(IMAGE):
            self.params[f"{name}_seg"] = nn.Parameter(self.params[name].detach().clone())

    # ---- active values -----------------------------------------------------------------------------------------------

    def times(self, positions: Sequence[float] | Tensor) -> Tensor:
        """Positions in the sequence (V,), frame index plus fraction -> times (V,); gradients where times are learned.

        t = t_k + (t_{k+1} - t_k) * fraction. The last frame reaches towards t = 1. float64 positions keep the fraction.
        """
        if not isinstance(positions, Tensor):
            positions = torch.tensor(positions, dtype=torch.float64).to(self.device, non_blocking=True)
        durations = self.durations()
        starts = (self._earlier * durations).sum(1)  # (K,); a GPU has no deterministic cumulative sum
        index = positions.long().clamp_max(self.num_frames - 1)
        fraction = (positions - index).to(durations.dtype)
        return starts[index] + durations[index] * fraction

    def durations(self) -> Tensor:
        """(K,), how long each frame lasts; where times are learned, the last one sits at t = 1 and lasts 0."""
        if not self.uses_dff:
            return self.time_func
        return torch.cat([torch.softmax(self.time_func[:, 0], 0), self.time_func.new_zeros(1)])

    def opacities(self, heads: Sequence[str]) -> Tensor:
        """(heads, N) in (0, 1)."""
        return torch.sigmoid(self.raw_opacities(heads))

    def raw_opacities(self, heads: Sequence[str]) -> Tensor:
        """(heads, N), logits."""
        return _stack([self.params["opacity" + _SUFFIX[head]].flatten() for head in heads])

    def raw_colours(self, heads: Sequence[str], camera: Camera) -> Tensor:
        """(heads, N, C): x of the colour max(0, C0 x + 0.5). The harmonics above degree 0 are seen from the camera in
        the direction of the raw (x, 0, z)."""
        if self.active_sh_degree == 0:
            return _stack([self.params["f_dc" + _SUFFIX[head]].flatten(1) for head in heads])
        x, _, z = self.params["xyz"].unbind(1)
        offset = torch.stack(
            [x, torch.full_like(x, camera.distance), z], 1
        )  # the camera is at (0, -distance, 0)
        harmonics = basis(offset / offset.norm(dim=1, keepdim=True), self.active_sh_degree)  # (N, K)
        colours = []
        for head in heads:
            f_dc, f_rest = (self.params[name + _SUFFIX[head]] for name in ("f_dc", "f_rest"))
            rest = torch.einsum("nk,nkc->nc", harmonics, f_rest[:, : harmonics.shape[1]])
            colours.append(f_dc[:, 0] + rest / C0)
        return _stack(colours)

    def scales(self) -> Tensor:
        """(N, 2), along the Gaussian's own two axes in the plane, at t = m; plane units."""
        return torch.exp(self.params["scaling"][:, [0, 2]])

    def spreads(self) -> Tensor:
        """(N,), the spread in time."""
        return torch.exp(self.params["sigma"][:, 0, 0])


def _stack(heads: list[Tensor]) -> Tensor:
    return heads[0][None] if len(heads) == 1 else torch.stack(heads)


def head_parameters(head: str) -> tuple[str, ...]:
    """The parameters of one head."""
    return tuple(name + _SUFFIX[head] for name in ("f_dc", "f_rest", "opacity"))


def make_optimizer(
    model: GaussianModel,
    options: OptimisationOptions,
    head_only: bool = False,
    kind: type[torch.optim.Adam] = torch.optim.Adam,
) -> torch.optim.Adam:
    """Adam (a ``kind`` of it) with one named group a parameter, in the order of the published checkpoint; xyz's rate
    is set by :func:`set_rates`. With ``head_only``, the one group of the segmentation head, and all else frozen."""
    if head_only:
        for name, parameter in model.params.items():
            parameter.requires_grad_(name in head_parameters(SEGMENTATION))
        model.time_func.requires_grad_(False)
        names = ("opacity_seg", "f_dc_seg", "f_rest_seg")
        groups = [
            {"params": [model.params[name] for name in names], "lr": options.seg_head_lr, "name": "seg_head"}
        ]
    else:
        rates = {
            "xyz": 0.0,
            "f_dc": options.feature_lr,
            "f_rest": options.feature_lr / options.feature_rest_divisor,
            "opacity": options.opacity_lr,
            "scaling": options.scaling_lr,
            "rotation": options.rotation_lr,
            "m": options.m_lr,
            "sigma": options.sigma_lr,
            "w1": options.w1_lr,
        }
        groups = [{"params": [model.params[name]], "lr": rate, "name": name} for name, rate in rates.items()]
        if model.uses_dff:
            groups.append({"params": [model.time_func], "lr": options.time_func_lr, "name": "time_func"})
        if SEGMENTATION in model.heads:
            groups += [
                {"params": [model.params[f"{name}_seg"]], "lr": rates[name], "name": f"{name}_seg"}
                for name in ("f_dc", "f_rest", "opacity")
            ]
    return kind(groups, lr=0.0, eps=options.adam_eps)


def set_rates(
    model: GaussianModel,
    optimizer: torch.optim.Adam,
    iteration: int,
    options: OptimisationOptions,
    extent: float,
) -> None:
    """The schedule: xyz's rate decays log-linearly, and one more degree of the harmonics comes into use now and
    then."""
    share = min(max(iteration / options.position_lr_max_steps, 0), 1)
    log_rate = (1 - share) * math.log(options.position_lr_init) + share * math.log(options.position_lr_final)
    for group in optimizer.param_groups:
        if group["name"] == "xyz":
            group["lr"] = extent * math.exp(log_rate)
    if iteration % options.sh_degree_interval == 0:
        model.active_sh_degree = min(model.active_sh_degree + 1, model.sh_degree)
