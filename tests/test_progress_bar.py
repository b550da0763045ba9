"""The progress bar of common/cli.py and the messages of a run, on a terminal. Oracle: the terminal's screen."""

import re
import sys

import pytest
import small_study
import terminal
from conftest import ROOT

BAR = re.compile(r"(\w+): +(\d+%\|.*\||\d+ \w+ \[).*\]")  # with a total and without
STAGE = """
import logging, time, warnings
from common import cli
from train.fitting import tracking

def main():
    log = logging.getLogger("pipeline")
    with cli.Progress("stage", "row", TOTAL) as progress:
        for number in range(4):
            time.sleep(0.15)  # the bar is drawn ten times a second at most
            progress.add(1)
            log.info("message %d", number)
            logging.getLogger("another.library").warning("its message %d", number)
            warnings.warn(f"warning {number}")
            tracking.Tracker().attempt(lambda: print("wandb: message", number, flush=True))
    return progress.summary("all is well")

cli.run(main)
"""


def glued(lines: list[str]) -> list[str]:
    """The lines that hold a bar and anything else."""
    return [line for line in lines if BAR.search(line) and not BAR.fullmatch(line)]


def bars_of(written: str) -> list[str]:
    return [part.strip() for part in re.split(r"[\r\n]", written) if BAR.match(part)]


@pytest.mark.parametrize("total", [4, None])
def test_no_line_of_a_terminal_holds_both_a_bar_and_a_message(total):
    command = [sys.executable, "-c", STAGE.replace("TOTAL", str(total))]
    code, lines, written = terminal.run(command, ROOT)
    assert code == 0, lines
    assert not glued(lines)
    for number in range(4):
        for message in ("message", "its message", "wandb: message"):
            assert f"{message} {number}" in lines
        assert sum(line.endswith(f"UserWarning: warning {number}") for line in lines) == 1
    assert re.fullmatch(r"stage: 4 rows in, 4 out; .*; all is well", lines[-2])
    assert not any(BAR.search(line) for line in lines)  # none is left behind
    assert ("stage: 100%|" in written) == (total is not None)
    assert len(bars_of(written)) >= 4


def test_a_workers_bar_counts_the_trials_that_are_left_and_stays_apart_from_their_messages(tmp_path):
    small_study.write_merge(tmp_path)
    flags = small_study.flags(tmp_path, "tuning.num_trials=3", "infrastructure.workers=1")
    for more, of in (["--trials", "1"], "1"), ([], "2"):
        command = [sys.executable, str(ROOT / "train" / "optuna_worker.py"), *flags, *more]
        code, lines, written = terminal.run(command, tmp_path)
        assert code == 0, lines
        assert not glued(lines)
        assert sum(line.startswith("trial ") for line in lines) == int(of)
        assert sum(line.startswith("epoch 2: ") for line in lines) == int(of)
        bars = bars_of(written)
        assert bars
        assert all(re.search(rf"\| \d/{of} \[", bar) for bar in bars)
