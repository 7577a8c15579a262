"""Iterations recorded as CUDA graphs and replayed, until the parameters are replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.batches import Views
from training.iteration import IterationResult, Objective, forward_backward

_SPARE = 1.2  # room for pairs of Gaussian and tile, over the last count; with too little, the graph is recorded again
_GROWN = 1.25
_MOST_PAIRS = (
    2**31 - 1
)  # the largest capacity that ``blend`` accepts; its error says what to do where that is too little


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Runs the body on its own CUDA stream, as the default stream cannot be recorded. Does nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    default, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(default)
    try:
        with torch.cuda.stream(side):
            yield
    finally:  # whatever comes next on the default stream sees finished parameters
        default.wait_stream(side)


class _Kind(NamedTuple):
    """Iterations of one kind launch the same kernels on tensors of the same sizes, so one graph serves them all."""

    views: int
    real: int
    screen_gradients: bool
    with_sigma: bool  # whether L_sigma is still among the terms
    sh_degree: int

    @property
    def regime(self) -> tuple[bool, bool, int]:
        """What changes only occasionally during the run; the sizes differ from batch to batch."""
        return self.screen_gradients, self.with_sigma, self.sh_degree


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    views: Views  # its own: filled before each replay
    result: IterationResult  # where each replay leaves it
    gradients: Sequence[
        tuple[Tensor, Tensor | None]
    ]  # parameter and gradient; valid until any recording is replayed
    capacity: int


class _Memory:
    """Where a tensor lies on the GPU, without keeping it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = tensor.detach().__cuda_array_interface__


def _unowned(value: Any) -> Any:
    """``value`` with its tensors, also those in lists and dictionaries, as views that do not keep their memory alive:
    the next recording may use it again, so that all together take no more than the largest."""
    if isinstance(value, Tensor) and value.numel():
        return torch.as_tensor(_Memory(value), device=value.device)
    if isinstance(value, Mapping):
        return {name: _unowned(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_unowned(item) for item in value]
    return value


class RecordedStep:
    """:func:`forward_backward` as CUDA graphs, one per kind of iteration, recorded again whenever the parameters are
    replaced. An iteration then costs the host a few calls instead of a few hundred.

    A recording fixes the size of the lists of pairs. The device reports how many there are while it runs; an iteration
    that had too little room is recorded with more and repeated before anything uses its gradients.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.recordings: dict[_Kind, _Recording] = {}
        self.parameters: list[int] = []  # addresses of those that the recordings read
        self.seen: dict[_Kind, Views] = {}  # kinds that have run: CUDA has loaded what they need
        self.share = 0.0  # most pairs of a recent iteration, per view and Gaussian
        self.counted = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._count = self.counted.numpy()
        self._anchor: torch.cuda.CUDAGraph | None = None
        self._held: Tensor | None = None
        self._made_for = 0  # Gaussians that there were when its memory was first used

    def forget(self, keep_memory: bool = False) -> None:
        """Drops the recordings, and frees their memory for work that needs much of it: the two might not fit together.
        The parameters keep their gradients.

        keep_memory: for the next recordings, which then need not ask the driver for it. It is freed nevertheless where
        the model has grown by so much that little of it would be used again.
        """
        for parameter in self._parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        # Memory may be released at once (expandable segments are), while a recording is still being replayed.
        torch.cuda.current_stream().synchronize()
        self.recordings.clear()
        if not keep_memory or len(self.objective.model) > _GROWN * self._made_for:
            self._anchor = self._held = None
            torch.cuda.empty_cache()

    def _parameters(self) -> Sequence[Tensor]:
        return list(self.objective.model.named_parameters().values())

    def _pool(self) -> Any:
        """Where all recordings have their tensors. It lives as long as a graph that uses it: an empty one."""
        if self._anchor is None:
            torch.cuda.empty_cache()  # idle memory outside the pool cannot be used in it
            self._anchor = torch.cuda.CUDAGraph()
            self._anchor.capture_begin(capture_error_mode="thread_local")
            self._held = torch.zeros(1, device=self.objective.model.device)
            self._anchor.capture_end()
            self._made_for = len(self.objective.model)
        return self._anchor.pool()

    def __call__(self, views: Views, iteration: int, screen_gradients: bool) -> IterationResult:
        model = self.objective.model
        parameters = [p.data_ptr() for p in model.params.values()]
        if parameters != self.parameters:
            self.forget(keep_memory=True)
            self.parameters = parameters
        with_sigma = iteration < self.objective.options.sigma_until_iter
        kind = _Kind(len(views), views.real, screen_gradients, with_sigma, model.active_sh_degree)
        if kind not in self.seen:
            self.seen[kind] = views
            self.forget()
            result = forward_backward(
                self.objective, views, iteration, screen_gradients, counted=self.counted
            )
            torch.cuda.current_stream().synchronize()
            self._note(int(self._count[0]), views)
            return result
        if not self.recordings:  # the largest first: the others fit into its memory
            largest = max((like for like in self.seen if like.regime == kind.regime), key=lambda k: k[:2])
            self._record(largest, self.seen[largest], iteration)
        recording = self.recordings.get(kind) or self._record(kind, views, iteration)
        while True:
            pairs = self._replay(recording, views)
            self._note(pairs, views)
            if pairs <= recording.capacity:
                break
            torch.cuda.current_stream().synchronize()  # what is being replayed must not be freed
            del self.recordings[kind], recording
            recording = self._record(kind, views, iteration)
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient
        return recording.result

    def _note(self, pairs: int, views: Views) -> None:
        # The recent maximum: views differ, and the model changes slowly.
        now = pairs / (len(views) * max(len(self.objective.model), 1))
        self.share = max(now, 0.99 * self.share)

    def _record(self, kind: _Kind, views: Views, iteration: int) -> _Recording:
        """A new recording of the kind, with room for the expected pairs and some more."""
        expected = self.share * len(views) * len(self.objective.model)
        capacity = min(int(_SPARE * expected) + 1024, _MOST_PAIRS)
        recording = None
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            recording = self._capture(views, iteration, kind.screen_gradients, capacity=capacity)
        if recording is None:  # torch cannot free its cached memory while it records
            for parameter in self._parameters():
                parameter.grad = None
            self.forget()
            recording = self._capture(views, iteration, kind.screen_gradients, capacity=capacity)
        self.recordings[kind] = recording
        return recording

    def _capture(self, views: Views, iteration: int, screen_gradients: bool, *, capacity: int) -> _Recording:
        parameters = self._parameters()
        for parameter in parameters:
            parameter.grad = None
        own = replace(views, packed=views.packed.clone())
        pool, graph = self._pool(), torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = forward_backward(
                self.objective, own, iteration, screen_gradients, capacity, self.counted
            )
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the broken recording is not the error to report
                graph.capture_end()
            raise
        graph.capture_end()
        gradients = [(parameter, _unowned(parameter.grad)) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        unowned = {field.name: _unowned(getattr(result, field.name)) for field in fields(result)}
        return _Recording(graph, own, IterationResult(**unowned), gradients, capacity)

    def _replay(self, recording: _Recording, views: Views) -> int:
        """Starts the graph and returns the number of pairs as soon as the device knows it."""
        recording.views.packed.copy_(views.packed)
        self._count[0] = -1
        recording.graph.replay()
        stream = torch.cuda.current_stream()
        while self._count[0] < 0:
            if stream.query() and self._count[0] < 0:  # raises the device's error, if there was one
                raise RuntimeError("the recorded iteration ended without a count of its pairs")
        return int(self._count[0])
