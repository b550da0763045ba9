"""train/optuna_worker.py with study.py and trials.py: trials are shared, none lost and none counted twice.

Training is a stand-in here, see small_study.py, but where the command itself is tested.
"""

import os
import re
import subprocess
import sys
import time

import numpy as np
import optuna
import pytest
import small_study
import torch
from conftest import ROOT
from optuna.trial import TrialState
from small_study import flags, load, numbers, open_study, stand_in, work

from common import cli
from common.errors import ConfigError, PipelineError, StaleArtefact, Stopped
from train import optuna_worker
from train.tuning import shared_study, study_page, study_storage, study_trials


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A root with a merge and its difficulty; not to be changed."""
    return small_study.write_merge(tmp_path_factory.mktemp("tuning"))


@pytest.fixture
def cfg(merged, tmp_path):
    """Settings whose study lies in tmp_path."""
    return load(merged, tmp_path)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(study_trials, "fit", stand_in())
    monkeypatch.setattr(study_trials, "load_data", lambda cfg: None)


# ------------------------------------------------------------------------------------------------------ one worker


def test_a_trial_is_worth_its_best_epoch_after_the_untrained_one(cfg, quick):
    tuning = open_study(cfg)
    assert work(cfg, tuning).rows_in == 6
    for trial in tuning.trials:
        if trial.state == TrialState.COMPLETE:
            assert trial.user_attrs["best_epoch"] == 2
            assert trial.value == max(trial.intermediate_values.values())  # epoch 0's 0.5 would beat them all
    best = shared_study.best_trial(tuning)
    assert best.value == max(trial.value for trial in shared_study.finished_trials(tuning))


def test_the_same_seed_draws_the_same_settings_and_trials_differ(merged, tmp_path, quick):
    drawn = []
    for name in ("a", "b"):
        cfg = load(merged, tmp_path / name)
        tuning = open_study(cfg)
        work(cfg, tuning)
        drawn.append([trial.params for trial in tuning.trials])
    assert drawn[0] == drawn[1]
    assert len({params["learning_rate"] for params in drawn[0]}) == 6


def test_a_trial_that_falls_behind_is_pruned_in_training(merged, tmp_path, quick):
    cfg = load(merged, tmp_path, "tuning.num_trials=40", "tuning.trial_epochs=4")
    tuning = open_study(cfg)
    progress = work(cfg, tuning)
    pruned = tuning.get_trials(states=(TrialState.PRUNED,))
    assert len(pruned) == progress.rejected["pruned"] > 0
    assert {len(trial.intermediate_values) for trial in pruned} <= {2, 3}  # from epoch 2 on, not after the last
    assert progress.rows_out == 40 - len(pruned)


def test_whole_numbers_choices_and_scales_are_drawn_as_the_search_space_says(merged, tmp_path, quick):
    space = "tuning.search_space={batch_size=[32, 64], sampler={choices=['ucb']}, temperature=[0.01, 1.0, 'log']}"
    cfg = load(merged, tmp_path, space)
    tuning = open_study(cfg)
    work(cfg, tuning)
    for trial in tuning.trials:
        assert isinstance(trial.params["batch_size"], int)
        assert trial.params["sampler"] == "ucb"
        assert trial.distributions["temperature"].log


def test_limits_of_one_worker(cfg, quick):
    tuning = open_study(cfg)
    assert work(cfg, tuning, max_trials=2).rows_in == 2
    assert work(cfg, tuning, minutes=0).rows_in == 0
    assert work(cfg, tuning).rows_in == 4
    assert work(cfg, tuning).rows_in == 0


def test_a_trial_that_fails_counts_and_says_why(cfg, quick, monkeypatch):
    tuning = open_study(cfg)

    def broken(cfg, data, *, on_epoch):
        raise PipelineError("the loss is not finite at step 3")

    monkeypatch.setattr(study_trials, "fit", broken)
    assert work(cfg, tuning).rejected == {"failed": 6}
    assert work(cfg, tuning).rows_in == 0  # else a worker whose trials all fail would never end
    assert study_trials.last_error(tuning) == "the loss is not finite at step 3"
    with pytest.raises(PipelineError, match="none of the study's 6 trials has finished"):
        shared_study.best_trial(tuning)


def test_a_trial_that_finds_no_memory_ends_alone_and_a_gpu_that_fails_ends_the_worker(cfg, quick, monkeypatch):
    tuning, fit = open_study(cfg), study_trials.fit
    ends = [lambda: np.empty(2**60, np.uint8), lambda: torch.empty(2**60, dtype=torch.uint8), out_of_device_memory]

    def failing(*arguments, **more):
        if ends:
            ends.pop(0)()
        return fit(*arguments, **more)

    monkeypatch.setattr(study_trials, "fit", failing)
    progress = work(cfg, tuning, max_trials=4)
    assert (progress.rows_out, progress.rejected) == (1, {"failed": 3})
    ends.append(illegal_access)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        work(cfg, tuning)
    assert numbers(tuning, TrialState.RUNNING) == [4]  # for another worker, once this one counts as dead


def out_of_device_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def illegal_access():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


# ------------------------------------------------------------------------------------------------ workers that die


def die_in(tuning, cfg, *, age_s: float, longest_epoch_s: float | None = None) -> optuna.Trial:
    """Leave a running trial whose last heartbeat is `age_s` old."""
    trial = shared_study.claim(tuning, cfg)
    if longest_epoch_s is not None:
        shared_study.beat(trial, longest_epoch_s)
    trial.set_user_attr("heartbeat", time.time() - age_s)
    return trial


def test_a_dead_workers_trial_is_tried_again_with_its_settings_and_counted_once(cfg, quick):
    tuning = open_study(cfg)
    dead = die_in(tuning, cfg, age_s=61, longest_epoch_s=1.0)
    assert work(cfg, tuning).rows_in == 6
    again = tuning.trials[1]
    assert again.params == dead.params
    assert again.user_attrs["retry_of"] == dead.number
    assert numbers(tuning, TrialState.FAIL) == [dead.number]
    assert shared_study.num_counted(tuning.trials) == 6
    assert len(tuning.trials) == 7


@pytest.mark.parametrize(
    ("age_s", "longest_epoch_s"),
    [
        (59, 1.0),  # a minute has not passed
        (99, 20.0),  # five of the longest epochs have not
        (3000, None),  # no epoch has ended yet: it may be a long one
    ],
)
def test_a_live_workers_trial_is_left_alone(cfg, quick, age_s, longest_epoch_s):
    tuning = open_study(cfg)
    live = die_in(tuning, cfg, age_s=age_s, longest_epoch_s=longest_epoch_s)
    assert work(cfg, tuning, max_trials=1).rows_in == 1
    assert numbers(tuning, TrialState.RUNNING) == [live.number]


def test_a_worker_killed_before_its_first_heartbeat_is_found_by_its_start(cfg):
    tuning = open_study(cfg)
    tuning.ask()
    shared_study.requeue_dead(tuning, time.time() + shared_study.STALE_UNKNOWN_S - 5)
    assert numbers(tuning, TrialState.RUNNING) == [0]
    shared_study.requeue_dead(tuning, time.time() + shared_study.STALE_UNKNOWN_S + 5)
    assert numbers(tuning, TrialState.FAIL) == [0]


def test_killed_between_queueing_again_and_failing_queues_only_once(cfg, monkeypatch):
    tuning = open_study(cfg)
    dead = die_in(tuning, cfg, age_s=1e6)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "tell", lambda *_, **__: None)  # the worker gets no further
        shared_study.requeue_dead(tuning, time.time())
    assert numbers(tuning, TrialState.RUNNING) == [dead.number]
    shared_study.requeue_dead(tuning, time.time())
    assert numbers(tuning, TrialState.FAIL) == [dead.number]
    assert len(numbers(tuning, TrialState.WAITING)) == 1


def test_a_trial_that_kills_its_workers_is_given_up(cfg, quick):
    tuning = open_study(cfg)
    for _ in range(shared_study.MAX_ATTEMPTS):
        die_in(tuning, cfg, age_s=1e6)
    work(cfg, tuning)
    chain = numbers(tuning, TrialState.FAIL)
    assert len(chain) == shared_study.MAX_ATTEMPTS
    assert shared_study.num_counted(tuning.trials) == 6  # given up, it counts
    assert len(tuning.trials) == 6 + shared_study.MAX_ATTEMPTS - 1


def test_a_signal_puts_the_trial_back_in_the_queue(cfg, quick, monkeypatch):
    tuning = open_study(cfg)

    def stopped(cfg, data, *, on_epoch):
        on_epoch(0, 0.5)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(study_trials, "fit", stopped)
        with pytest.raises(Stopped):
            work(cfg, tuning)
    assert numbers(tuning, TrialState.WAITING) == [1]
    assert work(cfg, tuning).rows_in == 6
    assert tuning.trials[1].params == tuning.trials[0].params


def test_a_worker_that_was_taken_for_dead_drops_its_result(cfg, quick, monkeypatch):
    tuning = open_study(cfg)
    real = stand_in()

    def slow(settings, data, *, on_epoch):
        running = numbers(tuning, TrialState.RUNNING)[0]
        if "retry_of" not in tuning.trials[running].user_attrs:
            shared_study.requeue_dead(open_study(cfg), time.time() + 1e6)  # what another worker does
        return real(settings, data, on_epoch=on_epoch)

    monkeypatch.setattr(study_trials, "fit", slow)
    progress = work(cfg, tuning, max_trials=2)
    assert progress.rejected == {"taken_for_dead": 1}
    assert numbers(tuning, TrialState.COMPLETE) == [1]


@pytest.mark.parametrize("error", [Stopped, PipelineError("the loss is not finite")])
def test_a_worker_that_was_taken_for_dead_ends_its_trial_in_peace(cfg, quick, monkeypatch, error):
    tuning = open_study(cfg)

    def late(settings, data, *, on_epoch):
        shared_study.requeue_dead(open_study(cfg), time.time() + 1e6)  # what another worker does
        raise error

    monkeypatch.setattr(study_trials, "fit", late)
    if error is Stopped:
        with pytest.raises(Stopped):
            work(cfg, tuning, max_trials=1)
    else:
        assert work(cfg, tuning, max_trials=1).rejected == {"taken_for_dead": 1}
    assert (numbers(tuning, TrialState.FAIL), numbers(tuning, TrialState.WAITING)) == ([0], [1])  # once


def test_a_trial_that_ends_while_another_worker_fails_it_disturbs_neither(cfg, monkeypatch):
    tuning = open_study(cfg)
    dead = die_in(tuning, cfg, age_s=1e6)
    real = tuning.enqueue_trial
    monkeypatch.setattr(tuning, "enqueue_trial", lambda *a, **o: (real(*a, **o), open_study(cfg).tell(0, 0.5)))
    shared_study.requeue_dead(tuning, time.time())
    assert numbers(tuning, TrialState.COMPLETE) == [dead.number]
    assert shared_study.num_counted(tuning.trials) == 1


def test_settings_that_do_not_fit_one_another_fail_their_trial_alone(merged, tmp_path, quick):
    space = "tuning.search_space={batch_size={choices=[16]}, bandit_groups={choices=[32]}}"
    cfg = load(merged, tmp_path, space)
    shared_study.check_search_space(cfg)  # each fits the other's default
    tuning = open_study(cfg)
    assert work(cfg, tuning).rejected == {"failed": 6}
    assert "bandit_groups (32) exceeds batch_size (16)" in study_trials.last_error(tuning)


@pytest.mark.parametrize("flag", ["--trials=0", "--trials=-1", "--minutes=-1"])
def test_limits_that_mean_nothing_are_refused(merged, flag):
    with pytest.raises(ConfigError, match="must be"):  # exit code 2, see common/cli.py
        optuna_worker.main([*flags(merged), flag])


def test_hyperband_prunes_too(merged, tmp_path, quick):
    cfg = load(merged, tmp_path, "tuning.num_trials=40", "tuning.trial_epochs=9", "tuning.pruner=hyperband")
    tuning = open_study(cfg)
    assert work(cfg, tuning).rejected["pruned"] > 0
    assert {len(trial.intermediate_values) for trial in shared_study.finished_trials(tuning)} == {9}
    best = shared_study.best_trial(tuning)
    assert best.value == max(best.intermediate_values.values())


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_study_of_other_settings_is_refused_and_remake_replaces_it(merged, tmp_path, cfg, quick):
    work(cfg, open_study(cfg), max_trials=1)
    other = load(merged, tmp_path, "training.steps_per_epoch=9")
    with pytest.raises(StaleArtefact, match=r"training.steps_per_epoch = 4 \(now 9"):
        open_study(other)
    varied = load(merged, tmp_path, "tuning.search_space.margin=[0.1, 0.2]")
    with pytest.raises(StaleArtefact, match="search_space"):
        open_study(varied)
    (made,) = optuna_worker.STAGE.records(varied).values()  # for the plan
    assert (made.inputs, made.rows) == (shared_study.record(varied).inputs, {"out": 1})
    assert made.seconds > 0
    assert len(open_study(cfg, redo="stale").trials) == 1  # one that matches is joined, not begun again
    assert len(open_study(other, redo="stale").trials) == 0
    with study_storage.locked(cfg):
        kept = optuna.get_all_study_summaries(study_storage.open_storage(cfg))
    assert sorted(study.n_trials for study in kept) == [0, 1]  # the former study, under another name


def test_a_study_of_other_data_is_refused(merged, tmp_path, cfg, quick):
    open_study(cfg)
    journal = cfg.paths.study_dir / "journal.log"
    ids = shared_study.record(cfg).inputs
    journal.write_text(journal.read_text().replace(ids["train.parquet"], "another-merge"))
    with pytest.raises(StaleArtefact, match=r"an earlier version of train\.parquet\nto redo it"):
        open_study(cfg)


def test_more_trials_may_be_asked_for_and_another_default_of_a_varied_setting(merged, tmp_path, cfg, quick):
    work(cfg, open_study(cfg))
    more = load(merged, tmp_path, "tuning.num_trials=8", "training.margin=0.3")
    assert work(more, open_study(more)).rows_in == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tuning.search_space.margin=[0.1, 9]", "less than or equal to 2"),
        ("tuning.search_space.loss={choices=['tripletz']}", "triplet"),
        ("tuning.search_space.epochs=[1, 9]", "epochs is the same for all trials"),
        ("tuning.search_space.marginn=[0.1, 0.2]", "did you mean margin"),
    ],
)
def test_a_search_space_that_cannot_be_used_is_an_error_at_once(merged, tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        shared_study.check_search_space(load(merged, tmp_path, setting))


# ----------------------------------------------------------------------------------------------------- the command


def test_the_command_trains_fills_the_study_and_writes_its_page(merged, tmp_path, capsys):
    space = "tuning.search_space={learning_rate=[0.005, 0.05, 'log'], margin=[0.1, 0.5]}"
    arguments = flags(merged, f"paths.study_dir={tmp_path}", "tuning.num_trials=3", space)
    assert optuna_worker.main([*arguments, "--trials", "2"]) == 0
    assert "2 trials in" in capsys.readouterr().out
    assert optuna_worker.main(arguments) == 0
    assert "best so far: trial" in capsys.readouterr().out
    page = (tmp_path / "study.html").read_text()
    assert page.count("<svg") == 5  # history, epochs, importances, and a slice for each of two settings
    assert "fANOVA" in page
    assert "mathdefault" not in page  # matplotlib's own labels of a logarithmic axis
    assert {f"trial {number}" for number in range(3)} <= set(re.findall(r">(trial \d+)<", page))
    by_epoch = re.search(r'aria-label="Value by epoch.*?</svg>', page, re.DOTALL)
    assert {"1", "2"} == set(re.findall(r">([\d.]+)</text>", by_epoch[0])) - set(
        re.findall(r">(0\.\d+)</text>", by_epoch[0])
    )
    (tmp_path / "study.html").unlink()  # as by a worker that was killed before it wrote it
    assert optuna_worker.main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "study.html").read_text() == page


def test_a_worker_with_nothing_finished_yet_leaves_well(merged, tmp_path, capsys, quick):
    arguments = [*flags(merged, f"paths.study_dir={tmp_path / 'study'}")]
    assert optuna_worker.main([*arguments, "--minutes", "0"]) == 0
    assert "no trial has finished yet" in capsys.readouterr().out
    study_page.write(tmp_path / "page.html", open_study(load(merged, tmp_path)))
    assert "No trial has finished yet" in (tmp_path / "page.html").read_text()


def test_a_worker_whose_trials_all_fail_says_why(merged, tmp_path, monkeypatch, quick):
    def broken(cfg, data, *, on_epoch):
        raise PipelineError("the loss is not finite at step 3")

    monkeypatch.setattr(study_trials, "fit", broken)
    with pytest.raises(PipelineError, match="every trial so far has failed; the last one: the loss is not finite"):
        optuna_worker.main([*flags(merged, f"paths.study_dir={tmp_path}"), "--trials", "1"])


def test_sigterm_puts_the_trial_back_and_exits_with_85(merged, tmp_path):
    endless = flags(merged, f"paths.study_dir={tmp_path}", "training.steps_per_epoch=1000000")
    worker = subprocess.Popen(
        [sys.executable, str(ROOT / "train" / "optuna_worker.py"), *endless],
        stderr=subprocess.PIPE,
        text=True,
    )
    journal, deadline = tmp_path / "journal.log", time.monotonic() + 60
    while not (journal.exists() and "longest_epoch_s" in journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker.terminate()
    assert "stopped by a signal" in worker.communicate(timeout=30)[1]
    assert worker.returncode == cli.EXIT_STOPPED
    cfg = load(merged, tmp_path / "x", f"paths.study_dir={tmp_path}", "training.steps_per_epoch=1000000")
    tuning = open_study(cfg)
    assert (numbers(tuning, TrialState.FAIL), numbers(tuning, TrialState.WAITING)) == ([0], [1])


def test_a_worker_is_named_with_its_slurm_job(monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert shared_study.worker_name().endswith(f"process {os.getpid()}, job 41_2")
