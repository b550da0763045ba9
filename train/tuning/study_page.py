"""study.html: the study's history, importances and slices as figures, and its trials as a table."""

from pathlib import Path

import optuna
from optuna.trial import TrialState

from common import files, pages
from train.tuning import shared_study, study_figures


def write(path: Path, tuning: optuna.Study) -> None:
    """Write the page. Figures that need more finished trials are left out."""
    trials = tuning.get_trials(deepcopy=False)
    finished = shared_study.finished_trials(tuning)
    page = pages.render(
        Path(__file__).with_name("study.html"),
        best=shared_study.best_trial(tuning) if finished else None,
        trials=sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, -(t.value or 0.0), t.number)),
        keys=sorted({key for trial in trials for key in trial.params}),
        counts={state.name.lower(): sum(t.state == state for t in trials) for state in TrialState},
        plots=study_figures.draw(tuning) if finished else [],
        record=tuning.user_attrs["provenance"],
    )
    files.write_text(path, page)
