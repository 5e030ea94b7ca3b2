"""The geometry of charts."""

import pytest

from eval.report.charts import bar_chart, line_chart, nice_ticks, short_label, thinned


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 100) == [0, 50, 100]
    assert nice_ticks(1.37, 6.2) == [2, 4, 6]
    assert nice_ticks(0.52, 0.91) == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert nice_ticks(3, 3) == [3]


def test_a_bar_is_as_long_as_its_value():
    chart = bar_chart(
        [("a", 0, 0.5, 0.4, 0.6, "50.0"), ("b", 1, 1.0, None, None, "100.0")],
        top=1.0,
        is_share=True,
        chance=0.25,
    )
    half, whole = chart.bars
    assert half.width == pytest.approx(whole.width / 2)
    assert half.low is not None and half.high is not None
    assert half.low < half.x + half.width < half.high
    assert whole.low is None
    assert [tick.text for tick in chart.ticks] == ["0%", "50%", "100%"]
    assert chart.chance == pytest.approx(half.x + whole.width / 4, abs=0.1)


def test_a_line_runs_from_the_first_step_to_the_last_and_higher_is_up():
    chart = line_chart("loss", [("training", "training", [(0, 4.0), (50, 2.0), (100, 1.0)])])
    points = [tuple(map(float, pair.split(","))) for pair in chart.lines[0].points.split()]
    assert points[0][0] == chart.left
    assert points[-1][0] == chart.right
    assert points[0][1] < points[1][1] < points[2][1]  # an SVG counts from the top
    assert chart.lines[0].last == "1"


def test_a_flat_or_single_point_can_be_drawn():
    line_chart("loss", [("training", "training", [(5, 0.0)])])
    line_chart("loss", [("training", "training", [(5, 2.0), (6, 2.0)])])


def test_long_curves_are_thinned_by_means_and_keep_their_end():
    points = [(float(step), float(step % 2)) for step in range(10_001)]
    few = thinned(points, 200)
    assert len(few) <= 200
    assert few[-1] == points[-1]
    assert all(abs(value - 0.5) < 0.05 for _, value in few[:-1])
    assert thinned(points[:5], 200) == points[:5]


def test_long_names_keep_their_end():
    assert short_label("base") == "base"
    assert short_label("a-very-long-model-name-sft") == "…odel-name-sft"
