"""The figures of study.html. The best trials have a colour and a name in all of them; the others are grey."""

import warnings

import matplotlib
import numpy as np
import optuna
from markupsafe import Markup
from matplotlib.ticker import LogLocator, NullLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from common import pages
from train.tuning import shared_study

_VALUE = "validation mAP@R"
_NAMED = 5  # the best trials


@matplotlib.rc_context(pages.STYLE)
def draw(tuning: optuna.Study) -> list[tuple[str, Markup]]:
    """(title, SVG) of each; importances and slices need two finished trials with different values."""
    finished = shared_study.finished_trials(tuning)
    best = sorted(finished, key=lambda trial: (trial.value, -trial.number), reverse=True)[:_NAMED]
    colours = {trial.number: colour for trial, colour in zip(best, pages.PALETTE, strict=False)}
    figures = [
        ("Value of each trial, and the best so far", _history(finished, colours)),
        ("Value by epoch of each trial (dotted: stopped early)", _epochs(tuning, colours)),
    ]
    if len({trial.value for trial in finished}) > 1:
        figures.append(("How much each setting matters (fANOVA)", _importances(tuning)))
        for key, kind in shared_study.best_trial(tuning).distributions.items():
            figures.append((f"Value by {key}", _slice(key, kind, finished, colours)))
    return [(title, pages.svg(axes.figure, title)) for title, axes in figures]


def _history(finished: list[FrozenTrial], colours: dict[int, str]):
    axes = pages.axes("trial", _VALUE)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    numbers, values = ([getattr(trial, name) for trial in finished] for name in ("number", "value"))
    axes.step(numbers, np.maximum.accumulate(values), where="post", color=pages.GREY, linewidth=1)
    _points(axes, numbers, finished, colours)
    return axes


def _epochs(tuning: optuna.Study, colours: dict[int, str]):
    axes = pages.axes("epoch", _VALUE)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    trials = [trial for trial in tuning.get_trials(deepcopy=False) if trial.intermediate_values]
    for trial in sorted(trials, key=lambda trial: trial.number in colours):  # the named ones on top
        epochs, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        line = ":" if trial.state == TrialState.PRUNED else "-"
        colour, width = colours.get(trial.number, pages.GREY), 1.6 if trial.number in colours else 0.8
        axes.plot(epochs, values, linestyle=line, marker=".", color=colour, linewidth=width)
    for number, colour in colours.items():  # in the legend by rank
        axes.plot([], [], color=colour, label=f"trial {number}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return axes


def _importances(tuning: optuna.Study):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a range may hold a single value
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(tuning, evaluator=evaluator)
    axes = pages.axes("share of the variance of the values", "")
    bars = axes.barh(list(shares)[::-1], list(shares.values())[::-1], color=pages.BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.grid(visible=False)
    return axes


def _slice(key: str, kind: BaseDistribution, finished: list[FrozenTrial], colours: dict[int, str]):
    axes = pages.axes(key, _VALUE)
    trials = [trial for trial in finished if key in trial.params]
    values = [trial.params[key] for trial in trials]
    if isinstance(kind, CategoricalDistribution):
        names = list(map(str, kind.choices))
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        values = [kind.choices.index(value) for value in values]
    elif getattr(kind, "log", False):
        axes.set_xscale("log")
        axes.set_xlim(kind.low / 1.2, kind.high * 1.2)  # type: ignore[attr-defined] # a range has them
        narrow = kind.high < 100 * kind.low  # type: ignore[attr-defined]
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    _points(axes, values, trials, colours)
    return axes


def _points(axes, x: list, trials: list[FrozenTrial], colours: dict[int, str]) -> None:
    """A point for each trial at its value; the best ones with their numbers."""
    for place, trial in zip(x, trials, strict=True):
        colour = colours.get(trial.number)
        axes.plot(place, trial.value, "o", markersize=5, color=colour or pages.GREY, zorder=3 if colour else 2)
        if colour:
            axes.annotate(f"{trial.number}", (place, trial.value), (4, 4), textcoords="offset points", fontsize=9)
