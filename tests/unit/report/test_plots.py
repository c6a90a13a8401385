import io
import math

import numpy as np
import pytest
from matplotlib.image import imread

from sdpo.report.plots import _running_mean, _spread, build_figure, plot_learning_curves
from sdpo.report.run_dir import read_run
from sdpo.report.theme import DARK, LIGHT

ACCURACY, TEACHER, SCORE = "val-core/t/acc/mean@1", "val-teacher/t/acc/mean@1", "critic/score/mean"


@pytest.fixture
def records(write_run):
    sdpo = {0: {ACCURACY: 0.0, TEACHER: 0.9}, 1: {SCORE: 0.25, "actor/grad_norm": 2.0}, 2: {SCORE: 0.5, ACCURACY: 1.0}}
    grpo = {0: {ACCURACY: 0.0}, 1: {SCORE: 0.0, "actor/grad_norm": math.nan}, 2: {SCORE: 0.125, ACCURACY: 0.0}}
    return [read_run(write_run("sdpo", sdpo)), read_run(write_run("grpo", grpo))]


def curves(figure):
    return {
        line.get_gid(): line for axes in figure.axes for line in axes.get_lines() if "|" in str(line.get_gid() or "")
    }


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_curves_have_the_data_of_the_runs(records):
    drawn = {gid: line.get_xydata().tolist() for gid, line in curves(build_figure(records)).items()}
    no_number = drawn.pop("grpo|actor/grad_norm")
    assert math.isnan(no_number[0][1])
    assert drawn == {
        f"sdpo|{ACCURACY}": [[0, 0], [2, 1]],
        f"sdpo|{TEACHER}": [[0, 0.9]],
        f"grpo|{ACCURACY}": [[0, 0], [2, 0]],
        f"sdpo|{SCORE}": [[1, 0.25], [2, 0.5]],
        f"grpo|{SCORE}": [[1, 0], [2, 0.125]],
        "sdpo|actor/grad_norm": [[1, 2]],
    }


def test_only_panels_with_data_and_one_legend(records):
    figure = build_figure(records)
    assert list(panels(figure)) == ["Validation accuracy", "Training score", "Gradient norm"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["sdpo", "grpo", "teacher"]


def test_run_has_one_colour_and_its_teacher_a_dashed_line(records):
    lines = curves(build_figure(records))
    assert {line.get_color() for gid, line in lines.items() if gid.startswith("sdpo|")} == {LIGHT.runs[0]}
    assert {line.get_color() for gid, line in lines.items() if gid.startswith("grpo|")} == {LIGHT.runs[1]}
    assert lines[f"sdpo|{TEACHER}"].is_dashed() and not lines[f"sdpo|{ACCURACY}"].is_dashed()
    dark = curves(build_figure(records, DARK))
    assert dark[f"sdpo|{SCORE}"].get_color() == DARK.runs[0]


def test_last_accuracies_are_labelled(records):
    labels = [text.get_text() for text in panels(build_figure(records))["Validation accuracy"].texts]
    assert labels == ["sdpo  1.00", "grpo  0.00"]


def test_accuracy_axis_is_zero_to_one_and_larger_scores_are_visible(write_run, records):
    axes = panels(build_figure(records))
    assert axes["Validation accuracy"].get_ylim() == axes["Training score"].get_ylim() == (-0.03, 1.03)
    beyond = read_run(write_run("beyond", {1: {SCORE: 0.0}, 2: {SCORE: 40.0}}))
    assert panels(build_figure([beyond]))["Training score"].get_ylim()[1] > 40


def test_one_panel_per_data_source(write_run):
    run = read_run(write_run("a", {0: {"val-core/x/y/acc/mean@1": 0.5, "val-core/z/acc/mean@4": 0.5}}))
    assert list(panels(build_figure([run]))) == ["Validation accuracy, x/y", "Validation accuracy, z, mean@4"]


def test_noisy_curves_have_a_running_mean(write_run):
    values = [step % 2 for step in range(100)]
    run = read_run(write_run("a", {step: {SCORE: value} for step, value in enumerate(values)}))
    figure = build_figure([run])
    lines = curves(figure)
    assert lines[f"a|{SCORE}"].get_ydata().tolist() == values
    assert set(lines[f"a|{SCORE}|mean"].get_ydata()[2:-2].round(6)) == {0.4, 0.6}
    assert "each step (bold: running mean)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_running_mean_ignores_nan():
    nan = math.nan
    np.testing.assert_allclose(_running_mean([1, nan, 3, 5, nan, nan, nan]), [1, 2, 4, 4, 5, nan, nan])


def test_labels_do_not_overlap_or_leave_the_axes():
    np.testing.assert_allclose(_spread([1.0, 0.0, 0.98, 0.99], gap=0.1, ceiling=1.05), [1.05, 0.0, 0.85, 0.95])


def test_many_runs_have_different_colours():
    for theme in (LIGHT, DARK):
        for count in (1, 7, 8, 30):
            colours = theme.run_colours(count)
            assert len(set(colours)) == count
            assert all(len(bytes.fromhex(colour[1:])) == 3 for colour in colours)


def test_run_names_are_plain_text(write_run):
    run = read_run(write_run("_cost$x_1$", {0: {ACCURACY: 0.5}}))
    figure = build_figure([run])
    figure.canvas.draw()
    assert figure.legends[0].get_texts()[0].get_text() == r" _cost\$x_1\$"


def test_png_is_wide_enough_to_read(records, tmp_path):
    path = plot_learning_curves(records, tmp_path / "curves.png")
    height, width, _ = imread(io.BytesIO(path.read_bytes())).shape
    assert width >= 1200 and height > width / 3


def test_run_without_data_gives_an_image(write_run, tmp_path):
    run = read_run(write_run("a", {0: {}}))
    assert plot_learning_curves([run], tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
