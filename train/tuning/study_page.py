"""study.html: the study's history, importances and slices with Optuna's own plots, and its trials as a table."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import optuna
from markupsafe import Markup
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from common import files
from train.report import evaluation_figures
from train.tuning import shared_study


def write(path: Path, tuning: optuna.Study) -> None:
    """Write the page. A plot that Optuna cannot draw of so few trials is left out."""
    trials = tuning.get_trials(deepcopy=False)
    finished = shared_study.finished_trials(tuning)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("study.html").render(
        best=shared_study.best_trial(tuning) if finished else None,
        trials=sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, -(t.value or 0.0), t.number)),
        keys=sorted({key for trial in trials for key in trial.params}),
        counts={state.name.lower(): sum(t.state == state for t in trials) for state in TrialState},
        plots=plots(tuning, len(finished)),
        record=tuning.user_attrs["provenance"],
    )
    files.write_text(path, page)


def plots(tuning: optuna.Study, num_finished: int) -> list[tuple[str, Markup]]:
    """(title, SVG) of each plot; importances and slices need two finished trials that differ."""
    import matplotlib.pyplot as plt
    import optuna.visualization.matplotlib as draw

    chosen: list[tuple[str, Callable[[], Any]]] = []  # Axes, each; Optuna says that they may be arrays
    if num_finished:
        chosen += [("Value of each trial, and the best so far", lambda: draw.plot_optimization_history(tuning))]
        chosen += [("Value by epoch of each trial", lambda: draw.plot_intermediate_values(tuning))]
    if len({trial.value for trial in shared_study.finished_trials(tuning)}) > 1:
        chosen += [("How much each setting matters (fANOVA)", lambda: draw.plot_param_importances(tuning))]
        for key in shared_study.best_trial(tuning).params:
            chosen += [(f"Value by {key}", functools.partial(draw.plot_slice, tuning, params=[key]))]
    drawn = []
    with matplotlib.rc_context(), warnings.catch_warnings():  # Optuna's plots change the style for good
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)  # of a range that is a single value
        plt.switch_backend("agg")
        for title, plot in chosen:
            axes = plot()
            if axes.get_legend():
                axes.get_legend().remove()  # a line for each of 50 trials
            drawn.append((title, evaluation_figures.svg(axes.figure, title)))
            plt.close(axes.figure)
    return drawn
