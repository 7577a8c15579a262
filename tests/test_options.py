"""Every option that --help shows does something: another value makes another model, or is tested by name elsewhere."""

from dataclasses import fields

import pytest
import torch
from sequences import blobs, checkpoint, masks, refused, threads, train_at, write

from arguments import RenderOptions, TrainOptions

# A schedule in which all that can happen does happen within 24 iterations.
SCHEDULE = {
    "iterations": 24,
    "densify_from_iter": 5,
    "densification_interval": 5,
    "densify_until_iter": 23,
    "opacity_reset_interval": 9,
    "ibfr_from_iter": 12,
    "position_lr_max_steps": 30,
    "sigma_until_iter": 22,
    "prune_scale": 0.05,
    "prune_scale_from_iter": 9,
    "densify_grad_threshold": 2e-3,
    "prune_opacity": 0.002,
}
JOINT = {"pipeline": "joint", "seg_source_path": "SEG"}
SEG = {"pipeline": "seg"}
HEAD = {"pipeline": "seg", "seg_head_only": True, "start_checkpoint": "MODEL"}
HARMONICS = {"sh_degree": 1, "sh_degree_interval": 8}
LEARNED = {"use_dff": True}

# Option -> another value, and what the run needs for it to matter.
CHANGES = {
    "lambda_img": (2.0, JOINT),
    "lambda_seg": (2.0, JOINT),
    "lambda_l1": (1.0, {}),
    "lambda_dssim": (0.5, {}),
    "lambda_ibfr": (1.0, {}),
    "lambda_sigma": (1.0, {}),
    "lambda_l1_seg": (1.0, SEG),
    "lambda_sigma_seg": (1.0, SEG),
    "sigma_until_iter": (3, {}),
    "sigma_low_views": (4.0, {}),
    "sigma_high": (0.5, {}),
    "ibfr_from_iter": (18, {}),
    "ibfr_alpha_min": (0.6, {}),
    "ibfr_alpha_max": (0.4, {}),
    "batch_size": (1, {}),
    "random_background": (True, {}),
    "extent_per_distance": (3.0, {}),
    "position_lr_init": (1e-3, {}),
    "position_lr_final": (1e-4, {}),
    "position_lr_max_steps": (10, {}),
    "feature_lr": (1e-2, {}),
    "feature_rest_divisor": (2.0, HARMONICS),
    "opacity_lr": (1e-2, {}),
    "scaling_lr": (1e-2, {}),
    "rotation_lr": (1e-2, {}),
    "m_lr": (1e-2, {}),
    "sigma_lr": (1e-2, {}),
    "w1_lr": (1e-2, {}),
    "time_func_lr": (1e-2, LEARNED),
    "seg_head_lr": (1e-2, HEAD),
    "adam_eps": (1e-3, {}),
    "sh_degree_interval": (4, HARMONICS),
    "densification_interval": (7, {}),
    "densify_from_iter": (11, {}),
    "densify_until_iter": (12, {}),
    "densify_grad_threshold": (1.0, {}),
    "percent_dense": (1.0, {}),
    "split_sigma": (0.1, {}),
    "split_children": (3, {}),
    "split_shrink": (3.0, {}),
    "prune_opacity": (0.1, {"opacity_reset_interval": 1000}),
    "prune_scale": (0.02, {}),
    "prune_scale_from_iter": (23, {}),
    "opacity_reset_interval": (12, {}),
    "opacity_reset_value": (0.05, {}),
    "poly_degree": (1, {}),
    "sh_degree": (2, {}),
    "num_pts": (80, {}),
    "max_gaussians": (160, {}),
    "camera": ("one", {}),
    "use_dff": (True, {}),
    "distance": (2.0, {}),
    "white_background": (True, {}),
    "resolution": (2, {}),
    "seed": (1, {}),
    "eval": (True, {"eval_every": 2}),
    "eval_every": (3, {"eval": True, "eval_every": 2}),
    "iterations": (23, {}),
}

# What does not change the model, or what the runs above give as a means; each has its own test.
ELSEWHERE = {
    "source_path", "model_path", "images", "pipeline", "seg_source_path", "seg_head_only", "start_checkpoint",
    "test_iterations", "save_iterations", "checkpoint_iterations", "save_xyz", "quiet", "debug", "device", "rasterizer",
    "data_device", "debug_from", "detect_anomaly", "gs_type",
    "keep_checkpoints", "checkpoint_interval", "max_pixels", "deterministic",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with threads(1):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """options -> the parameters and times of the model that they train; each run once."""
    folder = tmp_path_factory.mktemp("options")
    roots = {"seg": write(folder / "seg", masks()), "img": write(folder / "img", blobs())}
    runs = {}

    def model(**options):
        options = SCHEDULE | options
        key = repr(sorted(options.items()))
        if key not in runs:
            if options.get("start_checkpoint"):
                start = folder / "start"
                if not start.exists():
                    train_at(roots["img"], start, "--iterations", 2)
                options["start_checkpoint"] = start / "chkpnt2.pth"
            if "seg_source_path" in options:
                options["seg_source_path"] = roots["seg"]
            root = roots["seg" if options.get("pipeline") == "seg" else "img"]
            flags = [word for name, value in options.items() for word in (f"--{name}", value)]
            out = folder / f"run{len(runs)}"
            train_at(root, out, *flags)
            saved = checkpoint(out, options["iterations"])
            runs[key] = {**saved.params, "time_func": saved.time_func}
        return runs[key]

    return model


def same(a, b):
    return a.keys() == b.keys() and all(
        value.shape == b[name].shape and torch.equal(value, b[name]) for name, value in a.items()
    )


@pytest.mark.parametrize("name", CHANGES)
def test_another_value_makes_another_model(model, name):
    value, needed = CHANGES[name]
    assert not same(model(**needed), model(**needed | {name: value}))


def test_the_same_values_make_the_same_model(model):
    assert same(model(), model(seed=0))  # given, and by default: two runs


def test_every_option_is_tested():
    named = {option.name for option in fields(TrainOptions) if option.metadata}
    assert named == CHANGES.keys() | ELSEWHERE and not CHANGES.keys() & ELSEWHERE
    tests = "".join(
        path.read_text() for path in sorted(__import__("pathlib").Path(__file__).parent.glob("test_*.py"))
    )
    options = {option.name: option.metadata["short"] for option in fields(RenderOptions) if option.metadata}
    options |= {
        option.name: option.metadata["short"] for option in fields(TrainOptions) if option.name in ELSEWHERE
    }
    for name, short in options.items():
        assert f'"--{name}' in tests or f" --{name}" in tests or f'"-{short}"' in tests, name


@pytest.mark.parametrize(
    ("flag", "place", "name"),
    [
        ("--detect_anomaly", torch.autograd, "set_detect_anomaly"),
        ("--deterministic", torch, "use_deterministic_algorithms"),
    ],
)
def test_modes_of_pytorch_are_turned_on(tmp_path, monkeypatch, flag, place, name):
    set_to = []
    monkeypatch.setattr(place, name, set_to.append)
    train_at(write(tmp_path / "data", blobs()), tmp_path / "out", "--iterations", 1, flag)
    assert set_to == [True]


def test_larger_images_are_refused(tmp_path, capsys):
    root = write(tmp_path / "data", blobs())
    assert refused(root, tmp_path / "out", "--max_pixels", 479) == 2  # 24 x 20 is 480
    assert "0000.png is 24 x 20 pixels" in capsys.readouterr().err
    train_at(root, tmp_path / "out", "--max_pixels", 480, "--iterations", 1)
    train_at(root, tmp_path / "two", "--iterations", 1)  # the limit is the process's: back to the usual one


def test_there_is_one_kind_of_gaussians(tmp_path, capsys):
    root = write(tmp_path / "data", blobs())
    assert refused(root, tmp_path / "out", "--gs_type", "gs_flat") == 2
    assert "gs_flat" in capsys.readouterr().err
