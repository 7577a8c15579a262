"""Presets match their measurements. To change one, measure it again, then change it here:

python -m benchmarks.presets CASE ... --device cuda --out benchmarks/results/presets/NAME.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arguments import PRESETS, TrainOptions

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "presets"
MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    "published": ("h200.json", {}),
    "best": (
        "h100.json",
        {
            "start": "frames",
            "poly_degree": 2,
            "ibfr_target": "motion",
            "ibfr_from_iter": 1,
            "lambda_ibfr_seg": 2.0,
            "iterations": 6000,
            "position_lr_max_steps": 6000,
            "densify_from_iter": 100,
            "densify_until_iter": 4000,
            "sigma_until_iter": 4000,
            "lambda_ibfr": 3.5,
            "lambda_ibfr_dssim": 0.4,
            "ibfr_skip": 3,
            "sigma_low_views": 0.5,
            "densify_grad_threshold": 0.00017,
            "average_from_iter": 5400,
            "average_decay": 0.995,
        },
    ),
    "fast": (
        "h100.json",
        {
            "start": "frames",
            "poly_degree": 2,
            "ibfr_target": "motion",
            "ibfr_from_iter": 1,
            "lambda_ibfr_seg": 2.0,
            "opacity_reset_interval": 100000,
            "lambda_ibfr": 5.0,
            "lambda_ibfr_dssim": 0.6,
            "ibfr_alpha_min": 0.0,
            "ibfr_alpha_max": 1.0,
            "average_decay": 0.99,
            "batch_size": 9,
            "position_lr_init": 0.00032,
            "feature_lr": 0.005,
            "scaling_lr": 0.01,
            "rotation_lr": 0.002,
            "m_lr": 0.002,
            "sigma_lr": 0.002,
            "w1_lr": 0.002,
            "iterations": 1200,
            "position_lr_max_steps": 1200,
            "densify_from_iter": 200,
            "densify_until_iter": 800,
            "sigma_until_iter": 800,
            "average_from_iter": 1000,
            "densify_grad_threshold": 0.0002,
        },
    ),
}
"""Preset -> file of its results, and the options other than the defaults, which test_arguments.py pins."""


@pytest.mark.parametrize("preset", MEASURED)
def test_a_preset_is_what_was_measured(preset):
    file, options = MEASURED[preset]
    assert PRESETS[preset] == options, f"{preset} is no longer what {file} measured"


@pytest.mark.parametrize("preset", MEASURED)
def test_its_results_are_there_and_of_as_many_iterations(preset):
    file, options = MEASURED[preset]
    rows = [row for row in json.loads((RESULTS / file).read_text()) if row["method"] == preset]
    cases = {row["case"] for row in rows}
    assert {"mri_mni152_wm", "ct_abdomen_liver30", "us_echo_cine30", "us_prostate_mask"} <= cases
    wanted = options.get("iterations", TrainOptions.iterations)
    assert {row.get("iterations", TrainOptions.iterations) for row in rows} == {wanted}
