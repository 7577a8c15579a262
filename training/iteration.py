"""One iteration up to its gradients; on a GPU recorded once and replayed, until the parameters are exchanged."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gaussian_renderer import render
from training.pipelines import Inputs, Task, loss_terms, named_losses, requested_renders, split, total_loss

if TYPE_CHECKING:
    from training.run import Training

_SPARE = 1.2  # room for pairs of Gaussian and tile over those seen last; with too little, the recording is made again
_MOST_PAIRS = 2**31 - 1  # the largest capacity ``blend`` looks at; it says what to do where that is too much


@dataclass(frozen=True)
class Outcome:
    """What an iteration leaves besides the gradients of the parameters."""

    loss: Tensor  # ()
    terms: list[dict[str, Tensor]]  # of each task, unweighted
    images: Tensor  # (B, C, H, W): the first task's renders of its real views
    targets: Tensor  # (B, C, H, W): what they should show
    radii: Tensor  # (V, N) int32 px, 0 where not visible
    active: Tensor  # (V, N) uint8, bits of the activity tests
    screen_gradients: Tensor | None  # (tasks, V, N, 2): dL/d(centre in px) of each, where it was asked for

    def losses(self, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """() each: every weighted term, by what a person would call it, and their sum, "loss". Made when asked for:
        few iterations are looked at."""
        return named_losses(tasks, self.terms) | {"loss": self.loss}


def forward_backward(
    training: Training,
    inputs: Inputs,
    screen_gradients: bool,
    capacity: int = 0,
    counted: Tensor | None = None,
) -> Outcome:
    """Renders the views of ``inputs``, compares them with the targets, and adds to the parameters' gradients.

    capacity, counted: see ``blend``; without a capacity this waits for the device once.
    """
    tasks, options = training.tasks, training.options
    requested = requested_renders(tasks, inputs)
    renders = render(
        training.model,
        training.camera,
        inputs.views[0],
        inputs.views[1],
        [r for task in requested for r in task],
        training.background,
        options.rasterizer,
        screen_gradients,
        capacity,
        counted,
        options.antialiasing,
    )
    images = split(renders.images, [len(task) for task in requested])
    shown = [inputs.shown(task, training.background) for task in tasks]
    terms = [
        loss_terms(
            task,
            rendered,
            *wanted,
            training.model.params["sigma"].flatten(),
            training.sampler.num_views,
            training.iteration,
            options,
            options.rasterizer,
        )
        for task, rendered, wanted in zip(tasks, images, shown, strict=True)
    ]
    loss = total_loss(tasks, terms)
    loss.backward()
    return Outcome(
        loss.detach(),
        [{name: value.detach() for name, value in named.items()} for named in terms],
        images[0][: inputs.real].detach(),
        shown[0][0],
        renders.radii,
        renders.active,
        None if renders.screen is None else renders.screen.grad,
    )


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs  # its own: filled before each replay
    outcome: Outcome  # where each replay leaves it, and
    gradients: Sequence[
        tuple[Tensor, Tensor | None]
    ]  # of each parameter, until the next replay of any recording
    capacity: int


class _Memory:
    """Where a tensor lies on the GPU, without holding it."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = tensor.detach().__cuda_array_interface__


def _unowned(value: Any) -> Any:
    """``value`` with its tensors, those in lists and dictionaries too, as views that do not keep their memory: what
    is recorded next may use it again, so that all recordings together take no more than the largest."""
    if isinstance(value, Tensor) and value.numel():
        return torch.as_tensor(_Memory(value), device=value.device)
    if isinstance(value, Mapping):
        return {name: _unowned(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_unowned(item) for item in value]
    return value


def on_side_stream(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, whose work on a GPU goes to a stream of its own: the default one cannot be recorded."""

    @functools.wraps(function)
    def wrapped(training: Training, *more: object) -> None:
        device = training.model.device
        if device.type != "cuda":
            return function(training, *more)
        default, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(default)
        try:
            with torch.cuda.stream(side):
                function(training, *more)
        finally:  # whatever comes next, on the default stream, meets finished parameters
            default.wait_stream(side)

    return wrapped


class Replay:
    """:func:`forward_backward` as CUDA graphs: one for each kind of iteration, recorded anew whenever the parameters
    are exchanged. An iteration then costs the host a few calls instead of a few hundred.

    The size of the lists of pairs is fixed in a recording. The device reports how many there are while it goes on; an
    iteration that had no room for all is recorded with more and done again before anything uses its gradients.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.recordings: dict[tuple, _Recording] = {}
        self.parameters: list[int] = []  # addresses of those that the recordings read
        self.seen: dict[tuple, Inputs] = {}  # kinds that have run: what CUDA loads at first use is there
        self.share = 0.0  # most pairs of a recent iteration, by views and Gaussians
        self.counted = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._count = self.counted.numpy()
        self._anchor: torch.cuda.CUDAGraph | None = None
        self._held: Tensor | None = None

    def forget(self) -> None:
        """Gives the recordings' memory back to whatever needs much: both would not fit side by side. The parameters
        keep the gradients that they have."""
        for parameter in self.training.model.named_parameters().values():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        # Memory may go at once (expandable segments do), under the hands of a recording that is still being replayed.
        torch.cuda.current_stream().synchronize()
        self.recordings.clear()
        self._anchor = self._held = None
        torch.cuda.empty_cache()

    def _pool(self) -> Any:
        """Where all recordings have their tensors. It lives as long as a graph does that uses it: an empty one."""
        if self._anchor is None:
            torch.cuda.empty_cache()  # what lies idle outside cannot be used within
            self._anchor = torch.cuda.CUDAGraph()
            self._anchor.capture_begin(capture_error_mode="thread_local")
            self._held = torch.zeros(1, device=self.training.model.device)
            self._anchor.capture_end()
        return self._anchor.pool()

    def __call__(self, inputs: Inputs, screen_gradients: bool) -> Outcome:
        training = self.training
        model, options = training.model, training.options
        parameters = [p.data_ptr() for p in model.params.values()]
        if parameters != self.parameters:
            self.forget()
            self.parameters = parameters
        kind = (
            inputs.views.shape[1],
            inputs.real,
            screen_gradients,
            training.iteration < options.sigma_until_iter,
            model.active_sh_degree,
        )
        if kind not in self.seen:
            self.seen[kind] = inputs
            self.forget()
            outcome = forward_backward(training, inputs, screen_gradients, counted=self.counted)
            torch.cuda.current_stream().synchronize()
            self._note(int(self._count[0]), inputs)
            return outcome
        if self._anchor is None:  # the largest first: the others fit into its memory
            largest = max((like for like in self.seen if like[2:] == kind[2:]), key=lambda like: like[:2])
            self._record(largest, self.seen[largest], screen_gradients)
        recording = self.recordings.get(kind) or self._record(kind, inputs, screen_gradients)
        while True:
            pairs = self._replay(recording, inputs)
            self._note(pairs, inputs)
            if pairs <= recording.capacity:
                break
            torch.cuda.current_stream().synchronize()  # what is being replayed must not go
            del self.recordings[kind], recording
            recording = self._record(kind, inputs, screen_gradients)
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient
        return recording.outcome

    def _note(self, pairs: int, inputs: Inputs) -> None:
        # The largest of late: views differ, and the model changes slowly.
        now = pairs / (inputs.views.shape[1] * max(len(self.training.model), 1))
        self.share = max(now, 0.99 * self.share)

    def _record(self, kind: tuple, inputs: Inputs, screen_gradients: bool) -> _Recording:
        """A new recording of the kind, with room for the pairs that are expected and some more."""
        expected = self.share * inputs.views.shape[1] * len(self.training.model)
        capacity = min(int(_SPARE * expected) + 1024, _MOST_PAIRS)
        recording = None
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            recording = self._capture(inputs, screen_gradients, capacity)
        if recording is None:  # torch cannot free what it keeps for reuse while it records
            for parameter in self.training.model.named_parameters().values():
                parameter.grad = None
            self.forget()
            recording = self._capture(inputs, screen_gradients, capacity)
        self.recordings[kind] = recording
        return recording

    def _capture(self, inputs: Inputs, screen_gradients: bool, capacity: int) -> _Recording:
        parameters = self.training.model.named_parameters().values()
        for parameter in parameters:
            parameter.grad = None
        own = replace(inputs, views=inputs.views.clone())
        pool, graph = self._pool(), torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outcome = forward_backward(self.training, own, screen_gradients, capacity, self.counted)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # that it broke the recording is not what is to be told
                graph.capture_end()
            raise
        graph.capture_end()
        gradients = [(parameter, _unowned(parameter.grad)) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        unowned = Outcome(**{field.name: _unowned(getattr(outcome, field.name)) for field in fields(outcome)})
        return _Recording(graph, own, unowned, gradients, capacity)

    def _replay(self, recording: _Recording, inputs: Inputs) -> int:
        """Starts the graph and returns the number of pairs as soon as the device knows it."""
        recording.inputs.views.copy_(inputs.views)
        self._count[0] = -1
        recording.graph.replay()
        stream = torch.cuda.current_stream()
        while self._count[0] < 0:
            if stream.query() and self._count[0] < 0:  # raises the device's error, if there was one
                raise RuntimeError("the recorded iteration ended without a count of its pairs")
        return int(self._count[0])
