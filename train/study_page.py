"""study.html: the study's history, importances and slices with Optuna's own plots, and its trials as a table."""

import warnings
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import optuna
from markupsafe import Markup
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from common import files
from train import figures, study


def write(path: Path, tuning: optuna.Study) -> None:
    """Write the page. A plot that Optuna cannot draw of so few trials is left out."""
    trials = tuning.get_trials(deepcopy=False)
    finished = study.finished_trials(tuning)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("study.html").render(
        best=study.best_trial(tuning) if finished else None,
        trials=sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, -(t.value or 0.0), t.number)),
        keys=sorted({key for trial in trials for key in trial.params}),
        counts={state.name.lower(): sum(t.state == state for t in trials) for state in TrialState},
        plots=plots(tuning, len(finished)),
        record=tuning.user_attrs["provenance"],
    )
    files.write_text(path, page)


def plots(tuning: optuna.Study, num_finished: int) -> list[tuple[str, Markup]]:
    """(title, SVG) of each plot; importances and slices need two finished trials."""
    import matplotlib.pyplot as plt
    import optuna.visualization.matplotlib as draw

    chosen = [("Value of each trial, and the best so far", draw.plot_optimization_history)] * (num_finished > 0)
    chosen += [("Value by epoch of each trial", draw.plot_intermediate_values)] * (num_finished > 0)
    values = {trial.value for trial in study.finished_trials(tuning)}
    chosen += [("How much each setting matters (fANOVA)", draw.plot_param_importances)] * (len(values) > 1)
    chosen += [("Value by setting", draw.plot_slice)] * (num_finished > 1)
    drawn = []
    with matplotlib.rc_context(), warnings.catch_warnings():  # Optuna's plots change the style for good
        warnings.simplefilter("ignore", ExperimentalWarning)
        plt.switch_backend("agg")
        for title, plot in chosen:
            axes = np.ravel(plot(tuning))
            drawn.append((title, figures.svg(axes[0].figure, title)))
            plt.close(axes[0].figure)
    return drawn
