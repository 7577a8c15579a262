"""Inputs that nobody should give to the operators: a correct result or a Python exception, never a crash.

Run as `pytest tests/operators_fuzz.py`, in its own process: test_fuzz.py does so and checks how it ends, and `make
sanitize` uses kernels in which every access is checked. FUZZ_EXAMPLES is the number of inputs per operator.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scenes import random_scene
from torch import Tensor

from diff_gaussian_rasterization import (
    Adam,
    GaussianRasterizationSettings,
    GaussianRasterizer,
    blend,
    fold,
    observe,
    sigma_outside,
    similarity,
)
from gaussian_renderer import oracle
from utils import losses

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # shrinking reruns failures again and again, and a crash ends the process anyway
)
BADNESS = ["none", "layout", "value", "form"]
REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    IndexError,
    OverflowError,
    NotImplementedError,
    AttributeError,
)

# Ways to store a tensor with the same values: the result must be the same.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim else t,
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "negated view": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "parameter": lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t,
}
# And changes that make it a different tensor.
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    f"{value} at {share}": lambda t, value=value, share=share: (
        torch.where(torch.arange(t.numel()).view(t.shape) % share == 0, torch.tensor(value, dtype=t.dtype), t)
        if t.is_floating_point()
        else t
    )
    for value in (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0, 1e9, -1e9)
    for share in (1, 3)
}
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "shorter": lambda t: t[:-1] if t.ndim else t,
    "longer": lambda t: torch.cat([t, t[:1]]) if t.ndim else t[None],
    "empty": lambda t: t[:0] if t.ndim else t.new_zeros(0),
    "flat": lambda t: t.flatten(),
    "deeper": lambda t: t[None],
    "wider": lambda t: torch.cat([t, t[..., :1]], -1) if t.ndim else t,
    "narrower": lambda t: t[..., :-1] if t.ndim else t,
    "scalar": lambda t: t.sum(),
    "half": lambda t: t.half(),
    "other float": lambda t: t.double() if t.dtype == torch.float32 else t.float(),
    "integers": lambda t: t.nan_to_num().long(),
    "booleans": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.detach().to_sparse() if t.ndim else t,
    "list": lambda t: t.tolist(),
    "none": lambda t: None,
}
SIZES = st.sampled_from([-(2**63), -1, 0, 1, 15, 16, 17, 33, 32769, 2**31, 2**40, 2**70, None, 1.5])


def spoiled(data: st.DataObject, arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Some of ``arguments`` changed, and the worst kind of change: none, "layout", "value" or "form"."""
    out, worst = dict(arguments), "none"
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    formed = set()
    for name in data.draw(st.lists(st.sampled_from(tensors), max_size=3), "which"):
        kind = data.draw(st.sampled_from(["layout", "value", "form"]), "kind")
        table = {"layout": LAYOUTS, "value": VALUES, "form": FORMS}[kind]
        change = table[data.draw(st.sampled_from(list(table)), "how")]
        if name in formed:
            continue
        out[name] = change(out[name])
        worst = max(worst, kind, key=BADNESS.index)
        if kind == "form":  # for a tensor this small, the new form may be the old one
            formed.add(name)
    return out, worst


def attempt(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The result, None if it is refused."""
    try:
        return function(**arguments)
    except REFUSALS:
        return None


def backward(result: Any, arguments: dict[str, Any]) -> None:
    """The gradients, from ones: that they exist, with the shapes of their tensors."""
    outputs = [t for t in result if isinstance(t, Tensor) and t.requires_grad]
    inputs = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    if outputs and inputs:
        gradients = torch.autograd.grad(
            outputs, inputs, [torch.ones_like(t) for t in outputs], allow_unused=True
        )
        for tensor, gradient in zip(inputs, gradients, strict=True):
            assert gradient is None or gradient.shape == tensor.shape


def contiguous(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))


def fits(result: Any, arguments: dict[str, Any]) -> bool:
    """Is it a result to inspect? If everything is on the meta device, which holds no values, it is valid too."""
    devices = {value.device.type for value in arguments.values() if isinstance(value, Tensor)}
    assert len(devices) == 1, "tensors of two devices passed"
    assert {t.device.type for t in result} == devices
    return devices == {"cpu"}


def answer(function: Callable[..., Any], arguments: dict[str, Any], worst: str) -> Any:
    """A result to inspect, with its gradients; None if invalid input was refused, or held no values."""
    result = attempt(function, arguments)
    assert result is not None or worst == "form"
    if result is None:
        return None
    outputs = [result] if isinstance(result, Tensor) else result
    if not fits(outputs, arguments):
        return None
    backward(outputs, arguments)
    return result


def learn(arguments: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if isinstance(arguments.get(name), Tensor) and arguments[name].is_floating_point():
            arguments[name] = arguments[name].detach().requires_grad_()


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Any, torch.dtype]:
    views, heads = draw(st.integers(0, 3)), draw(st.integers(1, 2))
    renders = []
    if views:
        triples = st.tuples(st.integers(0, views - 1), st.integers(0, heads - 1), st.sampled_from([1, 2, 3]))
        renders = draw(st.lists(triples, max_size=4))
    scene = random_scene(
        draw(st.integers(0, 10**6)),
        width=draw(st.integers(1, 40)),
        height=draw(st.integers(1, 40)),
        n=draw(st.sampled_from([0, 1, 2, 7, 33])),
        degree=draw(st.sampled_from([0, 1, 7, 32])),
        channels=draw(st.sampled_from([1, 2, 3, 4, 7, 20])),
        views=views,
        heads=heads,
        renders=renders,
        kind=draw(
            st.sampled_from(["plain", "opaque", "covering", "elongated", "outside", "inactive", "tiny"])
        ),
        raw=draw(st.booleans()),
    )
    return scene, draw(st.sampled_from([torch.float32, torch.float64]))


RAW = ("xyz", "w1", "m", "sigma", "scaling", "rotation", "times", "signs")


@fuzz
@given(scenes(), st.data())
def test_fold(scene_and_type, data):
    scene, dtype = scene_and_type
    sizes = {"pixels_per_unit": scene.pixels_per_unit, "width": scene.width, "height": scene.height}
    arguments: dict[str, Any] = {name: scene.tensors[name].to(dtype) for name in RAW} | sizes
    learn(arguments, RAW[:-1])
    arguments, worst = spoiled(data, arguments)
    if data.draw(st.integers(0, 4)) == 0:
        arguments[data.draw(st.sampled_from(["width", "height"]))] = data.draw(SIZES)
        worst = "form"
    if data.draw(st.integers(0, 9)) == 0:
        arguments["pixels_per_unit"] = data.draw(st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e300]))
        worst = max(worst, "value", key=BADNESS.index)
    result = answer(fold, arguments, worst)
    if result is None:
        return
    assert same(result, fold(**contiguous(arguments)))
    if worst in ("none", "layout") and dtype == torch.float64:
        expected = oracle.fold(**contiguous(arguments))
        seen = expected[3] > 0  # where it is not drawn, its value does not matter
        assert torch.equal(result[3], expected[3])
        for x, y in zip(result[:2], expected[:2], strict=True):
            torch.testing.assert_close(x[seen].detach(), y[seen], rtol=1e-6, atol=1e-6)


@fuzz
@given(scenes(), st.data())
def test_blend(scene_and_type, data):
    scene, dtype = scene_and_type
    tensors = {name: value.to(dtype) for name, value in scene.tensors.items()}
    folded = fold(*(tensors[name] for name in RAW), scene.pixels_per_unit, scene.width, scene.height)
    views, heads, bits = ([render[i] for render in scene.renders] for i in range(3))
    arguments: dict[str, Any] = {
        "means2d": folded[0], "conics": folded[1], "active": folded[3], "opacities": tensors["opacities"],
        "colours": tensors["colours"], "backgrounds": tensors["backgrounds"][: len(views)],
        "screen": torch.zeros(len(tensors["opacities"]), *folded[0].shape, dtype=dtype), "views": views,
        "heads": heads, "bits": bits, "width": scene.width, "height": scene.height, "raw": scene.raw,
    }  # fmt: skip
    learn(arguments, ("means2d", "conics", "opacities", "colours", "backgrounds", "screen"))
    arguments, worst = spoiled(data, arguments)
    if data.draw(st.integers(0, 4)) == 0:
        arguments[data.draw(st.sampled_from(["width", "height"]))] = data.draw(SIZES)
        worst = "form"
    if data.draw(st.integers(0, 4)) == 0:
        name = data.draw(st.sampled_from(["views", "heads", "bits"]))
        odd = st.sampled_from([-(2**70), -(2**40), -1, 0, 1, 3, 64, 256, 2**31, 2**63, None, 0.5])
        arguments[name] = data.draw(st.lists(odd, max_size=70))
        worst = "form"
    result = answer(blend, arguments, worst)
    if result is None:
        return
    assert same(result, blend(**contiguous(arguments)))
    if worst in ("none", "layout") and dtype == torch.float64 and scene.renders:
        expected = oracle.blend(**contiguous(arguments))
        for x, y in zip(result, expected, strict=True):
            torch.testing.assert_close(x.detach(), y, rtol=1e-6, atol=1e-6)


@fuzz
@given(st.data())
def test_similarity(data):
    shape = [data.draw(st.integers(1, 3)) for _ in range(2)]
    shape += [data.draw(st.sampled_from([1, 2, 5, 11, 17, 40])) for _ in range(2)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    arguments: dict[str, Any] = {
        name: torch.rand(shape, generator=generator).to(dtype) for name in ("images", "targets")
    }
    learn(arguments, ("images",))
    arguments, worst = spoiled(data, arguments)
    result = answer(similarity, arguments, worst)
    if result is not None and worst in ("none", "layout"):
        values = contiguous(arguments)
        torch.testing.assert_close(
            torch.stack(result).detach().double(),
            torch.stack([losses.l1(**values), losses.ssim(**values)]).double(),
            rtol=1e-4,
            atol=1e-5,  # sums of float32, one or many partial sums
        )


@fuzz
@given(st.data())
def test_sigma_outside(data):
    raw = torch.randn(data.draw(st.sampled_from([0, 1, 15, 16, 17, 1000])))
    arguments, worst = spoiled(data, {"raw": raw, "low": 0.1, "high": 1.0})
    for bound in ("low", "high"):
        if data.draw(st.integers(0, 4)) == 0:
            arguments[bound] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e300]))
            worst = max(worst, "value", key=BADNESS.index)
    learn(arguments, ("raw",))
    result = answer(sigma_outside, arguments, worst)
    if result is not None and worst in ("none", "layout"):
        expected = losses.sigma_outside(torch.exp(arguments["raw"].detach()), 0.1, 1.0)
        torch.testing.assert_close(result.detach(), expected, rtol=1e-4, atol=1e-6)


@fuzz
@given(st.data())
def test_observe(data):
    v, n = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([0, 1, 2, 17, 5000]))
    arguments: dict[str, Any] = {
        "radii": torch.randint(0, 9, (v, n), dtype=torch.int32),
        "active": torch.randint(0, 4, (v, n), dtype=torch.uint8),
        "screen_gradients": torch.randn(v, n, 2),
        "m_gradients": torch.randn(n, 1),
        **{
            name: torch.zeros(n, *(() if name == "max_radii2D" else (1,)))
            for name in ("max_radii2D", "xyz_gradient_accum", "m_gradient_accum", "denom", "m_denom")
        },
    }
    arguments, worst = spoiled(data, arguments)
    bit = data.draw(st.sampled_from([1, 2, 3, 0, -1, 256, 2**40, 2**70, 0.5]))
    width, height = (data.draw(st.sampled_from([24, 0, -1, 2**40, 1e300, math.nan])) for _ in range(2))
    names = ("radii", "active", "screen_gradients", "m_gradients")
    given_ = {name: arguments.pop(name) for name in names}
    attempt(observe, {**given_, "bit": bit, "width": width, "height": height, "statistics": arguments})
    if worst == "none" and bit == 1 and v:
        seen = ((given_["active"] & 1) > 0).any(0)
        assert torch.equal(arguments["denom"][:, 0] > 0, seen)


@fuzz
@given(st.data())
def test_adam(data):
    n = data.draw(st.sampled_from([0, 1, 17, 1000]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    parameter = torch.nn.Parameter(torch.randn(n, 2, dtype=dtype))
    reference = torch.nn.Parameter(parameter.detach().clone())
    optimizers = [Adam([parameter], lr=1e-2), torch.optim.Adam([reference], lr=1e-2)]
    for _ in range(2):
        gradient = torch.randn(n, 2, dtype=dtype)
        for optimizer, p in zip(optimizers, (parameter, reference), strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(parameter, reference, rtol=1e-5, atol=1e-6)
    state = optimizers[0].state[parameter]
    things, worst = spoiled(data, {"grad": torch.randn(n, 2, dtype=dtype), **state})
    state.update({name: things[name] for name in state})
    try:
        parameter.grad = things["grad"]
    except REFUSALS:  # torch's own
        return
    before = parameter.detach().clone()
    try:
        optimizers[0].step()
    except REFUSALS:
        assert worst != "none"
        assert torch.equal(parameter, before)  # all or nothing


@fuzz
@given(st.data())
def test_the_general_rasteriser(data):
    n = data.draw(st.sampled_from([0, 1, 2, 17]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    view = torch.eye(4, dtype=dtype)
    projection = torch.tensor([[1.7, 0, 0, 0], [0, 1.7, 0, 0], [0, 0, 1, 1], [0, 0, -0.01, 0]], dtype=dtype)
    means = torch.randn(n, 3, dtype=dtype) + torch.tensor([0, 0, 3], dtype=dtype)
    forms = {
        "shs": torch.randn(n, 16, 3, dtype=dtype),
        "colors_precomp": torch.rand(n, 3, dtype=dtype),
        "scales": 0.2 * torch.rand(n, 3, dtype=dtype),
        "rotations": torch.randn(n, 4, dtype=dtype),
        "cov3D_precomp": 0.1 * torch.rand(n, 6, dtype=dtype),
    }
    colours = data.draw(st.sampled_from([["shs"], ["colors_precomp"], [], ["shs", "colors_precomp"]]))
    shapes = data.draw(st.sampled_from([["scales", "rotations"], ["cov3D_precomp"], ["scales"], []]))
    arguments: dict[str, Any] = {
        "means3D": means, "means2D": torch.zeros(n, 3, dtype=dtype), "opacities": torch.rand(n, 1, dtype=dtype),
        "viewmatrix": view, "projmatrix": view @ projection, "campos": torch.zeros(3, dtype=dtype),
        "bg": torch.zeros(3, dtype=dtype), **{name: forms[name] for name in colours + shapes},
    }  # fmt: skip
    complete = len(colours) == 1 and len(shapes) != 1 + (shapes == ["cov3D_precomp"]) and bool(shapes)
    learn(arguments, ("means3D", "means2D", "opacities", *colours, *shapes))
    arguments, worst = spoiled(data, arguments)
    numbers: dict[str, Any] = {
        "image_height": 21, "image_width": 33, "tanfovx": 0.6, "tanfovy": 0.6, "scale_modifier": 1.0, "sh_degree": 3,
    }  # fmt: skip
    if data.draw(st.integers(0, 3)) == 0:
        name = data.draw(st.sampled_from(list(numbers)))
        odd = [-1, 0, math.nan, math.inf, 1e300, 2**40]
        numbers[name] = data.draw(SIZES if name.startswith("image") else st.sampled_from(odd))
        worst = "form"
    camera = {name: arguments.pop(name) for name in ("viewmatrix", "projmatrix", "campos", "bg")}
    flags = {"antialiasing": data.draw(st.booleans()), "prefiltered": False, "debug": False}

    def draw(**gaussians: Any) -> Any:
        return GaussianRasterizer(GaussianRasterizationSettings(**numbers, **camera, **flags))(**gaussians)

    try:
        result = draw(**arguments)
    except REFUSALS:
        assert worst == "form" or not complete
        return
    if fits(result, arguments):  # the camera is moved to the device of the Gaussians
        backward(result, arguments)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
