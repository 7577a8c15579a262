"""The table of per-Gaussian parameters: everything derived from it has the same counts and names."""

from __future__ import annotations

import pytest
import torch

import training.density_control
from arguments import ModelOptions, OptimisationOptions, TrainOptions
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE, PARAMETERS, SEGMENTATION, head_parameters, numbers_per_gaussian, sizes_of
from training.density_control import with_bound
from training.optimizer import make_optimizer

CAMERA = Camera(24, 20, distance=1.0)


def model_of(channels: int = 1, heads: int = 1, **options: object) -> GaussianModel:
    made = ModelOptions(**{"num_pts": 50, **options})  # type: ignore[arg-type]
    model = GaussianModel.random(made, CAMERA, 4, channels, torch.Generator().manual_seed(0))
    if heads == 2:
        model.add_segmentation_head()
    return model


def test_a_grey_gaussian_of_the_published_degree_has_25_numbers():
    """9 of the geometry without its path, 14 of the path of degree 7, a colour and an opacity."""
    model = model_of(poly_degree=7)
    assert sum(value.numel() for value in model.params.values()) == 25 * len(model)
    assert numbers_per_gaussian(sizes_of(model.params), model.heads) == 25


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("channels", "sh_degree", "poly_degree"), [(1, 0, 3), (3, 0, 5), (3, 2, 2), (1, 3, 1)]
)
def test_the_bound_on_gaussians_counts_the_models_numbers(
    monkeypatch, heads, channels, sh_degree, poly_degree
):
    model = model_of(channels, heads, sh_degree=sh_degree, poly_degree=poly_degree)
    raw = sum(value[0].numel() for value in model.params.values())
    pipeline = ("img", "joint")[heads - 1]
    options = TrainOptions(
        source_path="images", model_path="out", pipeline=pipeline, seg_source_path=None if heads == 1 else "masks",
        num_pts=10, sh_degree=sh_degree, poly_degree=poly_degree, batch_size=3,
    )  # fmt: skip
    monkeypatch.setattr(training.density_control, "free_memory", lambda _: 10**9)
    bound = with_bound(options, None, torch.device("cpu"), channels).max_gaussians
    # Half of the memory: values, gradients, two moments, a copy; 5 statistics; 100 numbers per Gaussian and image.
    assert bound == 10**9 // 2 // (4 * (5 * raw + 5 + 100 * heads * 5))


@pytest.mark.parametrize("heads", [1, 2])
def test_every_parameter_has_its_group_and_its_row(heads):
    model = model_of(heads=heads)
    groups = make_optimizer(model, OptimisationOptions()).param_groups
    assert [group["name"] for group in groups] == list(model.params)
    assert list(model.params) == [name for name in PARAMETERS if heads == 2 or not name.endswith("_seg")]
    of_heads = {name for head in (IMAGE, SEGMENTATION) for name in head_parameters(head)}
    assert of_heads | {"xyz", "scaling", "rotation", "m", "sigma", "w1"} == PARAMETERS.keys()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("sigma", torch.zeros(50, 1), "sigma has the shape"),
        ("m", torch.zeros(49, 1), r"m has the shape \(49, 1\), not \(50, 1\)"),
        ("colour", torch.zeros(50, 1), "colour is not a parameter"),
        ("f_rest", torch.zeros(50, 3, 2), "f_rest has the shape"),  # f_dc has one channel
    ],
)
def test_a_model_of_shapes_that_do_not_fit_is_an_error(name, value, words):
    params = {key: tensor.detach() for key, tensor in model_of().params.items()}
    with pytest.raises(ValueError, match=words):
        GaussianModel(params | {name: value}, torch.full((4,), 0.25))
