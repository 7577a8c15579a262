"""Command lines: published flags and defaults, True and False, ranges, and cfg_args that is never executed."""

import ast
from argparse import SUPPRESS
from dataclasses import fields

import pytest

from arguments import (
    IGNORED,
    OptimisationOptions,
    RenderOptions,
    TrainOptions,
    merge,
    read_cfg_args,
    render_options,
    render_parser,
    resolve_device,
    train_options,
    train_parser,
    write_cfg_args,
)
from utils.errors import UserError

PUBLISHED_DEFAULTS = {
    "pipeline": "img", "lambda_img": 1.0, "lambda_seg": 1.0, "seg_head_only": False, "start_checkpoint": None,
    "iterations": 30000, "test_iterations": (5000, 10000, 15000, 20000, 25000, 30000, 40000, 100000),
    "save_iterations": (30000,), "checkpoint_iterations": (), "save_xyz": False, "random_background": False,
    "poly_degree": 7, "batch_size": 3, "num_pts": 100000, "sh_degree": 0, "camera": "mirror", "distance": 1.0,
    "white_background": False, "resolution": -1, "use_dff": False, "gs_type": "gs",
    "position_lr_init": 1.6e-4, "position_lr_final": 1.6e-6, "position_lr_max_steps": 30000, "feature_lr": 2.5e-3,
    "opacity_lr": 2.5e-2, "scaling_lr": 5e-3, "rotation_lr": 1e-3, "percent_dense": 0.01,
    "densification_interval": 100, "opacity_reset_interval": 3000, "densify_from_iter": 500,
    "densify_until_iter": 20000, "densify_grad_threshold": 2e-4,
}  # fmt: skip


def test_defaults_are_the_published_ones():
    options = train_options(["-s", "data"])
    for name, value in PUBLISHED_DEFAULTS.items():
        assert getattr(options, name) == value, name


# Options known to users of the published programs. Hidden ones have no meaning here.
PUBLISHED_FLAGS = {
    train_parser: (
        "source_path model_path pipeline seg_source_path lambda_img lambda_seg seg_head_only start_checkpoint "
        "iterations test_iterations save_iterations checkpoint_iterations save_xyz random_background poly_degree "
        "batch_size num_pts sh_degree camera distance white_background resolution images data_device eval quiet "
        "debug antialiasing debug_from detect_anomaly use_dff gs_type position_lr_init position_lr_final "
        "position_lr_max_steps feature_lr opacity_lr scaling_lr rotation_lr percent_dense "
        "densification_interval opacity_reset_interval densify_from_iter densify_until_iter densify_grad_threshold "
        "lambda_dssim"
    ),
    render_parser: (
        "model_path iteration interp pipeline chunks extension poly_degree quiet generate_points_path mask_path modify "
        "source_path images resolution white_background distance antialiasing"
    ),
}
PUBLISHED_SHORT = {
    "s": "source_path",
    "m": "model_path",
    "i": "images",
    "r": "resolution",
    "w": "white_background",
}
HIDDEN = {
    train_parser: (
        "depths train_test_exp exposure_lr_init exposure_lr_final exposure_lr_delay_steps exposure_lr_delay_mult "
        "depth_l1_weight_init depth_l1_weight_final convert_SHs_python compute_cov3D_python "
        "prune_non_used_gaussians_interval position_lr_delay_mult optimizer_type"
    ),
    render_parser: "skip_train skip_test eval sh_degree num_pts camera use_dff gs_type data_device depths",
}


@pytest.mark.parametrize("parser", PUBLISHED_FLAGS)
def test_published_flags_are_shown_or_accepted_and_hidden(parser):
    actions = {action.dest: action for action in parser()._actions}
    flags = {flag: action.dest for action in parser()._actions for flag in action.option_strings}
    for name in PUBLISHED_FLAGS[parser].split():
        assert flags[f"--{name}"] == name and actions[name].help != SUPPRESS, name
    for name in HIDDEN[parser].split():
        assert actions[name].help == SUPPRESS, name
    for short, name in PUBLISHED_SHORT.items():
        assert flags[f"-{short}"] == name
    assert flags["-d"] == "depths"


def test_short_forms():
    options = train_options(["-s", "data", "-m", "out", "-i", "frames", "-r", "2", "-w"])
    assert (options.source_path, options.model_path) == ("data", "out")
    assert (options.images, options.resolution, options.white_background) == ("frames", 2, True)


def test_every_option_has_help_and_its_own_flag():
    for parser, kind in ((train_parser(), TrainOptions), (render_parser(), RenderOptions)):
        text = parser.format_help()
        for option in fields(kind):
            if option.metadata:
                assert option.metadata["help"]
                assert f"--{option.name}" in text


@pytest.mark.parametrize(
    ("words", "value"), [([], True), (["True"], True), (["False"], False), (["false"], False), (["0"], False)]
)
def test_false_means_false(words, value):
    assert train_options(["-s", "data", "--use_dff", *words, "--quiet"]).use_dff is value


def test_neither_true_nor_false_is_an_error():
    with pytest.raises(UserError, match="maybe"):
        train_options(["-s", "data", "--use_dff", "maybe"])


def test_lists_of_iterations():
    options = train_options(["-s", "data", "--test_iterations", "7", "30", "--save_iterations", "-1"])
    assert options.test_iterations == (7, 30)
    assert options.save_iterations == (-1,)  # how old scripts say: never


def test_a_preset_gives_defaults_alone():
    """The command line takes precedence, even if it gives the published value, in any order."""
    plain, fast = train_options(["-s", "data"]), train_options(["-s", "data", "--preset", "fast"])
    assert (plain.iterations, plain.ibfr_target) == (30_000, "linear")
    assert (fast.iterations, fast.ibfr_target) == (1200, "motion")
    assert fast.given == plain.given | {"preset"}
    mixed = train_options(
        ["--iterations", "30000", "-s", "data", "--preset", "fast", "--ibfr_target", "linear"]
    )
    assert (mixed.iterations, mixed.ibfr_target, mixed.lambda_ibfr) == (30_000, "linear", fast.lambda_ibfr)


def test_no_model_path_gives_a_fresh_folder_under_output():
    first, second = train_options(["-s", "data"]), train_options(["-s", "data"])
    assert first.model_path.startswith("output/")
    assert first.model_path != second.model_path
    assert "model_path" not in first.given


def test_ignored_options_are_named_in_one_line_and_hidden(capsys):
    words = [
        "-d",
        "depths",
        "--optimizer_type",
        "sparse_adam",
        "--exposure_lr_init",
        "0.1",
        "--train_test_exp",
    ]
    train_options(["-s", "data", *words])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "ignored: -d, --optimizer_type, --exposure_lr_init, --train_test_exp (no meaning in this program)"
    ]
    text = train_parser().format_help()
    assert not any(f"--{name} " in text or f"--{name}\n" in text for name in IGNORED)


def test_nothing_ignored_nothing_said(capsys):
    train_options(["-s", "data"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "-s ROOT"),
        ("-s data --poly_degree -1", "--poly_degree is -1: give a number of at least 0"),
        ("-s data --iterations 0", "--iterations"),
        ("-s data --num_pts 0", "--num_pts"),
        ("-s data --distance 0", "--distance is 0.0: give a number above 0"),
        ("-s data --distance nan", "finite"),
        ("-s data --resolution 0", "--resolution is 0"),
        ("-s data --lambda_dssim -1", "--lambda_dssim"),
        ("-s data --ibfr_alpha_min 0.9", "--ibfr_alpha_min is above"),
        ("-s data --ibfr_skip 1", "every iteration: give 2 or more"),
        ("-s data --camera two", "--camera"),
        ("-s data --pipeline joint", "--seg_source_path"),
        ("-s data --seg_head_only", "--start_checkpoint"),
        ("-s data --device tpu", "--device tpu"),
        ("-s data --data_device disk", "--data_device disk"),
        ("-s data --iter 7", "unrecognized arguments: --iter"),
    ],
)
def test_mistakes_are_user_errors(words, message):
    with pytest.raises(UserError) as error:
        train_options(words.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_train_options_serve_where_one_group_is_wanted():
    assert isinstance(train_options(["-s", "data"]), OptimisationOptions)
    assert OptimisationOptions().lambda_l1 == 2.0


def test_cfg_args_round_trip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = train_options(["-s", "it's data", "--use_dff", "--test_iterations", "1", "--distance", "1.5"])
    write_cfg_args(tmp_path / "cfg_args", options)
    values = read_cfg_args(tmp_path / "cfg_args")
    assert values["source_path"] == str(tmp_path / "it's data")
    assert values["test_iterations"] == [1]
    assert (values["use_dff"], values["distance"], values["seg_source_path"]) == (True, 1.5, None)
    assert (values["depths"], values["eval"]) == ("", False)  # the published reader expects these
    assert "given" not in values
    call = ast.parse((tmp_path / "cfg_args").read_text(), mode="eval").body
    assert isinstance(call, ast.Call) and call.func.id == "Namespace"


@pytest.mark.parametrize(
    "text",
    [
        "Namespace(a=__import__('pathlib').Path({marker!r}).touch())",
        "__import__('pathlib').Path({marker!r}).touch()",
        "Namespace(**__import__('os').environ)",
        "Namespace(1)",
        "(lambda: Namespace(a=1))()",
        "import os",
        "Namespace(a=1",
        "Namespace(a=" + "(" * 5000,
        "Namespace(a=" + "-" * 50000 + "1)",
        "",
        "\0",
    ],
)
def test_cfg_args_are_never_executed(tmp_path, text):
    marker = tmp_path / "executed"
    (tmp_path / "cfg_args").write_text(text.replace("{marker!r}", repr(str(marker))))
    with pytest.raises(UserError, match="cfg_args is not Namespace"):
        read_cfg_args(tmp_path / "cfg_args")
    assert not marker.exists()


def test_cfg_args_of_bytes_are_refused(tmp_path):
    (tmp_path / "cfg_args").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="cfg_args"):
        read_cfg_args(tmp_path / "cfg_args")


def test_command_line_wins_over_cfg_args_and_defaults_do_not(tmp_path):
    text = "Namespace(source_path='/data', distance=2.0, white_background=True, resolution=4, pipeline='joint', x=1)"
    (tmp_path / "cfg_args").write_text(text)
    options = render_options(["-m", str(tmp_path), "--distance", "1.0", "--white_background", "False"])
    assert options.distance == 1.0  # given, although it is the default
    assert options.white_background is False
    assert (options.resolution, options.source_path) == (4, "/data")
    assert options.pipeline == "img"  # a different option of the same name: what to render
    assert options.given == {"model_path", "distance", "white_background"}


def test_render_without_cfg_args_takes_defaults(tmp_path):
    options = render_options(["-m", str(tmp_path)])
    assert (options.iteration, options.interp, options.chunks, options.extension) == (-1, 1, 1, ".png")
    assert options.poly_degree is None


def test_saved_values_of_another_type_are_named():
    with pytest.raises(UserError, match=r"here/cfg_args: resolution is '4'"):
        merge(RenderOptions, {"model_path": "out"}, {"resolution": "4"}, "here/cfg_args")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "-m FOLDER"),
        ("-m out --interp 0", "--interp"),
        ("-m out --chunks 0", "--chunks"),
        ("-m out --iteration -2", "--iteration"),
        ("-m out --extension png", "--extension png"),
        ("-m out --modify script.py", "FILE.py:FUNCTION"),
        ("-m out --video 0", "--video is 0.0: give a number above 0"),
        ("-m out --video_format avi", "--video_format"),
        ("-m out --pipeline joint", "--pipeline"),
    ],
)
def test_mistakes_of_render_are_user_errors(words, message):
    with pytest.raises(UserError) as error:
        render_options(words.split())
    assert message in str(error.value)


def test_render_ignores_what_only_training_needs(capsys):
    render_options(["-m", "out", "--skip_train", "--skip_test", "--num_pts", "5"])
    assert capsys.readouterr().err.startswith("ignored: --skip_train, --skip_test, --num_pts")


@pytest.mark.parametrize(("words", "rate"), [("", None), ("--video", 15.0), ("--video 30", 30.0)])
def test_a_video_has_a_rate_of_its_own_or_the_usual_one(words, rate):
    assert render_options(f"-m out {words} --nifti".split()).video == rate


def test_frames_folder(tmp_path):
    assert train_options(["-s", "data"]).frames_folder.as_posix() == "data/original"
    published = train_options(["-s", str(tmp_path), "-i", "images"])
    assert published.frames_folder == tmp_path / "original"
    (tmp_path / "images").mkdir()
    assert published.frames_folder == tmp_path / "images"


def test_resolve_device():
    torch = pytest.importorskip("torch")
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="--device cpu"):
        resolve_device("cuda:99")
