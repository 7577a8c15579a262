"""simple_knn: mean squared distance to the three nearest other points, against all pairs."""

import pytest
import torch

from simple_knn._C import distCUDA2

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def all_pairs(points: torch.Tensor) -> torch.Tensor:
    """The definition in float64: every squared distance, except that to the point itself."""
    points = points.double().cpu()
    squared = (points[:, None] - points[None]).square().sum(-1)  # [N, N]
    squared.fill_diagonal_(torch.inf)
    return squared.sort(dim=1).values[:, : min(3, len(points) - 1)].mean(dim=1)


def cloud(kind: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    points = torch.rand(n, 3, dtype=dtype, generator=torch.Generator().manual_seed(n)) * 2 - 1
    if kind != "volume":
        points[:, 1] = 0  # the plane that the Gaussians start in
    if kind == "line":
        points[:, 2] = 0.5
    if kind == "clustered":
        points = points**9
    if kind == "doubled":
        points = (points * 8).round() / 8  # about a hundred places for all of them
    return points


def tolerance(dtype: torch.dtype) -> dict:
    # A few rounding errors each in subtracting, squaring and adding: the distances are small sums of positive terms.
    return {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 0}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["volume", "plane", "line", "clustered", "doubled"])
@pytest.mark.parametrize("n", [2, 5, 257, 1500])  # around the kernel's boxes of 256 points
def test_agrees_with_all_pairs(kind: str, n: int, dtype: torch.dtype, device: str) -> None:
    points = cloud(kind, n, dtype)
    means = distCUDA2(points.to(device))
    assert means.shape == (n,)
    assert means.dtype == dtype
    assert means.device.type == device
    torch.testing.assert_close(means.cpu().double(), all_pairs(points), **tolerance(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_others_are_told_apart_by_index(device: str) -> None:
    points = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 2]], device=device)
    torch.testing.assert_close(distCUDA2(points).cpu(), torch.tensor([5 / 3, 5 / 3, 7 / 3, 13 / 3]))


@pytest.mark.parametrize("device", DEVICES)
def test_identical_points_are_at_distance_zero(device: str) -> None:
    assert distCUDA2(torch.full((600, 3), 0.3, device=device)).eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_few_points_average_the_neighbours_there_are(device: str) -> None:
    points = torch.tensor([[0.0, 0, 0], [3, 0, 4], [1, 0, 0]], device=device)
    assert distCUDA2(points[:1]).tolist() == [0]
    assert distCUDA2(points[:2]).tolist() == [25, 25]
    assert distCUDA2(points).tolist() == [13, 22.5, 10.5]


@pytest.mark.parametrize("device", DEVICES)
def test_takes_strided_points_that_want_gradients(device: str) -> None:
    points = cloud("plane", 100, torch.float32).to(device)
    strided = points.repeat_interleave(2, dim=0)[::2].requires_grad_()
    means = distCUDA2(strided)
    assert not means.requires_grad
    assert means.equal(distCUDA2(points))


@pytest.mark.cuda
@pytest.mark.parametrize("n", [100_000, 1_000_003])
def test_kernel_agrees_with_tree(n: int) -> None:
    points = cloud("plane", n, torch.float32)
    torch.testing.assert_close(distCUDA2(points.cuda()).cpu(), distCUDA2(points), **tolerance(torch.float32))


@pytest.mark.parametrize("shape", [(0, 3), (5, 2), (3,), (1, 5, 3)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(N, 3\)"):
        distCUDA2(torch.zeros(shape))


def test_refuses_other_types() -> None:
    with pytest.raises(TypeError, match="int64"):
        distCUDA2(torch.zeros(5, 3, dtype=torch.int64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_coordinates_that_are_not_finite(value: float) -> None:
    points = torch.zeros(5, 3)
    points[3, 1] = value
    with pytest.raises(ValueError, match="finite"):
        distCUDA2(points)
