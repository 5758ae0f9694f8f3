from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex

from distaff.errors import ConfigError, MetricError
from distaff.integrations import matplotlib_optimizers as figures
from distaff.tune.comparison import Comparison, OptimizerResult, OptimizerRun
from distaff.tune.landscapes import BOOTH, BRANIN, LANDSCAPES


def result(*losses, rate=0.1):
    runs = tuple(
        OptimizerRun(
            seed=seed,
            learning_rate=rate,
            losses=np.array(values, float),
            cosines=np.full(len(values), 0.5),
            seconds=np.ones(len(values)),
            steps_per_epoch=1,
            metrics={},
        )
        for seed, values in enumerate(losses)
    )
    return OptimizerResult(learning_rate=rate, grid={}, runs=runs)


def compared(**results):
    return Comparison(results=results, target=0.3)


NEVER = OptimizerResult(learning_rate=math.nan, grid={1.0: math.nan}, runs=())


def test_comparison_draws_mean_and_band_of_each_optimizer():
    found = compared(sgd=result([4, 2], [2, 1]), never=NEVER, adam=result([1, 0.1], rate=0.003))
    loss, cosine = figures.comparison(found).axes
    assert (loss.get_yscale(), cosine.get_yscale()) == ("log", "linear")
    sgd, adam, target = loss.lines
    assert sgd.get_xydata().tolist() == [[1, 3], [2, 1.5]]
    assert adam.get_xydata().tolist() == [[1, 1], [2, 0.1]]
    assert set(target.get_ydata()) == {0.3}
    band = loss.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in band.round(6).tolist()} == {(1, 2), (1, 4), (2, 1), (2, 2)}
    assert [line.get_ydata().tolist() for line in cosine.lines] == [[0.5, 0.5]] * 2


def test_comparison_names_each_line_with_its_rate_and_color():
    found = compared(never=NEVER, sgd=result([4, 2]), adam=result([1, 0.1], rate=0.003))
    figure = figures.comparison(found)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["sgd (0.1)", "adam (0.003)"]
    handles = [line.get_color() for line in legend.get_lines()]
    for axes in figure.axes:
        assert [line.get_color() for line in axes.lines[:2]] == handles


def test_comparison_stays_linear_where_a_loss_is_not_positive():
    (loss, _) = figures.comparison(compared(sgd=result([4, -2]))).axes
    assert loss.get_yscale() == "linear"


def test_comparison_of_nothing_is_refused():
    with pytest.raises(MetricError, match="every optimizer diverged"):
        figures.comparison(compared(never=NEVER))


def test_no_two_of_twenty_one_optimizers_look_the_same():
    results = {f"optimizer {i}": result([1.0, 0.5]) for i in range(21)}
    (loss, _) = figures.comparison(compared(**results)).axes
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in loss.lines[:21]}
    assert len(looks) == 21


def test_optimizer_paths_draws_each_way_over_its_landscape():
    ways = {"sgd": [[0, 0], [1, 2]], "adam": [[0, 0], [1, 3]]}
    moved = {"sgd": [[5, 5], [math.nan, math.nan]], "adam": [[5, 5], [math.pi, 2.275]]}
    figure = figures.optimizer_paths([BOOTH, BRANIN], {"Booth": ways, "Branin": moved})
    booth, branin, legend = figure.axes
    assert (booth.get_title(), branin.get_title()) == ("Booth", "Branin")
    assert (branin.get_xlim(), branin.get_ylim()) == ((-5, 10), (0, 15))
    drawn = [line.get_xydata().tolist() for line in booth.lines]
    assert [[1, 3]] in drawn  # its minimum, and where adam ends
    assert ways["sgd"] in drawn
    assert ways["adam"] in drawn
    assert BRANIN.minima(2).tolist() in [line.get_xydata().tolist() for line in branin.lines]
    names = [text.get_text() for text in legend.get_legend().get_texts()]
    assert names == ["sgd", "adam"]


def test_the_ground_is_darkest_where_it_is_lowest():
    figure = figures.optimizer_paths([BOOTH], {"Booth": {"sgd": [[0, 0], [1, 3]]}})
    shades = np.asarray(figure.axes[0].collections[0].get_array())
    low, high = BOOTH.bounds()
    rows = np.linspace(low[1], high[1], len(shades))
    row, column = (int(np.abs(rows - at).argmin()) for at in (3.0, 1.0))
    assert shades[row, column] == shades.min() == 0
    counts = np.bincount(shades.ravel().astype(int))
    assert counts.max() < 1.1 * counts.min()  # equal areas
    assert sum(figures.DEPTHS(0.0)[:3]) < sum(figures.DEPTHS(1.0)[:3])


@pytest.mark.slow
def test_all_eleven_have_room_and_one_legend(tmp_path):
    ways = {each.name: {"sgd": each.minima(2)[[0, 0]]} for each in LANDSCAPES}
    figure = figures.optimizer_paths(LANDSCAPES, ways)
    figure.savefig(tmp_path / "paths.png")
    assert [axes.get_title() for axes in figure.axes] == [*ways, ""]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({}, "Booth must have the shape .* got none"),
        ({"Booth": {"sgd": [1, 2]}}, r"got {'sgd': \(2,\)}"),
        ({"Booth": {"sgd": [[1, 2, 3]]}}, r"got {'sgd': \(1, 3\)}"),
    ],
)
def test_optimizer_paths_refuses_what_is_no_path(paths, message):
    with pytest.raises(ConfigError, match=message):
        figures.optimizer_paths([BOOTH], paths)
