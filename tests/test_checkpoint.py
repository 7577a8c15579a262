"""Checkpoints: the published format both ways, exact resuming, and damaged or malicious files.

Published files are built here by hand from the description of the format, numpy scalars included.
"""

import copy
import os
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from scene.checkpoint import Checkpoint, find, load_checkpoint, newest, save_checkpoint
from utils.errors import UserError

N, P, K, DEGREE = 5, 3, 4, 1
REST = (DEGREE + 1) ** 2 - 1


def make_params(channels=1, seg=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "xyz": (N, 3), "f_dc": (N, 1, channels), "f_rest": (N, REST, channels), "opacity": (N, 1), "scaling": (N, 3),
        "rotation": (N, 1), "m": (N, 1), "sigma": (N, 1, 1), "w1": (N, 2 * P),
    }  # fmt: skip
    if seg:
        shapes.update(f_dc_seg=(N, 1, channels), f_rest_seg=(N, REST, channels), opacity_seg=(N, 1))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def stepped_adam(params, lr=1e-3):
    """Adam with one named group per parameter, after two steps."""
    groups = [{"params": [nn.Parameter(value)], "name": name, "lr": lr} for name, value in params.items()]
    optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-15)
    for _ in range(2):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.randn_like(group["params"][0])
        optimizer.step()
    return optimizer


def make_checkpoint(channels=1, seg=False, dff=False):
    params = make_params(channels, seg)
    time_func = torch.randn(K - 1, 1) if dff else torch.full((K,), 1 / K)
    learned = {**params, "time_func": time_func} if dff else params
    return Checkpoint(
        iteration=7,
        params=params,
        time_func=time_func,
        active_sh_degree=1,
        spatial_lr_scale=1.1,
        statistics={
            "max_radii2D": torch.rand(N), "xyz_gradient_accum": torch.rand(N, 1), "denom": torch.rand(N, 1),
            "m_gradient_accum": torch.rand(N, 1), "m_denom": torch.rand(N, 1),
        },
        optimizer=stepped_adam(learned).state_dict(),
        extras={
            "width": 13, "height": 11, "distance": 0.5, "bits": 16, "numbers": [1, 2, 5, 7], "pixels": "a0",
            "options": {"lambda_l1": 2.0, "pipeline": "img", "test_iterations": [1, 2], "seg_source_path": None},
            "background": torch.rand(channels), "random": torch.Generator().manual_seed(3).get_state(),
            "gradients": {"xyz": torch.rand(N, 3), "f_dc": torch.rand(N, 1, channels)},
            "trained": {name: torch.rand_like(value) for name, value in {**params, "time_func": time_func}.items()},
        },
    )  # fmt: skip


def assert_same(a, b):
    """Bit-identical, through dicts, lists and tuples."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert type(a) is type(b) and a == b


def published_state(params=None, optimizer=None):
    """The state of a published file, from colour params."""
    params = params or make_params(3)
    seg = {name: params.get(name, torch.empty(0)) for name in ("opacity_seg", "f_dc_seg", "f_rest_seg")}
    return {
        "version": 2,
        "active_sh_degree": 1,
        "_xyz": nn.Parameter(params["xyz"]),
        "_features_dc": nn.Parameter(params["f_dc"]),
        "_features_rest": nn.Parameter(params["f_rest"]),
        "_scaling": nn.Parameter(params["scaling"]),
        "_rotation": nn.Parameter(params["rotation"]),
        "_opacity": nn.Parameter(params["opacity"]),
        "max_radii2D": torch.rand(N),
        "xyz_gradient_accum": torch.rand(N, 1),
        "denom": torch.rand(N, 1),
        "optimizer_state": optimizer or stepped_adam(params, lr=np.float64(0.00123)).state_dict(),
        "spatial_lr_scale": np.float32(1.1),
        "m": nn.Parameter(params["m"]),
        "sigma": nn.Parameter(params["sigma"]),
        "_w1": nn.Parameter(params["w1"]),
        "time_func": torch.full((K,), 1 / K),
        "polynomial_degree": P,
        "_opacity_seg": seg["opacity_seg"],
        "_features_dc_seg": seg["f_dc_seg"],
        "_features_rest_seg": seg["f_rest_seg"],
    }


PUBLISHED_KEYS = set(published_state())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chkpnt7.pth"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seg", [False, True])
@pytest.mark.parametrize("dff", [False, True])
def test_save_and_load_is_exact(path, channels, seg, dff):
    checkpoint = make_checkpoint(channels, seg, dff)
    before = copy.deepcopy(vars(checkpoint))
    save_checkpoint(path, checkpoint)
    assert_same(vars(checkpoint), before)  # saving leaves the run alone
    loaded = load_checkpoint(path)
    assert_same(vars(loaded), before)
    assert (loaded.channels, loaded.has_seg_head, loaded.uses_dff) == (channels, seg, dff)
    assert (loaded.poly_degree, loaded.sh_degree, loaded.num_frames) == (P, DEGREE, K)


def test_an_optimizer_goes_on_exactly(path):
    """A run that is saved, loaded and continued ends like an uninterrupted one."""
    params = make_params(1)
    straight = stepped_adam({name: value.clone() for name, value in params.items()})
    now = {group["name"]: group["params"][0] for group in straight.param_groups}
    checkpoint = Checkpoint(2, now, torch.full((K,), 1 / K), 0, 1.1, optimizer=straight.state_dict())
    save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    resumed = torch.optim.Adam(
        [{"params": [nn.Parameter(loaded.params[name])], "name": name} for name in now], lr=0.0, eps=1e-15
    )
    resumed.load_state_dict(loaded.optimizer)
    for optimizer in (straight, resumed):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        optimizer.step()
    for ours, theirs in zip(straight.param_groups, resumed.param_groups, strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])


def test_files_are_written_as_published(path):
    checkpoint = make_checkpoint(1, seg=True)
    save_checkpoint(path, checkpoint)
    state, iteration = torch.load(path, weights_only=True)  # and so without any numpy scalar
    assert iteration == 7
    assert set(state) == PUBLISHED_KEYS | {"medgs"}
    for key in ("_xyz", "_features_dc", "_w1", "m", "sigma", "_opacity_seg", "_features_rest_seg"):
        assert isinstance(state[key], nn.Parameter), key
    assert not isinstance(state["time_func"], nn.Parameter)
    assert state["_features_dc"].shape == (N, 1, 3) and state["_features_rest_seg"].shape == (N, REST, 3)
    assert torch.equal(state["_features_dc"], checkpoint.params["f_dc"].expand(-1, -1, 3))
    # The optimizer of a program with three channels takes it.
    shapes = {
        "xyz": "_xyz", "f_dc": "_features_dc", "f_rest": "_features_rest", "opacity": "_opacity", "scaling": "_scaling",
        "rotation": "_rotation", "m": "m", "sigma": "sigma", "w1": "_w1", "f_dc_seg": "_features_dc_seg",
        "f_rest_seg": "_features_rest_seg", "opacity_seg": "_opacity_seg",
    }  # fmt: skip
    optimizer = torch.optim.Adam(
        [{"params": [state[key]], "name": name} for name, key in shapes.items()], lr=0.0
    )
    optimizer.load_state_dict(state["optimizer_state"])
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.zeros_like(group["params"][0])
    optimizer.step()


def test_learned_times_are_a_parameter(path):
    save_checkpoint(path, make_checkpoint(dff=True))
    state, _ = torch.load(path, weights_only=True)
    assert isinstance(state["time_func"], nn.Parameter) and state["time_func"].shape == (K - 1, 1)


def test_without_a_seg_head_there_are_empty_tensors(path):
    save_checkpoint(path, make_checkpoint())
    state, _ = torch.load(path, weights_only=True)
    for key in ("_opacity_seg", "_features_dc_seg", "_features_rest_seg"):
        assert state[key].shape == (0,)


def test_views_are_saved_without_what_they_look_into(path):
    checkpoint = make_checkpoint()
    save_checkpoint(path, checkpoint)
    size = path.stat().st_size
    big = torch.zeros(1_000_000, 3)
    big[:N] = checkpoint.params["xyz"]
    checkpoint.params["xyz"] = big[:N]
    save_checkpoint(path, checkpoint)
    assert path.stat().st_size == size


def test_numpy_numbers_become_plain_and_other_objects_are_refused(path):
    checkpoint = make_checkpoint()
    checkpoint.spatial_lr_scale = np.float64(1.5)
    checkpoint.extras = {"distance": np.float32(0.5), "bits": np.int64(8), "of_a_later_version": 1}
    save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    assert_same(loaded.extras, {"distance": 0.5, "bits": 8})
    checkpoint.extras = {"what": object()}
    with pytest.raises(TypeError, match="object"):
        save_checkpoint(path, checkpoint)
    assert load_checkpoint(path).spatial_lr_scale == 1.5  # the earlier file stays


def test_the_seg_head_alone_has_one_group(path):
    checkpoint = make_checkpoint(1, seg=True)
    names = ("opacity_seg", "f_dc_seg", "f_rest_seg")
    head = [nn.Parameter(checkpoint.params[name].clone()) for name in names]
    optimizer = torch.optim.Adam([{"params": head, "name": "seg_head"}], lr=2.5e-3)
    for value in head:
        value.grad = torch.randn_like(value)
    optimizer.step()
    checkpoint.optimizer = optimizer.state_dict()
    save_checkpoint(path, checkpoint)
    state, _ = torch.load(path, weights_only=True)
    assert state["optimizer_state"]["state"][1]["exp_avg"].shape == (N, 1, 3)
    assert_same(load_checkpoint(path).optimizer, checkpoint.optimizer)


def test_moments_mean_the_same_with_one_channel_and_with_three(path):
    """Grey moments, written with three channels, are those that a mean over three equal channels would have."""
    checkpoint = make_checkpoint(1)
    save_checkpoint(path, checkpoint)
    state, _ = torch.load(path, weights_only=True)
    entry, grey = state["optimizer_state"]["state"][1], checkpoint.optimizer["state"][1]
    assert torch.allclose(entry["exp_avg"], (grey["exp_avg"] / 3).expand(-1, -1, 3))
    assert torch.allclose(entry["exp_avg_sq"], (grey["exp_avg_sq"] / 9).expand(-1, -1, 3))
    del state["medgs"]  # what the published program would write
    torch.save((state, 7), path)
    loaded = load_checkpoint(path)
    assert loaded.channels == 1 and loaded.extras == {}
    for moment in ("exp_avg", "exp_avg_sq"):  # three roundings
        torch.testing.assert_close(loaded.optimizer["state"][1][moment], grey[moment], rtol=1e-6, atol=0)


@pytest.mark.parametrize("seg", [False, True])
def test_published_files_are_read(path, seg):
    params = make_params(3, seg)
    state = published_state(params)
    torch.save((state, 30000), path)
    loaded = load_checkpoint(path)
    assert loaded.iteration == 30000 and loaded.channels == 3 and loaded.has_seg_head == seg
    assert_same(loaded.params, params)
    assert type(loaded.spatial_lr_scale) is float and loaded.spatial_lr_scale == pytest.approx(1.1)
    assert loaded.optimizer["param_groups"][0]["lr"] == 0.00123
    assert set(loaded.statistics) == {"max_radii2D", "xyz_gradient_accum", "denom"}
    assert loaded.extras == {}


@pytest.mark.parametrize("name", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_scalars_of_both_major_versions(path, name):
    torch.save((published_state(), 7), path)
    rewrite(
        path,
        lambda data: data.replace(b"numpy._core.multiarray", name).replace(b"numpy.core.multiarray", name),
    )
    assert load_checkpoint(path).spatial_lr_scale == pytest.approx(1.1)


def rewrite(path, change):
    """Apply `change` to the pickle inside a saved file."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for filename, data in records.items():
            archive.writestr(filename, change(data) if filename.endswith("data.pkl") else data)


class Harm:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_executed(path, zipped):
    marker = path.parent / "executed"
    torch.save(
        ({**published_state(), "spatial_lr_scale": Harm(marker)}, 7),
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UserError, match="refused") as error:
        load_checkpoint(path)
    assert "mkdir" in str(error.value) and str(path) in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_torn_files(path, share):
    save_checkpoint(path, make_checkpoint())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("data", [b"not a checkpoint", b"\x80\x02", bytes(1000), b"ply\n"])
def test_other_files(path, data):
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "chkpnt1.pth")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_the_older_format_is_named(path):
    torch.save(((1, *[torch.zeros(3)] * 11), 7), path)
    with pytest.raises(UserError, match=r"older format.*m, sigma, w1, time_func"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "contents", [3, [1], {"version": 2}, ("state", 1), ({}, "seven"), ({}, -1), ({}, True)]
)
def test_other_contents(path, contents):
    torch.save(contents, path)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(path)


def poisoned(shape):
    values = torch.zeros(shape)
    values.view(-1)[0] = torch.nan
    return values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 3),
        ("version", None),
        ("_xyz", torch.zeros(N, 2)),
        ("_xyz", torch.zeros(N, 3, dtype=torch.float64)),
        ("_xyz", poisoned((N, 3))),
        ("_xyz", "text"),
        ("_scaling", torch.zeros(N + 1, 3)),
        ("_features_dc", torch.zeros(N, 3)),
        ("_features_rest", torch.zeros(N, 5, 3)),
        ("sigma", torch.zeros(N, 1)),
        ("_w1", torch.zeros(N, 2 * P + 1)),
        ("polynomial_degree", P + 1),
        ("_opacity_seg", torch.zeros(N + 2, 1)),
        ("max_radii2D", torch.zeros(N + 1)),
        ("time_func", torch.zeros(2, 2)),
        ("time_func", poisoned((K,))),
        ("active_sh_degree", 2),
        ("active_sh_degree", True),
        ("spatial_lr_scale", float("inf")),
        ("optimizer_state", [1]),
        ("optimizer_state", {"state": {}, "param_groups": [{"params": [0]}]}),
        ("optimizer_state", {"state": {}, "param_groups": [{"params": [0, 1], "name": "xyz"}]}),
        ("optimizer_state", {"state": {}, "param_groups": [{"params": [0], "name": "colour"}]}),
        ("optimizer_state", {"state": {3: {}}, "param_groups": [{"params": [0], "name": "xyz"}]}),
    ],
)
def test_the_key_at_fault_is_named(path, key, value):
    torch.save(({**published_state(), key: value}, 7), path)
    # A head with one tensor present is checked as a whole: another of its keys may be reported first.
    with pytest.raises(UserError, match="_seg" if key.endswith("_seg") else key) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "key", sorted(PUBLISHED_KEYS - {"_opacity_seg", "_features_dc_seg", "_features_rest_seg"})
)
def test_a_missing_key_is_named(path, key):
    state = published_state()
    del state[key]
    torch.save((state, 7), path)
    with pytest.raises(UserError, match=f"{key} is missing"):
        load_checkpoint(path)


def test_moments_of_another_shape_are_named(path):
    state = published_state()
    state["optimizer_state"]["state"][0]["exp_avg"] = torch.zeros(N + 1, 3)
    torch.save((state, 7), path)
    with pytest.raises(UserError, match="exp_avg of xyz"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("width", "13"),
        ("height", 0),
        ("distance", None),
        ("numbers", [1, 2, 3]),
        ("pixels", b"a0"),
        ("options", {"lambda_l1": torch.zeros(2)}),
        ("options", {"test_iterations": [[1]]}),
        ("options", {"antialiasing": "False"}),
        ("background", torch.zeros(4)),
        ("background", torch.full((1,), torch.nan)),
        ("random", torch.zeros(16, dtype=torch.uint8)),
        ("random", torch.zeros(5056, dtype=torch.uint8)),
        ("random", [1]),
        ("gradients", {"xyz": torch.zeros(N, 2)}),
        ("gradients", {"xyz": torch.full((N, 3), torch.inf)}),
        ("gradients", {"abc": torch.zeros(N, 3)}),
        ("gradients", torch.zeros(N, 3)),
        ("trained", {"xyz": torch.zeros(N, 3)}),  # without the others
        ("trained", torch.zeros(N, 3)),
    ],
)
def test_the_extra_at_fault_is_named(path, key, value):
    checkpoint = make_checkpoint()
    checkpoint.extras[key] = value
    save_checkpoint(path, checkpoint)
    word = {"options": "option", "gradients": "gradient", "height": "height"}.get(key, key)
    with pytest.raises(UserError, match=word) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("key", ["height", "distance", "bits", "background"])
def test_an_extra_that_belongs_to_others_is_missed(path, key):
    checkpoint = make_checkpoint()
    del checkpoint.extras[key]
    save_checkpoint(path, checkpoint)
    with pytest.raises(UserError, match=f"{key} is missing"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("moment", "value"),
    [
        ("exp_avg", torch.full((N, 3), torch.nan)),
        ("exp_avg_sq", torch.zeros(N, 3, dtype=torch.float64)),
        ("step", torch.zeros(2)),
        ("step", float("nan")),
        ("step", -1.0),
        ("step", "one"),
    ],
)
def test_moments_and_counts_that_will_not_do_are_named(path, moment, value):
    state = published_state()
    state["optimizer_state"]["state"][0][moment] = value
    torch.save((state, 7), path)
    with pytest.raises(UserError, match=moment):
        load_checkpoint(path)


def test_archives_that_would_grow_are_refused_before_they_are_read(path):
    save_checkpoint(path, make_checkpoint())
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data + bytes(10_000_000) if name.endswith("data/0") else data)
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match="compressed"):
        load_checkpoint(path)


def test_archives_that_claim_more_than_the_file_holds_are_refused(path):
    save_checkpoint(path, make_checkpoint())
    data = path.read_bytes()
    place = data.rindex(b"PK\x01\x02")  # the last entry of the directory: its sizes come 20 bytes on
    path.write_bytes(data[: place + 20] + b"\0\0\0\x7f" * 2 + data[place + 28 :])
    with pytest.raises(UserError, match=r"claims to hold more|damaged"):
        load_checkpoint(path)


def test_statistics_that_are_not_kept(path):
    """Training the segmentation head alone keeps none."""
    state = {**published_state(), "xyz_gradient_accum": torch.empty(0), "denom": torch.empty(0)}
    torch.save((state, 7), path)
    assert set(load_checkpoint(path).statistics) == {"max_radii2D"}
    checkpoint = make_checkpoint()
    checkpoint.statistics, checkpoint.optimizer = {}, None
    save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    assert loaded.optimizer is None
    assert all((value == 0).all() for value in loaded.statistics.values())


def test_find_and_newest(tmp_path):
    for name in ("chkpnt900.pth", "chkpnt10000.pth", "chkpnt_best.pth", ".chkpnt20000.ab.pth"):
        (tmp_path / name).write_bytes(b"")
    assert newest(tmp_path).name == find(tmp_path, -1).name == "chkpnt10000.pth"
    assert find(tmp_path, 900).name == "chkpnt900.pth"
    with pytest.raises(UserError, match="iterations 900, 10000"):
        find(tmp_path, 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint"):
        newest(tmp_path / "empty")
    with pytest.raises(UserError, match="not a folder"):
        newest(tmp_path / "missing")
