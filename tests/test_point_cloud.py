"""point_cloud.ply: the published columns, checked with an independent reader, and headers that lie."""

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement

from scene.point_cloud import read_point_cloud, write_point_cloud, write_points
from utils.errors import UserError

N, P, K, REST = 4, 2, 3, 3


def make_params(channels=1, seg=False):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "xyz": (N, 3), "f_dc": (N, 1, channels), "f_rest": (N, REST, channels), "opacity": (N, 1), "scaling": (N, 3),
        "rotation": (N, 1), "m": (N, 1), "sigma": (N, 1, 1), "w1": (N, 2 * P),
    }  # fmt: skip
    if seg:
        shapes.update(f_dc_seg=(N, 1, channels), f_rest_seg=(N, REST, channels), opacity_seg=(N, 1))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "point_cloud.ply"


PUBLISHED_COLUMNS = [
    "x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *(f"f_rest_{i}" for i in range(3 * REST)),
    "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "m_0", "sigma_0", "w1_0", "w1_1", "w1_2", "w1_3",
]  # fmt: skip


def test_columns_are_the_published_ones(path):
    params = make_params(3)
    write_point_cloud(path, params, torch.tensor([0.2, 0.3, 0.5]))
    ply = PlyData.read(path)
    assert not ply.text and ply.byte_order == "<"
    assert [element.name for element in ply.elements] == ["vertex", "time"]
    vertex, time = ply["vertex"], ply["time"]
    assert [p.name for p in vertex.properties] == PUBLISHED_COLUMNS
    assert {p.val_dtype for p in vertex.properties} == {"f4"}
    assert [p.name for p in time.properties] == [
        "time_func_0",
        "time_func_1",
        "time_func_2",
    ] and time.count == 1
    assert vertex["z"].tolist() == params["xyz"][:, 2].tolist()
    assert (vertex["ny"] == 0).all()
    assert vertex["rot_0"].tolist() == params["rotation"][:, 0].tolist()
    assert vertex["w1_3"].tolist() == params["w1"][:, 3].tolist()
    # Channel by channel: f_rest_0.. are the harmonics of red, the next those of green.
    assert vertex["f_rest_1"].tolist() == params["f_rest"][:, 1, 0].tolist()
    assert vertex[f"f_rest_{REST}"].tolist() == params["f_rest"][:, 0, 1].tolist()


def test_columns_of_the_seg_head_come_last_and_look_like_no_others(path):
    write_point_cloud(path, make_params(1, seg=True), torch.full((K,), 1 / K))
    names = [p.name for p in PlyData.read(path)["vertex"].properties]
    assert names[: len(PUBLISHED_COLUMNS)] == PUBLISHED_COLUMNS
    ours = names[len(PUBLISHED_COLUMNS) :]
    assert ours == [
        "seg_opacity",
        *(f"seg_f_dc_{i}" for i in range(3)),
        *(f"seg_f_rest_{i}" for i in range(9)),
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seg", [False, True])
@pytest.mark.parametrize("dff", [False, True])
def test_write_and_read_is_exact(path, channels, seg, dff):
    params = make_params(channels, seg)
    time_func = torch.randn(K - 1, 1) if dff else torch.full((K,), 1 / K)
    write_point_cloud(path, params, time_func)
    again, times = read_point_cloud(path)
    assert again.keys() == params.keys()
    for name, value in params.items():
        assert torch.equal(again[name], value), name
    assert torch.equal(times, time_func)


def test_files_of_other_writers_are_read(path):
    """As the published program writes it: with plyfile, no harmonics, no comments."""
    names = [name for name in PUBLISHED_COLUMNS if not name.startswith("f_rest")]
    vertices = np.zeros(N, [(name, "f4") for name in names])
    for i, name in enumerate(names):
        vertices[name] = i
    times = np.array([(0.5, 0.25, 0.25)], [(f"time_func_{k}", "f4") for k in range(K)])
    PlyData(
        [PlyElement.describe(vertices, "vertex"), PlyElement.describe(times, "time")], byte_order="<"
    ).write(path)
    params, durations = read_point_cloud(path)
    assert params["f_rest"].shape == (N, 0, 3) and params["sigma"].shape == (N, 1, 1)
    assert params["f_dc"][0, 0].tolist() == [6, 7, 8]
    assert params["scaling"][0].tolist() == [10, 11, 12]
    assert durations.tolist() == [0.5, 0.25, 0.25]


def edit(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"ply\n", b"pjy\n", "does not begin"),
        (b"binary_little_endian", b"ascii", "not binary little endian but ascii"),
        (b"binary_little_endian", b"binary_big_endian", "binary_big_endian"),
        (b"end_header", b"", "no end"),
        (b"element vertex 4", b"element vertex 4000000000000", "claims"),
        (b"element vertex 4", b"element vertex -4", "element vertex -4"),
        (b"element vertex 4", b"element corner 4", "no element vertex"),
        (b"element time 1", b"element time 0", "rows of time"),
        (b"property float opacity", b"property float capacity", "no column opacity"),
        (b"property float m_0", b"property float n_0", "no column m_0"),
        (b"property float w1_1", b"property float v1_1", "no column w1_3|no column w1_1"),
        (b"property float x", b"property double x", "property double x"),
        (b"property float x", b"property list uchar int x", "property list"),
        (b"property float y", b"property float x", "property float x"),
        (b"property float f_rest_8", b"property float g_rest_8", "three for each harmonic"),
    ],
)
def test_headers_that_lie_are_user_errors(path, old, new, message):
    write_point_cloud(path, make_params(1), torch.full((K,), 1 / K))
    edit(path, old, new)
    with pytest.raises(UserError, match=message) as error:
        read_point_cloud(path)
    assert str(path) in str(error.value)


def test_torn_and_missing_files(path):
    write_point_cloud(path, make_params(1), torch.full((K,), 1 / K))
    data = path.read_bytes()
    for size in (0, 3, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"point_cloud\.ply"):
            read_point_cloud(path)
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        read_point_cloud(path)


def test_no_gaussians(path):
    params = {name: value[:0] for name, value in make_params(1).items()}
    write_point_cloud(path, params, torch.full((K,), 1 / K))
    assert read_point_cloud(path)[0]["w1"].shape == (0, 2 * P)


def test_bare_points(path):
    points = torch.rand(5, 3)
    write_points(path, points, torch.tensor([[0.0, 0.5, 1.0]]).expand(5, 3))
    vertex = PlyData.read(path)["vertex"]
    assert np.array_equal(np.stack([vertex[axis] for axis in "xyz"], axis=1), points.numpy())
    assert (vertex["red"][0], vertex["green"][0], vertex["blue"][0]) == (0, 128, 255)
    assert vertex["nx"].dtype == np.float32
