"""One iteration up to its gradients: render the views, compare them with the frames, go backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from arguments import TrainOptions
from gaussian_renderer import render
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from training.batches import Views, requested_renders
from training.pipelines import Task, loss_terms, named_losses, split, total_loss
from utils.stages import stage


@dataclass(frozen=True)
class Objective:
    """What is optimised: a model that should reproduce the tasks' frames through the camera."""

    model: GaussianModel
    camera: Camera
    tasks: Sequence[Task]
    background: Tensor  # (C,)
    options: TrainOptions
    num_views: int  # of the sequence, both sides: how finely time is sampled (L_sigma)
    thickness: float = (
        0.0  # of a frame, in mean distances between frames: it is drawn as a slab; in-betweens are not
    )


@dataclass(frozen=True)
class IterationResult:
    """What an iteration returns besides the gradients of the parameters."""

    loss: Tensor  # ()
    terms: list[dict[str, Tensor]]  # of each task, unweighted
    images: Tensor  # (B, C, H, W): the first task's renders of its real views
    targets: Tensor  # (B, C, H, W): what they should show
    radii: Tensor  # (V, N) int32 px, 0 where not visible
    active: Tensor  # (V, N) uint8, bits of the activity tests
    screen_gradients: Tensor | None  # (tasks, V, N, 2): dL/d(centre in px) of each, if requested

    def losses(self, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """() each: every weighted term under a readable name, and their sum, "loss". Computed on request: few
        iterations are reported."""
        return named_losses(tasks, self.terms) | {"loss": self.loss}


def _own(images: Tensor, channels: int) -> Tensor:
    """A head's own channels of renders (B, C, H, W), where another head has more."""
    return images if images.shape[1] == channels else images[:, :channels]


def forward_backward(
    objective: Objective,
    views: Views,
    iteration: int,
    screen_gradients: bool,
    capacity: int = 0,
    counted: Tensor | None = None,
) -> IterationResult:
    """Renders ``views``, compares them with their targets, and adds to the gradients of the model's parameters.

    capacity, counted: see ``blend``; without a capacity this waits for the device once.
    """
    tasks, model, options = objective.tasks, objective.model, objective.options
    requested = requested_renders(tasks, views)
    renders = render(
        model,
        objective.camera,
        views.positions,
        views.mirrored,
        [r for task in requested for r in task],
        objective.background,
        backend=options.rasterizer,
        screen_gradients=screen_gradients,
        capacity=capacity,
        counted=counted,
        antialiasing=options.antialiasing,
        clock=views.clock,
        thickness=objective.thickness,
        thick=views.real,
    )
    shares = split(renders.images, [len(task) for task in requested])
    images = [_own(share, model.channels_of(task.head)) for share, task in zip(shares, tasks, strict=True)]
    shown = [views.shown(task, objective.background) for task in tasks]
    with stage("loss"):
        terms = [
            loss_terms(
                task,
                rendered,
                *wanted,
                raw_sigma=model.params["sigma"].flatten(),
                num_views=objective.num_views,
                iteration=iteration,
                options=options,
                backend=options.rasterizer,
            )
            for task, rendered, wanted in zip(tasks, images, shown, strict=True)
        ]
        loss = total_loss(tasks, terms)
    with stage("backward"):
        loss.backward()
    return IterationResult(
        loss=loss.detach(),
        terms=[{name: value.detach() for name, value in named.items()} for named in terms],
        images=images[0][: views.real].detach(),
        targets=shown[0][0],
        radii=renders.radii,
        active=renders.active,
        screen_gradients=None if renders.screen is None else renders.screen.grad,
    )
