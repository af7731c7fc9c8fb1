"""Optuna's own plots of a study as SVG. Its plotly ones would need plotly, which nothing else here does."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from flows.sweeps.study import SweepStudy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)
MAX_CONTOUR = 2  # settings: as many squared panels, of a quarter of a megabyte each
SIZE = (8.0, 4.6)  # inches


@dataclass(frozen=True)
class Plot:
    """A figure of the report."""

    title: str
    svg: str
    """Empty where it can't be drawn."""
    reason: str = ""


def draw_plots(study: SweepStudy) -> list[Plot]:
    """Return the plots of a study: history, parallel coordinates, importance, and contour or Pareto front."""
    from optuna.visualization import matplotlib as visual

    optuna_study = study.study
    # Ticks of a logarithmic axis are mathematics; a value to try that holds `$` is not.
    has_math = not any("$" in str(value) for values in study.request.space.values() for value in values)
    draw = partial(draw_plot, has_math=has_math)
    plots: list[Plot] = []
    names = [str(objective) for objective in study.objectives]
    if len(names) > 1:
        plots.append(draw("Pareto front", lambda: visual.plot_pareto_front(optuna_study, target_names=names)))
    for index, name in enumerate(names):
        target = None if len(names) == 1 else pick(index)
        suffix = "" if len(names) == 1 else f": {name}"
        for title, plot in (
            ("Optimization history", visual.plot_optimization_history),
            ("Parallel coordinates", visual.plot_parallel_coordinate),
            ("Parameter importance", visual.plot_param_importances),
        ):
            plots.append(draw(f"{title}{suffix}", partial(plot, optuna_study, target=target, target_name=name)))
    if len(names) == 1 and len(study.distributions) > 1:
        params = rank_settings(study)[:MAX_CONTOUR]
        plots.append(draw("Contour", lambda: visual.plot_contour(optuna_study, params=params, target_name=names[0])))
    return plots


def rank_settings(study: SweepStudy) -> list[str]:
    """Return the searched settings, the most important first; in their own order where the study is too small."""
    from optuna.importance import get_param_importances

    names = list(study.distributions)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ranked = list(get_param_importances(study.study))
    except (ValueError, RuntimeError):
        return names
    return ranked + [name for name in names if name not in ranked]


def pick(index: int) -> "Callable[[FrozenTrial], float]":
    """Return a function that reads one objective of a trial."""
    return lambda trial: float(trial.values[index])


def draw_plot(title: str, plot: Callable[[], object], *, has_math: bool) -> Plot:
    """Return a plot as SVG; a study that is too small for it, or a value it can't show, costs this plot alone."""
    try:
        with quiet_matplotlib(has_math=has_math):
            return Plot(title, to_svg(plot()))
    except Exception as error:
        log.debug("%s was not drawn", title, exc_info=True)
        return Plot(title, "", f"not drawn: {type(error).__name__}")


@contextmanager
def quiet_matplotlib(*, has_math: bool) -> Iterator[None]:
    """Draw without a display, with text as text; `has_math` reads what is between two `$` as mathematics."""
    import matplotlib
    from matplotlib import pyplot as plt

    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "text.parse_math": has_math}):
        warnings.simplefilter("ignore")  # Optuna calls these plots experimental
        before = plt.get_backend()
        plt.switch_backend("agg")  # Optuna measures labels, which the SVG backend cannot
        try:
            yield
        finally:
            plt.close("all")
            plt.switch_backend(before)


def to_svg(axes: object) -> str:
    """Return the figure of one or several axes as an SVG element."""
    figure = find_axes(axes).get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(*SIZE)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    # The element alone: an XML declaration and a document type have no place within HTML.
    return re.sub(
        r"<metadata>.*?</metadata>", "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.DOTALL
    )


def find_axes(axes: object) -> "Axes":
    """Return the first of what may be axes or an array of them."""
    import numpy as np

    found: Axes = np.ravel(np.asarray(axes, dtype=object))[0]
    return found
