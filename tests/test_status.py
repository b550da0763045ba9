"""slurm/status.py and slurm/fates.py: what is told of a task in each state, and --watch on a terminal."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from common import provenance, stages
from common.errors import PipelineError
from slurm import chain, fates, runs, status

MEMORY = "out of memory: raise slurm.process_tar.sbatch (--mem)"


def log_of(folder, text: str) -> fates.Log:
    (folder / "a.log").write_text(text)
    return fates.read_log(folder / "a.log")


def test_a_log_is_read_from_its_last_start_on(tmp_path):
    assert fates.read_log(tmp_path / "none.log").first_start_s is None
    first = "-- 100 job 7 starts on a\nstopped\n-- 200 job 7 ends with exit code 85\n"
    requeued = "slurmstepd: error: *** JOB 7 ON a CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***\n"
    running = log_of(tmp_path, first + requeued + "-- 300 job 7 starts on b\nworking\n")
    assert (running.first_start_s, running.exit_code, running.killed) == (100, None, "")
    assert running.lines == ("working",)
    failed = log_of(tmp_path, first + "-- 300 job 7 starts on b\nerror: no\n-- 301 job 7 ends with exit code 1\n")
    assert (failed.exit_code, failed.lines) == (1, ("error: no",))
    limit = "slurmstepd: error: *** STEP 7.0 ON a CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n"
    assert log_of(tmp_path, "-- 1 job 7 starts on a\n" + limit).killed == "time limit"


@pytest.mark.parametrize(
    ("job", "text", "expected"),
    [
        (("PENDING", "Dependency"), "", ("waiting", "Dependency")),
        (("RUNNING", "None"), "-- 1 job 7 starts on a\n", ("running", "")),
        (("CANCELLED", "DependencyNeverSatisfied"), "", ("cancelled", "a step that it needs failed")),
        (
            ("TIMEOUT", "TimeLimit"),
            "-- 1 job 7 starts on a\n",
            ("failed", "time limit: raise slurm.process_tar.time"),
        ),
        (("SUSPENDED", "None"), "-- 1 job 7 starts on a\n", ("running", "suspended")),
        (("REQUEUE_HOLD", "None"), "-- 1 job 7 starts on a\n", ("waiting", "held (None): scontrol release 7")),
        (
            ("PENDING", "launch failed requeued held"),
            "",
            ("waiting", "held (launch failed requeued held): scontrol release 7"),
        ),
        (("PENDING", "QOSUsageThreshold"), "", ("waiting", "QOSUsageThreshold")),  # not held
        (("PENDING", "PartitionTimeLimit"), "", ("stuck", "forever: its time limit exceeds the partition's")),
        (
            ("PENDING", "QOSMaxGRESPerJob"),
            "",
            ("stuck", "forever: a limit on single jobs (QOSMaxGRESPerJob)"),
        ),
        (("PENDING", "QOSMaxCpuPerUserLimit"), "", ("waiting", "QOSMaxCpuPerUserLimit")),  # until others end
        (("PENDING", "BeginTime"), "", ("waiting", "for its start time (--begin)")),
        (
            ("PENDING", "BeginTime"),
            "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 85\n",
            ("waiting", "requeued, starts shortly"),
        ),
        (
            None,
            "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 0\n",
            ("done", "its inputs have been removed or changed since"),
        ),
        (("NODE_FAIL", "NodeDown"), "", ("failed", "its node failed")),
        (("BOOT_FAIL", "None"), "", ("failed", "its node did not boot")),
        (("PREEMPTED", "None"), "-- 1 job 7 starts on a\n", ("failed", "preempted")),
        (("OUT_OF_MEMORY", "OutOfMemory"), "-- 1 job 7 starts on a\n", ("failed", MEMORY)),
        (
            ("FAILED", "JobLaunchFailure"),
            "",
            ("failed", "before it could write its log (JobLaunchFailure): can compute nodes see the folder?"),
        ),
        (
            None,
            "-- 1 job 7 starts on a\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n"
            "-- 2 job 7 ends with exit code 137\n",
            ("failed", MEMORY),
        ),
        (
            None,
            "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 85\n",
            ("failed", "stopped with everything saved, and not requeued (slurm.max_requeues)"),
        ),
        (
            ("CANCELLED", "None"),
            "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 85\n"
            "slurmstepd: error: *** JOB 7 ON a CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***\n",
            ("cancelled", "before it restarted"),
        ),
        (
            ("TIMEOUT", "TimeLimit"),
            "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 85\n"
            "-- 2 job 7 cannot be queued again (Access/permission denied): submit it again\n",
            ("failed", "stopped with everything saved, and could not be requeued: Access/permission denied"),
        ),
        (None, "", ("cancelled", "before it started")),  # Slurm has forgotten the job: the log alone tells
        (None, "-- 1 job 7 starts on a\n", ("failed", "killed")),
        (None, "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 1\n", ("failed", "exit code 1")),
    ],
)
def test_what_became_of_a_task(cfg, tmp_path, job, text, expected):
    step = chain.steps_of(cfg)[0]
    job = job and runs.SlurmJob("7_0", "process_tar", *job)
    log = log_of(tmp_path, text) if text else fates.read_log(tmp_path / "none.log")
    assert fates.fate(step, 0, job, log, cfg) == expected


def test_shards_of_one_job_share_its_state_and_each_has_its_own_lines(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(chain.Step, "is_done", lambda step, _, task: task == 4)
    step = next(step for step in chain.steps_of(cfg) if step.name == "process_tar")
    entry = {"job": "7", "tasks": [3, 4, 5], "log": str(tmp_path / "a-%a.log"), "tasks_per_job": 3}
    log = "-- 1 job 7_1 starts on a\n0: shard 3\n2: 5: five\n0: -- task ends with exit code 85\n"
    log += "1: -- task ends with exit code 0\nsrun: error: a: task 2: Killed\n"
    (tmp_path / "a-1.log").write_text(log + "-- 2 job 7_1 ends with exit code 137\n")
    queue = {"7_0": runs.SlurmJob("7_0", "process_tar", "RUNNING", "None")}
    tasks = fates.tasks_of(step, entry, queue, cfg)
    assert [(task.number, task.job, task.state) for task in tasks] == [
        (3, "7_1", "failed"),
        (4, "7_1", "done"),
        (5, "7_1", "failed"),
    ]
    killed = "srun: error: a: task 2: Killed"
    assert [task.log.lines for task in tasks] == [("shard 3", killed), (killed,), ("5: five", killed)]
    assert tasks[0].why == "stopped with everything saved, and not requeued (slurm.max_requeues)"
    assert tasks[2].why == "killed"
    queue |= {"7_1": runs.SlurmJob("7_1", "process_tar", "RUNNING", "None")}
    assert {task.state for task in fates.tasks_of(step, entry, queue, cfg)} == {"running"}


def test_a_job_that_failed_though_its_files_are_there_is_told_until_a_later_run_has_made_them(cfg, tmp_path):
    made = tmp_path / "made.json"
    record = provenance.record("stage", {}, {})
    made.write_text(json.dumps({"provenance": record.to_dict()}))
    stage = stages.Stage("train", lambda cfg: tmp_path, lambda cfg, task, of: [stages.Output(made, record)])
    step = SimpleNamespace(stage=stage, tasks=1, is_done=stage.is_done)
    log = log_of(tmp_path, "-- 1 job 7 starts on a\nTraceback\n-- 2 job 7 ends with exit code 1\n")
    os.utime(made, (100, 100))
    for written, expected in (
        (100, ("failed", "exit code 1, although its files are complete")),  # what needs it was cancelled
        (101, ("failed", "exit code 1, although its files are complete")),
        (99, ("done", "")),
    ):
        os.utime(log.path, (written, written))
        assert fates.fate(step, 0, None, log, cfg) == expected
    succeeded = log_of(tmp_path, "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 0\n")
    assert fates.fate(step, 0, None, succeeded, cfg) == ("done", "")


REPORT = {
    "run": "20260101-000000",
    "folder": "/logs/runs/20260101-000000",
    "live": True,
    "failed": True,
    "continue": "python slurm/submit.py --set training.epochs=5 --set paths.root=/scratch/a/long/path/to/where",
    "continue_submission": "",
    "cancel": "python slurm/submit.py --cancel 20260101-000000",
    "steps": [
        {
            "name": "process_tar",
            "job": "7",
            "state": "failed",
            "why": "exit code 1",
            "tasks": {"failed": 1, "running": 4, "done": 11},
            "progress": {"done": 412, "total": 1700, "unit": "files", "per_hour": 120.4, "seconds_left": 36000.0},
        },
        {"name": "compute_visual_neighbors", "job": "8", "state": "waiting", "why": "for merge_and_split"}
        | {"tasks": {"waiting": 1}, "progress": {}},
    ],
    "failures": [
        {"step": "process_tar", "task": 3, "job": "7_3", "why": "exit code 1", "log": "/logs/process_tar-3.log"}
        | {"last_lines": ["error: " + "x" * 200]}
    ],
}


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_narrow_terminal_the_table_keeps_what_matters(width):
    lines = status.as_text(REPORT, width).splitlines()
    table = lines[2:5]
    assert max(map(len, table)) <= width
    assert re.search(r"process_tar +failed +11 of 16 +412 of 1,700 files +10 h 00 min", table[1])
    assert table[2].startswith("compute_visual_neighbors  waiting")
    assert ("1 failed, 4 running; exit code 1" in table[1]) == (width == 120)
    assert lines[-1].endswith(REPORT["continue"])  # whole: it is to be copied
    assert "  | error: " + "x" * 200 in lines


def test_watch_shows_no_more_than_the_terminal_holds_while_something_lives():
    screen = status.on_screen(REPORT, 80, 8)
    assert screen.startswith("\033[H\033[J")
    assert len(screen.splitlines()) == 7
    assert max(map(len, status.on_screen(REPORT, 80, 50).splitlines()[1:])) == 80
    assert screen.endswith("... (run without --watch to see the rest)")
    assert REPORT["continue"] in status.on_screen(REPORT | {"live": False}, 80, 8)  # the last one stays


def test_watch_goes_on_while_the_controller_restarts_and_ends_with_the_last_job(monkeypatch, capsys, tmp_path):
    answers = [
        PipelineError("squeue failed: Unable to contact slurm controller"),
        REPORT,
        REPORT | {"live": False},
    ]

    def report(_):
        answer = answers.pop(0)
        if isinstance(answer, PipelineError):
            raise answer
        return answer

    monkeypatch.setattr(status, "report", report)
    monkeypatch.setattr(status, "WATCH_EVERY_S", 0)
    assert status.watch(tmp_path, as_json=True) == 1
    told = capsys.readouterr()
    assert [json.loads(line)["live"] for line in told.out.splitlines()] == [True, False]  # a line each time
    assert "Unable to contact slurm controller; retrying" in told.err


def test_ctrl_c_ends_watch_on_a_terminal_quietly(submitted, cfg, clients):
    folder = submitted()
    job = runs.load(folder)["steps"]["process_tar"]["job"]
    clients(squeue=f"echo '{job}_0|process_tar|RUNNING|None'")
    outside, inside = pty.openpty()
    command = [sys.executable, ROOT / "slurm" / "status.py", "--set", f"paths.root={cfg.paths.root}", "--watch"]
    watching = subprocess.Popen(
        command,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        # a shell's background job ignores SIGINT, and so would what the tests start when they run in one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(inside)
    shown = b""
    while b"running" not in shown:
        shown += os.read(outside, 4096)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=30) == 130
    with contextlib.suppress(OSError):  # nobody writes there any more
        while more := os.read(outside, 4096):
            shown += more
    assert shown.count(b"\x1b[H\x1b[J") == 1
    assert not re.search(b"interrupted|Traceback", shown)


def test_status_names_a_run_that_is_not_there(run_script, tmp_path):
    for arguments, message in [
        ((), "there are no runs"),
        (("20260101-000000",), "there is no run 20260101-000000"),
    ]:
        result = run_script("slurm/status.py", *arguments, "--set", f"paths.root={tmp_path}")
        assert result.returncode == 1
        assert message in result.stderr
