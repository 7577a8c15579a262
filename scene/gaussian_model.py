"""The model: N Folded-Gaussians, the times of the frames, and one or two appearance heads on the same geometry.

A head shows an image (C = 1 or 3), a mask (as many channels), or a label map: K channels, one per label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from arguments import ModelOptions
from patient.labels import LabelTable
from scene.cameras import Camera
from scene.parameters import IMAGE, PARAMETERS, SEGMENTATION, head_parameters, sizes_of
from utils.spherical_harmonics import C0, basis, from_colour

# Initial values (method of the release).
_GREY = 127 / 255
_OPACITY = 0.1
_SIGMA_RANGE = (0.01, 1.0)
_MIN_SQUARED_DISTANCE = 1e-7
_LOGIT_EPS = 1e-6  # keeps the logit of a uniform draw finite


class GaussianModel:
    """Raw parameters by the names of their optimizer groups, and their active values.

    params: those of `scene.parameters`, in its order; those of the segmentation head where there is one. C is 1 for
        grey data and 3 for colour.
    time_func: (K,) frame durations, or (K - 1, 1) logits of learned ones, then a parameter (`--use_dff`).
    labels: the labels, two or more, whose map the last head shows, a channel for each; None where it shows none.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        time_func: Tensor,
        active_sh_degree: int = 0,
        labels: LabelTable | None = None,
    ) -> None:
        sizes_of(params)  # raises ValueError where they do not fit together
        self.params = {
            name: nn.Parameter(params[name].detach().clone(memory_format=torch.contiguous_format))
            for name in PARAMETERS
            if name in params
        }
        self.time_func = nn.Parameter(time_func.detach().clone(), requires_grad=time_func.ndim == 2)
        self.active_sh_degree = active_sh_degree
        self.labels = labels
        self._check_channels()
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
        labels: LabelTable | None = None,
        spaced: bool = True,
    ) -> GaussianModel:
        """N = ``options.num_pts`` Gaussians, uniform over the plane and over time; drawn on the CPU, so that a seed
        means the same model everywhere.

        durations: (K,) of the frames, of sum 1; None where they are evenly spaced, 1 / K each. Learned times start
        from them. labels: of a label map that the image head shows; each has the same share at first. spaced: scales
        follow the distances between neighbours; else they are 1, for callers that replace them.
        """
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
        scaling = torch.zeros(n, 3)
        if spaced:
            from simple_knn._C import distCUDA2

            distances = distCUDA2(xyz).clamp_min(_MIN_SQUARED_DISTANCE)  # (N,)
            scaling = torch.log(torch.sqrt(distances))[:, None].repeat(1, 3)
        params = {
            "xyz": xyz,
            "f_dc": torch.full(
                (n, 1, channels), from_colour(_GREY) if labels is None else _even_share(labels)
            ),
            "f_rest": torch.zeros(n, rest, channels),
            "opacity": torch.full((n, 1), math.log(_OPACITY / (1 - _OPACITY))),
            "scaling": scaling,
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
        return cls(params, time_func.to(device), labels=labels)

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
        """Of the image head."""
        return self.channels_of(IMAGE)

    def channels_of(self, head: str) -> int:
        return self.params[head_parameters(head).colour].shape[2]

    @property
    def label_head(self) -> str | None:
        """The head that shows a label map."""
        return None if self.labels is None else self.heads[-1]

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
        return (IMAGE, SEGMENTATION) if head_parameters(SEGMENTATION).opacity in self.params else (IMAGE,)

    def add_segmentation_head(self, labels: LabelTable | None = None) -> None:
        """Adds a second head, a copy of the image head. One for ``labels`` copies the opacity, and begins with the same
        share of each label."""
        for source, name in zip(head_parameters(IMAGE), head_parameters(SEGMENTATION), strict=True):
            value = self.params[source].detach().clone()
            if labels is not None and PARAMETERS[name].is_colour:
                fill = _even_share(labels) if name == head_parameters(SEGMENTATION).colour else 0.0
                value = value.new_full((*value.shape[:2], len(labels)), fill)
            self.params[name] = nn.Parameter(value)
        self.labels = labels
        self._check_channels()

    def _check_channels(self) -> None:
        """Raises ValueError unless a label head has a channel per label, and another as many as the image head."""
        wanted = self.channels if self.labels is None else len(self.labels)
        if self.channels_of(self.heads[-1]) != wanted:
            raise ValueError(f"a head of {self.channels_of(self.heads[-1])} channels, not {wanted}")

    def background_of(self, head: str, background: Tensor) -> Tensor:
        """(C,) what is behind ``head``, given the image head's (C,): nothing is labelled behind a label map."""
        if head != self.label_head:
            return background
        return background.new_zeros(self.channels_of(head))

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

    def fixed_times(self, positions: Sequence[float]) -> list[float] | None:
        """The same on the CPU, without waiting for the device; None where times are learned."""
        if self.uses_dff:
            return None
        starts, durations = self._clock
        index = np.minimum(np.array(positions).astype(np.int64), self.num_frames - 1)
        fraction = (np.array(positions) - index).astype(durations.dtype)
        return (starts[index] + durations[index] * fraction).tolist()

    @cached_property
    def _clock(self) -> tuple[np.ndarray, np.ndarray]:
        """(K,) each: when the frames begin, and how long they last."""
        durations = self.durations().detach()
        return (self._earlier * durations).sum(1).cpu().numpy(), durations.cpu().numpy()

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
        return _joined([self.params[head_parameters(head).opacity].flatten() for head in heads])

    def raw_colours(self, heads: Sequence[str], camera: Camera) -> Tensor:
        """(heads, N, C): x of the colour max(0, C0 x + 0.5), with as many channels as the widest of the ``heads`` has;
        the others' are filled with zeros. The harmonics above degree 0 are seen from the camera in the direction of
        the raw (x, 0, z)."""
        if self.active_sh_degree == 0:
            return _joined([self.params[head_parameters(head).colour].flatten(1) for head in heads])
        x, _, z = self.params["xyz"].unbind(1)
        offset = torch.stack(
            [x, torch.full_like(x, camera.distance), z], 1
        )  # the camera is at (0, -distance, 0)
        harmonics = basis(offset / offset.norm(dim=1, keepdim=True), self.active_sh_degree)  # (N, K)
        colours = []
        for head in heads:
            names = head_parameters(head)
            f_dc, f_rest = self.params[names.colour], self.params[names.harmonics]
            rest = torch.einsum("nk,nkc->nc", harmonics, f_rest[:, : harmonics.shape[1]])
            colours.append(f_dc[:, 0] + rest / C0)
        return _joined(colours)

    def scales(self) -> Tensor:
        """(N, 2), along the Gaussian's own two axes in the plane, at t = m; plane units."""
        return torch.exp(self.params["scaling"][:, [0, 2]])

    def spreads(self) -> Tensor:
        """(N,), the spread in time."""
        return torch.exp(self.params["sigma"][:, 0, 0])


def _joined(heads: list[Tensor]) -> Tensor:
    """Rows (N,) or (N, C) of several heads in one tensor."""
    if len(heads) == 1:
        return heads[0][None]
    most = max(head.shape[-1] for head in heads)
    return torch.stack(
        [pad(head, (0, most - head.shape[-1])) if head.shape[-1] < most else head for head in heads]
    )


def _even_share(labels: LabelTable) -> float:
    """Raw colour of a Gaussian that shows each label as much as the others and as the background."""
    return from_colour(1 / (len(labels) + 1))
