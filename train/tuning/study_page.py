"""study.html: the study's history, importances and slices with Optuna's own plots, and its trials as a table."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import optuna
import optuna.visualization.matplotlib as draw
from markupsafe import Markup
from optuna.trial import TrialState

from common import files, pages
from train.tuning import shared_study


def write(path: Path, tuning: optuna.Study) -> None:
    """Write the page. Plots that need more finished trials are left out."""
    trials = tuning.get_trials(deepcopy=False)
    finished = shared_study.finished_trials(tuning)
    page = pages.render(
        Path(__file__).with_name("study.html"),
        best=shared_study.best_trial(tuning) if finished else None,
        trials=sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, -(t.value or 0.0), t.number)),
        keys=sorted({key for trial in trials for key in trial.params}),
        counts={state.name.lower(): sum(t.state == state for t in trials) for state in TrialState},
        plots=_plots(tuning) if finished else [],
        record=tuning.user_attrs["provenance"],
    )
    files.write_text(path, page)


def _plots(tuning: optuna.Study) -> list[tuple[str, Markup]]:
    """(title, SVG) of each plot; importances and slices need two finished trials with different values."""
    plots: dict[str, Callable[[optuna.Study], Any]] = {
        "Value of each trial, and the best so far": draw.plot_optimization_history,
        "Value by epoch of each trial": draw.plot_intermediate_values,
    }
    if len({trial.value for trial in shared_study.finished_trials(tuning)}) > 1:
        plots["How much each setting matters (fANOVA)"] = draw.plot_param_importances
        for key in shared_study.best_trial(tuning).params:
            plots[f"Value by {key}"] = functools.partial(draw.plot_slice, params=[key])
    drawn = []
    with matplotlib.rc_context(), warnings.catch_warnings():  # Optuna's plots change the global style
        warnings.simplefilter("ignore")  # the plots are experimental, and a range may hold a single value
        plt.switch_backend("agg")
        for title, plot in plots.items():
            axes = plot(tuning)
            if axes.get_legend():
                axes.get_legend().remove()  # it has an entry for each trial
            drawn.append((title, pages.svg(axes.figure, title)))
            plt.close(axes.figure)
    return drawn
