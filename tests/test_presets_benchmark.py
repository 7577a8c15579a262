"""benchmarks/presets.py: what it measures, what it keeps, and its verdicts on goals."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter
from sequences import BriefInBetween
from skimage.metrics import structural_similarity

from arguments import TrainOptions, train_options
from benchmarks import heldout, preset_tables, presets
from utils.errors import UserError

ROOT = Path(presets.__file__).parents[1]


def write(folder: Path, kind: str, frames: np.ndarray) -> None:
    (folder / kind / "original").mkdir(parents=True)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / kind / "original" / f"{k:04d}.png")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """What the in-between prediction learns does not matter here."""
    monkeypatch.setattr(heldout, "InBetween", BriefInBetween)


@pytest.fixture
def drift(tmp_path):
    """A textured disc that moves 3 px per frame, with its mask: 7 frames of 40 x 32 px, 8 bits."""
    rows, columns = np.mgrid[:32, :40]
    texture = gaussian_filter(np.random.default_rng(0).normal(size=(32, 80)), 2)
    frames, masks = [], []
    for k in range(7):
        inside = np.hypot(columns - 10 - 3 * k, rows - 16) < 7
        moved = texture[:, 40 - 3 * k : 80 - 3 * k]
        frames.append(np.rint(np.clip(40 + 150 * inside + 200 * moved, 0, 255)).astype(np.uint8))
        masks.append(np.where(inside, 255, 0).astype(np.uint8))
    write(tmp_path / "drift", "img", np.stack(frames))
    write(tmp_path / "drift", "seg", np.stack(masks))
    return tmp_path / "drift", np.stack(frames), np.stack(masks) > 127


def parsed(options: list[str]) -> TrainOptions:
    return train_options(["-s", "data", *options])


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["presets.py", *map(str, words)])
    return presets.main()


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_scores_are_those_of_8_bit_files(drift):
    """Against the formulas on the files' own levels, written out: every second frame the rounded mean of two."""
    folder, frames, masks = drift
    rows = {row["method"]: row for row in presets.classical_rows(heldout.read_case(folder), 2)}
    levels = frames.astype(float)
    blends = np.rint((levels[0:-1:2] + levels[2::2]) / 2)  # numpy rounds halves to even, as files are written
    errors = ((blends - levels[1::2]) ** 2).mean((1, 2))
    scores = rows["linear"]["img"]["heldout"]
    assert scores["psnr"] == pytest.approx(
        np.mean(10 * np.log10(255**2 / errors)), abs=1e-6
    )  # float32 frames
    expected = [
        structural_similarity(a, b, data_range=255) for a, b in zip(levels[1::2], blends, strict=True)
    ]
    assert scores["ssim"] == pytest.approx(np.mean(expected), abs=1e-6)

    distances = [distance_transform_edt(m) - distance_transform_edt(~m) for m in masks[::2]]
    filled = np.stack([a + b > 0 for a, b in pairwise(distances)])
    dice = 2 * (filled & masks[1::2]).sum() / (filled.sum() + masks[1::2].sum())
    assert rows["sdf"]["seg"]["heldout"]["dice"] == pytest.approx(dice, abs=1e-12)
    assert rows["sdf"]["counts"] == {"training": 4, "heldout": 3}


def test_motion_is_followed(drift):
    """6 px from one kept frame to the next: flow warps the frames and masks correctly, a blend shows two discs."""
    rows = {row["method"]: row for row in presets.classical_rows(heldout.read_case(drift[0]), 2)}
    images = {name: row["img"]["heldout"]["psnr"] for name, row in rows.items() if "img" in row}
    assert images["flow"] > images["linear"] + 1  # dB; 2.1 measured, the disc leaves and enters frames
    masks = {name: row["seg"]["heldout"]["dice"] for name, row in rows.items() if "seg" in row}
    assert masks["sdf along flow"] > masks["linear"]
    assert set(rows) == set(heldout.CLASSICAL)


def test_the_nearer_frame_counts_for_more():
    frames = np.stack([np.full((16, 16), 0.2), np.full((16, 16), 0.6)])  # nothing moves
    filled = heldout.tvl1(frames, np.array([0, 4]), np.array([1, 2, 3]))
    assert filled[:, 8, 8] == pytest.approx([0.3, 0.4, 0.5], abs=1e-6)  # float32


def test_half_way_levels_go_to_the_even_one():
    halves = (np.arange(0, 254) + 0.5).astype(np.float32) / np.float32(255)
    assert (255 * heldout.in_8_bits(halves) % 2).round(9).max() == 0


def test_images_that_are_the_masks_are_left_out(tmp_path):
    masks = np.zeros((4, 16, 16), np.uint8)
    masks[:, 4:9, 4:9] = 255
    for kind in ("img", "seg"):
        write(tmp_path / "case", kind, masks)
    case = heldout.read_case(tmp_path / "case")
    assert case.pipeline == "seg"
    methods = {row["method"] for row in presets.classical_rows(case, 2)}
    assert methods == {"linear", "sdf", "cubic sdf", "prediction"}
    assert presets.train_options("seg", "published", {})[-2:] == ["--poly_degree", "2"]


def test_schedules_shrink_with_the_iterations():
    options = parsed(presets.train_options("img", "published", {}, 3000))
    assert options.iterations == 3000
    assert options.ibfr_from_iter == 1000 and options.densify_until_iter == 2000
    assert parsed(presets.train_options("img", "published", {})).iterations == 30_000
    fast = parsed(presets.train_options("joint", "fast", {"ibfr_from_iter": 10_000}))  # of 30 000
    assert fast.ibfr_from_iter == fast.iterations // 3
    best = parsed(presets.train_options("img", "best", {"average_from_iter": 0}, 1500))
    assert best.average_from_iter == 0  # 0 is never


def test_every_ablation_differs():
    every = [parsed(presets.train_options("joint", "best", change)) for change in presets.ABLATION.values()]
    assert len({repr(options) for options in every}) == len(every)


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """The requested runs, none of which is trained; those of method "fast" fail."""
    seen = []

    def stand_in(plan, device, about, jobs, models):
        seen.append((plan.keep, plan.method))
        if plan.method == "fast":
            raise UserError("train.py ended with status 2")
        row = {
            "case": plan.case.name,
            "keep": plan.keep,
            "method": plan.method,
            "pipeline": plan.case.pipeline,
        }
        scores = {"img": {"psnr": 30.0, "ssim": 0.9}, "seg": {"dice": 0.9, "psnr": 20.0}}
        row |= {kind: {"training": scores[kind], "heldout": scores[kind]} for kind in plan.case.files}
        row |= {
            "options": [*plan.options],
            "iterations": 1,
            "gaussians": 1,
            "seconds": 2.0,
            "iterations_per_s": 1.0,
        }
        return row | {"jobs": jobs, "about": dict(about)}, {}

    monkeypatch.setattr(presets, "train_and_score", stand_in)
    return seen


def test_what_is_measured_is_not_measured_again(drift, trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "rows.json"
    words = drift[0], "--out", out, "--device", "cpu", "--presets"
    assert main(monkeypatch, *words, "published", "--keep", 2, "--jobs", 2) == 0
    assert main(monkeypatch, *words, "published", "best", "--keep", 2, 3) == 0
    assert trained == [(2, "published"), (2, "best"), (3, "published"), (3, "best")]
    rows = presets.read_rows(out)
    assert len(rows) == 2 * 2 + 2 * len(heldout.CLASSICAL)
    assert main(monkeypatch, *words, "best", "--keep", 3, "--force") == 0
    assert trained[4:] == [(3, "best")]
    assert [presets.key(row) for row in presets.read_rows(out)] == [presets.key(row) for row in rows]
    capsys.readouterr()
    assert main(monkeypatch, *words, "published", "--keep", 2, "--", "--lambda_seg", "2") == 0  # another run
    assert trained[5:] == [(2, "published --lambda_seg 2")]


def test_a_run_that_fails_costs_no_other(drift, trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    assert (
        main(monkeypatch, drift[0], "--out", out, "--device", "cpu", "--keep", 2, "--presets", "fast", "best")
        == 1
    )
    assert "failed: drift, every 2, fast: train.py ended with status 2" in capsys.readouterr().err
    assert [row["method"] for row in presets.read_rows(out) if "pipeline" in row] == ["best"]


def test_classical_needs_no_model(drift, trained, tmp_path, monkeypatch):
    assert main(monkeypatch, drift[0], "--out", tmp_path / "a.json", "--keep", 2, "--classical") == 0
    assert not trained
    assert {row["method"] for row in presets.read_rows(tmp_path / "a.json")} == set(heldout.CLASSICAL)


def test_a_program_that_fails_is_quoted():
    with pytest.raises(UserError, match=r"train.py ended with status 2.*no_such_folder"):
        presets.run_program("train.py", "-s", "no_such_folder", "--device", "cpu")


def test_refusals(drift, trained, tmp_path, monkeypatch):
    folder = drift[0]
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"about": 1}')
    other = tmp_path / "other" / "drift"
    write(other, "img", np.zeros((3, 8, 8), np.uint8))
    uneven = tmp_path / "uneven"
    write(uneven, "img", np.zeros((3, 8, 8), np.uint8))
    write(uneven, "seg", np.zeros((4, 8, 8), np.uint8))
    for words, message in (
        ([], "no case"),
        (["--quick", folder], "has a case of its own"),
        ([folder, "--ablation", "--montages", tmp_path], "leave one of the two out"),
        ([folder, "--keep", 1], "leaves no frame out"),
        ([folder, "--keep", 7], "too few for --keep 7"),
        ([folder, other], "two cases are called drift"),
        ([tmp_path], "neither img/original nor seg/original"),
        ([uneven], "differ from the images"),
        ([folder, "--out", damaged], "damaged.json is not a file of"),
        ([other, "--pipeline", "joint", "--keep", 2, "--out", tmp_path / "a.json"], "has no seg/original"),
    ):
        with pytest.raises(UserError, match=message):
            main(monkeypatch, *words)
    assert not trained


def test_models_are_never_written_over(drift, tmp_path):
    plan = presets.Plan(heldout.read_case(drift[0]), 2, "best", ())
    (tmp_path / "drift_2_best").mkdir()
    with pytest.raises(UserError, match="is there already"):
        presets.train_and_score(plan, "cpu", {}, 1, tmp_path)


# ---- goals -----------------------------------------------------------------------------------------------------------


def row_of(method, psnr, ssim=0.9, dice=0.95, training=40.0, seconds=10.0, jobs=1):
    scores = {"img": {"psnr": psnr, "ssim": ssim}, "seg": {"dice": dice, "psnr": 20.0}}
    row = {"case": "a", "keep": 2, "method": method, "about": {"device": "cpu", "machine": "m"}}
    row |= {kind: {"heldout": values} for kind, values in scores.items()}
    if method in heldout.CLASSICAL:
        return row
    row["img"]["training"], row["seg"]["training"] = {"psnr": training}, {"dice": 1.0, "psnr": 50.0}
    cost = {"gaussians": 1, "iterations": 2, "iterations_per_s": 3.0, "seconds": seconds, "jobs": jobs}
    return row | cost | {"pipeline": "joint"}


def verdicts(*rows):
    return {goal.name: goal.met for goal in preset_tables.goals(rows)}


CLASSICAL_ROWS = [
    row_of("linear", 30, 0.91),
    row_of("cubic", 31, 0.90),
    row_of("flow", 30.5, 0.92),
    row_of("sdf", 20, dice=0.96),
]


def test_goals_are_held_against_the_best_of_each():
    published, best = row_of("published", 29), row_of("best", 31.6, 0.93, 0.97, training=39.2, seconds=14)
    assert all(verdicts(*CLASSICAL_ROWS, published, best).values())
    assert len(verdicts(*CLASSICAL_ROWS, published, best)) == 5
    worse = row_of("best", 31.4, 0.915, 0.96, training=38.9, seconds=16)
    assert not any(verdicts(*CLASSICAL_ROWS, published, worse).values())
    text = "\n".join(preset_tables.tables([*CLASSICAL_ROWS, published, worse]))
    assert "0 of 5 are met" in text and "**+0.40, missed**" in text and "**1.60, missed**" in text


def test_goals_that_cannot_be_measured_are_left_out():
    best = row_of("best", 31.6, jobs=3)
    assert verdicts(*(row for row in CLASSICAL_ROWS if row["method"] != "flow"), best).keys() == {
        "its Dice above sdf, > 0"
    }
    side_by_side = verdicts(row_of("published", 29, jobs=3), best)
    assert not any("time" in name for name in side_by_side)


def test_fast_is_held_against_published():
    published = row_of("published", 29, dice=0.95)
    assert all(verdicts(published, row_of("fast", 29.1)).values())
    assert not any(verdicts(published, row_of("fast", 28.9, dice=0.94)).values())


def test_the_best_score_is_bold_and_many_methods_get_a_row_each():
    images, *_ = preset_tables.tables(CLASSICAL_ROWS)
    assert images.count("**") == 2 and "**31.00 / 0.9000**" in images
    many = [row_of(f"best: {k}", 20 + k) for k in range(preset_tables.WIDEST)]
    images, *_ = preset_tables.tables([*CLASSICAL_ROWS, *many])
    assert len(images.splitlines()) == 2 + len(CLASSICAL_ROWS) + len(many)


@pytest.mark.slow
def test_the_whole_command_on_a_made_up_case(tmp_path):
    """Training, rendering, scores and pictures with nothing replaced."""
    out, montages = tmp_path / "quick.json", tmp_path / "montages"
    words = (
        "--quick",
        "--presets",
        "published",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--montages",
        str(montages),
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.presets", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {*heldout.CLASSICAL, "published"}
    model = rows["published"]
    assert model["iterations"] == 40 and model["gaussians"] > 0 and model["seconds"] > 0
    for kind, names in (("img", {"psnr", "ssim"}), ("seg", {"dice", "psnr"})):
        for which in ("training", "heldout"):
            assert names <= set(model[kind][which])
        with Image.open(montages / f"made_up_2_{kind}.jpg") as picture:
            assert picture.width > 500
    assert "masks, Dice" in done.stdout
