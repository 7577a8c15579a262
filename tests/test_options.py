"""Every option that --help shows has an effect: a run with it differs from one without, or a test named here shows it.

A new option in neither table fails; so does a named test that does not exist.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from sequences import BriefInBetween, checkpoint, colours, masks, threads, train_at, write

import evaluate
import interpolate
import prepare
import slices_to_ply
from arguments import OptimisationOptions, render_parser, train_parser

TESTS = Path(__file__).resolve().parent

# A joint run in which every option of the optimisation plays a part: 24 iterations.
BASE = {
    "pipeline": "joint", "iterations": 24, "sh_degree": 1, "sh_degree_interval": 5, "densify_from_iter": 4,
    "densification_interval": 5, "densify_until_iter": 22, "prune_scale_from_iter": 8, "opacity_reset_interval": 12,
    "prune_opacity": 0.005, "ibfr_from_iter": 3, "position_lr_max_steps": 40, "sigma_until_iter": 20,
    "sigma_high": 0.9, "sigma_low_views": 1.0, "use_dff": True, "opacity_reset_value": 0.09, "max_gaussians": 500,
    "prune_scale": 0.05, "average_from_iter": 21, "average_decay": 0.5,
}  # fmt: skip

# Option -> another value, after which the tensors at the end are others.
CHANGES_THE_MODEL = {
    "lambda_img": 0.5, "lambda_seg": 2.0, "lambda_l1": 1.0, "lambda_dssim": 0.5, "lambda_ibfr": 0.1,
    "lambda_sigma": 1.0, "lambda_l1_seg": 1.0, "lambda_sigma_seg": 1.0, "sigma_until_iter": 5, "sigma_low_views": 4.0,
    "sigma_high": 0.5, "lambda_ibfr_seg": 1.0, "lambda_ibfr_dssim": 0.5, "ibfr_target": "motion",
    "ibfr_from_iter": 20, "ibfr_skip": 2, "ibfr_alpha_min": 0.5, "ibfr_alpha_max": 0.5, "batch_size": 2,
    "random_background": True, "extent_per_distance": 2.0, "position_lr_init": 1e-3, "position_lr_final": 1e-4,
    "position_lr_max_steps": 10,
    "feature_lr": 1e-2, "feature_rest_divisor": 5.0, "opacity_lr": 1e-2, "scaling_lr": 1e-2, "rotation_lr": 1e-2,
    "m_lr": 1e-2, "sigma_lr": 1e-2, "w1_lr": 1e-2, "time_func_lr": 1e-2, "adam_eps": 1e-3, "sh_degree_interval": 20,
    "densification_interval": 7, "densify_from_iter": 12, "densify_until_iter": 9, "densify_grad_threshold": 1e-2,
    "percent_dense": 1.0, "split_sigma": 0.3, "split_children": 3, "split_shrink": 3.0, "prune_opacity": 0.088,
    "prune_scale": 0.02, "prune_scale_from_iter": 23, "max_gaussians": 160, "opacity_reset_interval": 9,
    "opacity_reset_value": 0.05, "average_from_iter": 23, "average_decay": 0.9,
    "poly_degree": 2, "sh_degree": 2, "num_pts": 140, "start": "frames", "camera": "one", "use_dff": False,
    "distance": 2.0, "resolution": 2, "white_background": True, "seed": 1, "pipeline": "img", "iterations": 23,
    "antialiasing": True, "slice_thickness": "1.5",
}  # fmt: skip

SHOWN_BY = {
    "train.py": {
        "seg_head_lr": "test_options.py::test_the_rate_of_the_head_alone",
        "preset": "test_arguments.py::test_a_preset_gives_defaults_alone",
        "time": "test_budget.py::test_a_program_ends_on_time",
        "scale_schedule": "test_schedule.py::test_the_published_schedule_is_absolute_unless_asked",
        "source_path": "test_train.py::test_a_missing_folder_as_a_script",
        "images": "test_train.py::test_resolution_and_images",
        "max_pixels": "test_fuzz.py::test_the_limit_of_pixels_is_stated_and_can_be_raised",
        "gs_type": "test_options.py::test_there_is_one_kind_of_gaussians",
        "model_path": "test_train.py::test_without_m_there_is_a_fresh_folder",
        "seg_source_path": "test_pipelines.py::test_resumed_runs_go_on_bit_for_bit",
        "seg_head_only": "test_pipelines.py::test_resumed_runs_go_on_bit_for_bit",
        "start_checkpoint": "test_resume.py::test_a_run_that_was_over_goes_on_as_a_longer_one",
        "test_iterations": "test_train.py::test_a_run_says_what_it_does",
        "save_iterations": "test_train.py::test_a_run_leaves_exactly_these_files",
        "checkpoint_iterations": "test_resume.py::test_keep_checkpoints_bounds_their_number",
        "checkpoint_interval": "test_resume.py::test_keep_checkpoints_bounds_their_number",
        "keep_checkpoints": "test_resume.py::test_keep_checkpoints_bounds_their_number",
        "save_xyz": "test_train.py::test_centres",
        "eval": "test_heldout.py::test_eval_holds_out_every_eighth",
        "eval_every": "test_heldout.py::test_held_out_frames_are_not_trained_on",
        "data_device": "test_frames.py",
        "report": "test_report.py::test_training_ends_with_a_report",
        "deterministic": "test_options.py::test_deterministic_and_anomaly_detection_are_turned_on",
        "detect_anomaly": "test_options.py::test_deterministic_and_anomaly_detection_are_turned_on",
        "debug_from": "test_train.py::test_debug_stops_at_values_that_are_not_finite",
        "debug": "test_fuzz.py::test_a_mistake_has_a_traceback_with_debug_alone",
        "device": "test_train.py::test_flags_that_will_not_do",
        "rasterizer": "test_pipelines.py",
        "quiet": "test_train.py::test_quiet_prints_nothing",
    },
    "render.py": {
        "uncertainty": "test_uncertainty.py::test_render_writes_it_of_a_model",
        "source_path": "test_render.py::test_published_checkpoints_take_sizes_from_the_source_frames",
        "images": "test_arguments.py::test_frames_folder",
        "resolution": "test_arguments.py::test_command_line_wins_over_cfg_args_and_defaults_do_not",
        "white_background": "test_render.py::test_the_command_line_wins_over_the_run_and_the_run_over_defaults",
        "distance": "test_render.py::test_published_checkpoints_take_sizes_from_the_source_frames",
        "antialiasing": "test_antialiasing.py::test_a_model_is_drawn_as_it_was_trained",
        "max_pixels": "test_fuzz.py::test_the_limit_of_pixels_is_stated_and_can_be_raised",
        "model_path": "test_render.py::test_frames_and_the_frames_between",
        "iteration": "test_render.py::test_the_newest_checkpoint_unless_told_otherwise",
        "interp": "test_render.py::test_frames_and_the_frames_between",
        "beyond": "test_render.py::test_frames_and_the_frames_between",
        "pipeline": "test_render.py::test_both_is_what_img_and_seg_are",
        "chunks": "test_render.py::test_chunks_change_no_bit",
        "extension": "test_render.py::test_files_keep_the_depth_of_the_frames",
        "probabilities": "test_organs.py::test_renders_are_label_maps_with_the_ids_of_the_source",
        "dicom": "test_dicom_output.py::test_render_writes_dicom",
        "dicom_seg": "test_dicom_output.py::test_render_writes_dicom",
        "dicom_source": "test_dicom_output.py::test_render_writes_dicom",
        "anonymous": "test_dicom_output.py::test_render_writes_dicom",
        "plane": "test_reformats.py::test_render_writes_planes",
        "plane_spacing": "test_reformats.py::test_render_writes_planes",
        "html": "test_report.py::test_render_writes_a_page",
        "nifti": "test_render.py::test_the_volume_lies_on_its_source",
        "video": "test_render.py::test_a_video_shows_the_sequence_and_marks_the_input",
        "video_format": "test_render.py::test_without_ffmpeg_there_is_a_gif",
        "poly_degree": "test_render.py::test_mistakes_end_in_one_line_before_anything_is_rendered",
        "modify": "test_render.py::test_the_function_gets_all_gaussians_at_the_time",
        "generate_points_path": "test_render.py::test_points_are_the_active_centres_of_every_frame",
        "mask_path": "test_render.py::test_a_segmentation_cuts_an_organ_out_of_an_image",
        "device": "test_arguments.py::test_resolve_device",
        "rasterizer": "test_render.py::test_the_oracle_needs_no_compiled_code",
        "quiet": "test_render.py",
        "debug": "test_fuzz.py::test_a_mistake_has_a_traceback_with_debug_alone",
    },
    "interpolate.py": {
        **dict.fromkeys(("input", "label", "output", "interp", "method", "quiet"), "test_interpolate.py"),
        "source_path": "test_interpolate.py::test_frames_of_prepare_and_their_held_out_slices",
        "seg_source_path": "test_interpolate.py::test_frames_of_prepare_and_their_held_out_slices",
        "device": "test_arguments.py::test_resolve_device",
        "slice_thickness": "test_interpolate.py::test_thick_slices_are_made_thin",
        "uncertainty": "test_uncertainty.py::test_interpolate_writes_it_beside_the_volume",
        "force": "test_interpolate.py::test_nothing_is_replaced_unasked",
        "max_pixels": "test_fuzz.py::test_the_limit_of_pixels_is_stated_and_can_be_raised",
        "debug": "test_fuzz.py::test_a_mistake_has_a_traceback_with_debug_alone",
    },
    "prepare.py": {
        **dict.fromkeys(("input", "label", "label_value", "output", "axis", "window"), "test_prepare.py"),
        **dict.fromkeys(("percentiles", "bits", "keep_every", "frame", "force", "quiet"), "test_prepare.py"),
        "labels": "test_labels.py::test_labels_that_are_kept_apart",
        "label_names": "test_labels.py::test_labels_that_are_kept_apart",
        "soft": "test_labels.py::test_what_may_be_either_is_asked_for",
        "label_frame": "test_labels.py::test_a_label_of_several_layers",
        "label_slices": "test_labels.py::test_masks_on_some_slices",
        "acquisition": "test_dicom.py::test_acquisitions_are_listed_and_chosen",
        "echo": "test_dicom.py::test_echoes",
        "time": "test_dicom.py::test_times_of_an_enhanced_file",
        "form": "test_readers.py::test_forms_that_differ_are_said_with_by_how_much",
        "resample": "test_readers.py::test_a_tracked_sequence_is_resampled",
        "series": "test_volumes.py::test_series_are_chosen_by_uid",
        "ct_window": "test_volumes.py::test_ct_windows",
        "crop": "test_volumes.py::test_crop_to_the_label_and_its_margin",
        "max_pixels": "test_fuzz.py::test_the_limit_of_pixels_is_stated_and_can_be_raised",
        "debug": "test_fuzz.py::test_a_mistake_has_a_traceback_with_debug_alone",
    },
    "slices_to_ply.py": {
        **dict.fromkeys(("input", "output", "nifti", "thresh", "inter"), "test_slices_to_ply.py"),
        **dict.fromkeys(("smoothing", "space", "extension", "quiet"), "test_slices_to_ply.py"),
        "labels": "test_slices_to_ply.py::test_label_maps",
        "scene": "test_slices_to_ply.py::test_meshes_of_labels_have_their_names_and_colours",
        "largest": "test_slices_to_ply.py::test_largest_keeps_one_body_and_its_cavity",
        "open": "test_slices_to_ply.py::test_open_leaves_the_caps_out_and_the_rest_as_it_is",
        "decimate": "test_slices_to_ply.py::test_decimate",
        "format": "test_slices_to_ply.py::test_formats",
        "preview": "test_slices_to_ply.py::test_a_preview_of_each_mesh",
        "jobs": "test_slices_to_ply.py::test_cases_side_by_side_give_the_same_files",
        "max_pixels": "test_fuzz.py::test_the_limit_of_pixels_is_stated_and_can_be_raised",
        "debug": "test_fuzz.py::test_a_mistake_has_a_traceback_with_debug_alone",
    },
    "evaluate.py": {
        **dict.fromkeys(("keep_every", "held_out", "label_value", "samples", "quiet"), "test_evaluate.py"),
        "labels": "test_labels.py::test_label_maps_are_scored_label_by_label",
        "label_names": "test_labels.py::test_label_maps_are_scored_label_by_label",
        "surfaces": "test_labels.py::test_label_maps_are_scored_label_by_label",
        "soft": "test_labels.py::test_what_may_be_either_is_asked_for",
        "seed": "test_evaluate.py::test_points_are_drawn_by_their_seed",
        "space": "test_evaluate.py::test_a_space_that_nobody_tells_is_asked_for",
        "align": "test_evaluate.py::test_a_shift_is_measured_and_only_forgiven_when_asked",
        "csv": "test_evaluate.py::test_many_cases",
        "json": "test_evaluate.py::test_many_cases",
        "max_pixels": "test_fuzz.py::test_the_limit_of_pixels_is_stated_and_can_be_raised",
        "debug": "test_fuzz.py::test_a_mistake_has_a_traceback_with_debug_alone",
    },
}  # fmt: skip
PARSERS = {
    "train.py": train_parser,
    "render.py": render_parser,
    "interpolate.py": interpolate.parser,
    "prepare.py": prepare.parser,
    "slices_to_ply.py": slices_to_ply.parser,
    "evaluate.py": evaluate.parser,
}


def shown(program: str) -> dict[str, list[str]]:
    """The options that --help shows, with their flags; of a program with subcommands, those of all of them."""

    def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for choice in action.choices.values():
                    yield from actions(choice)
            elif (
                action.option_strings
                and action.help != argparse.SUPPRESS
                and action.dest not in ("help", "version")
            ):
                yield action

    return {action.dest: action.option_strings for action in actions(PARSERS[program]())}


@pytest.mark.parametrize("program", PARSERS)
def test_every_option_is_in_a_table_and_no_other(program):
    expected = set(SHOWN_BY[program]) | (set(CHANGES_THE_MODEL) if program == "train.py" else set())
    assert set(shown(program)) == expected
    assert not set(SHOWN_BY[program]) & (set(CHANGES_THE_MODEL) if program == "train.py" else set())


@pytest.mark.parametrize("program", PARSERS)
def test_the_tests_of_the_table_exist_and_use_the_option(program):
    """A file alone stands for the tests in it: the option's flag must then occur in the file."""
    for option, place in SHOWN_BY[program].items():
        file, _, name = place.partition("::")
        text = (TESTS / file).read_text()
        if name:
            functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
            assert name in functions, place
        else:
            flags = "|".join(map(re.escape, [*shown(program)[option], f"{option}=", f'"{option}"']))
            assert re.search(rf"({flags})(?![\w])|{option}=", text), f"{option} in {file}"


# ---- a run with it differs from one without ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function: the run with some options changed, as a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    images, seg = write(folder / "img", transparent()), write(folder / "seg", masks())

    def run(**changes):
        values = {**BASE, **changes}
        out = folder / ("_".join(f"{k}{v}" for k, v in changes.items()) or "base")
        flags = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
        train_at(images, out, "--seg_source_path", seg, *flags)
        return checkpoint(out, values["iterations"])

    with threads(1):
        yield run


def transparent():
    """Frames in colour whose left edge shows the background."""
    frames = []
    for frame in colours():
        alpha = torch.full((*frame.shape[:2], 1), 255, dtype=torch.uint8)
        alpha[:, :4] = 0
        frames.append(torch.cat([torch.from_numpy(frame), alpha], 2).numpy())
    return frames


@pytest.fixture(scope="module")
def base(runs):
    return runs()


def differ(a, b):
    """Do the models differ? A different shape counts as a difference."""
    names = a.params.keys() | b.params.keys()
    pairs = [(a.params.get(name), b.params.get(name)) for name in names] + [(a.time_func, b.time_func)]
    return any(x is None or y is None or x.shape != y.shape or not torch.equal(x, y) for x, y in pairs)


def test_the_same_options_give_the_same_model(runs, base):
    assert not differ(base, runs())


@pytest.mark.parametrize("name", CHANGES_THE_MODEL)
def test_an_option_changes_the_model(runs, base, name, monkeypatch):
    monkeypatch.setattr("training.data.InBetween", BriefInBetween)
    changes = {name: CHANGES_THE_MODEL[name]}
    assert BASE.get(name) != changes[name]
    assert differ(base, runs(**changes)), name


def test_the_similarity_of_in_betweens_counts_by_itself(runs):
    assert differ(runs(lambda_ibfr=0.0, lambda_ibfr_dssim=0.5), runs(lambda_ibfr=0.0))


def test_all_options_of_the_optimisation_are_tried():
    names = {option.name for option in fields(OptimisationOptions)}
    assert names - set(CHANGES_THE_MODEL) == {"seg_head_lr"}


def test_the_rate_of_the_head_alone(tmp_path):
    images, seg = write(tmp_path / "img", colours()), write(tmp_path / "seg", masks())
    train_at(images, tmp_path / "start", "--iterations", 2)
    head = ("--pipeline", "seg", "--seg_head_only", "--start_checkpoint", tmp_path / "start" / "chkpnt2.pth")
    for name, rate in (("slow", 1e-4), ("fast", 1e-2)):
        train_at(seg, tmp_path / name, *head, "--iterations", 3, "--seg_head_lr", rate)
    assert differ(checkpoint(tmp_path / "slow", 3), checkpoint(tmp_path / "fast", 3))


def test_there_is_one_kind_of_gaussians():
    """--gs_type is published, and takes one value."""
    (action,) = [action for action in train_parser()._actions if action.dest == "gs_type"]
    assert tuple(action.choices) == ("gs",)


def test_deterministic_and_anomaly_detection_are_turned_on(tmp_path):
    images = write(tmp_path / "img", colours())
    try:
        for flag, on in (
            ("--deterministic", torch.are_deterministic_algorithms_enabled),
            ("--detect_anomaly", torch.is_anomaly_enabled),
        ):
            train_at(images, tmp_path / "out", "--iterations", 1, flag)
            assert on()
            train_at(images, tmp_path / "out", "--iterations", 1)
            assert not on()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)
