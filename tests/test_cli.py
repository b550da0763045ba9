"""common/cli.py: exit codes, messages without tracebacks, the progress line and the summary line."""

import errno
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT

from common import cli, files
from common.errors import ConfigError, PipelineError


def run_main(body: str, resumable: bool = False) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom common import cli, errors\ndef main():\n"
    code += textwrap.indent(textwrap.dedent(body), "    ") + f"\ncli.run(main, resumable={resumable})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PipelineError("a is missing\nrun b"), 1, "error: a is missing\n       run b\n"),
        (ConfigError("no such key"), 2, "error: no such key\n"),
        (OSError(errno.ENOSPC, "No space", "/scratch/x"), 1, "error: the disk is full (/scratch/x)\n"),
        (
            OSError(errno.EACCES, "Cannot open '/scratch/x'"),
            1,
            "error: permission denied (Cannot open '/scratch/x')\n",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "/scratch/x"),
            1,
            "error: the name is too long (/scratch/x)\n",
        ),
        (OSError(errno.ENOSPC, "No space", "/a", None, "/scratch/x"), 1, "error: the disk is full (/scratch/x)\n"),
        (
            OSError(errno.EISDIR, "Is a directory", "/.x.tmp", None, "/x"),
            1,
            "error: expected a file, found a directory (/x)",
        ),
        (
            OSError(errno.EIO, "Error", "/from", None, "/to"),
            1,
            "error: the disk cannot be read or written (I/O error) (/from",
        ),
    ],
)
def test_a_users_error_is_two_lines_and_an_exit_code(error, code, message, capsys):
    def main():
        raise error

    assert cli.exit_code_of(main) == code
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert "Traceback" not in told


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, capsys):
    (tmp_path / "a.parquet").mkdir()
    assert cli.exit_code_of(lambda: files.write_text(tmp_path / "a.parquet", "")) == 1
    assert f"expected a file, found a directory ({tmp_path}/a.parquet)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_bug_shows_its_traceback():
    result = run_main("return 1 / 0")
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_stop_signal_ends_the_run_at_the_next_safe_point_with_85(name):
    result = run_main(f"""
        import os, signal
        os.kill(os.getpid(), signal.{name})
        print("saved")
        cli.check_stop()
        print("not reached")
    """, resumable=True)  # fmt: skip
    assert (result.returncode, result.stdout) == (cli.EXIT_STOPPED, "saved\n")
    assert "stopped by a signal" in result.stderr


def test_without_a_signal_the_run_goes_on():
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL  # importing installs nothing
    assert not cli.stop_requested()
    cli.check_stop()


def test_the_summary_counts_in_out_and_rejects_by_reason(capsys):
    with cli.Progress("process_tar", "image", total=41_230) as progress:
        progress.add(41_000, 40_967, {"label_empty": 21, "jpeg_corrupt": 12})
        progress.add(230)
    assert progress.summary("2 tars") == 0
    line = capsys.readouterr().out
    assert line.startswith(
        "process_tar: 41,230 images in, 41,197 out, 33 rejected (label_empty 21, jpeg_corrupt 12); "
    )
    assert line.endswith("images/s; 2 tars\n")


@pytest.mark.parametrize(("seconds", "rate"), [(1, "3 trials/s"), (13, "14 trials/min"), (600, "18 trials/h")])
def test_a_slow_rate_is_told_by_the_minute_or_hour(capsys, seconds, rate):
    with cli.Progress("optuna_worker", "trial") as progress:
        progress.add(3)
        progress._started -= seconds
    progress.summary()
    assert capsys.readouterr().out.endswith(f", {rate}\n")


def test_off_a_terminal_a_plain_line_appears_now_and_then(capsys):
    with cli.Progress("stage", "row", total=10, interval_s=0) as progress:
        progress.add(5)
    line = capsys.readouterr().err
    assert line.startswith("stage: 5 of 10 rows (50%), ")
    assert "left" in line
    assert "\r" not in line


def test_where_only_the_share_of_the_work_is_known_the_line_has_percent_and_time_left(capsys):
    with cli.Progress("stage", "row", interval_s=0) as progress:
        progress.add(5)
        progress._started -= 90
        progress.add(7, share=0.75)
        progress.add(0, 0, {"bad": 1})  # the share stays
    first, *others = capsys.readouterr().err.splitlines()
    assert "%" not in first
    for line in others:
        assert line.startswith("stage: 12 rows (75%), ")
        assert line.endswith("30 s left")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.2, "59 s"), (61, "1 min 01 s"), (7_260, "2 h 01 min")]
)
def test_durations_read_well(seconds, text):
    assert cli.duration(seconds) == text


@pytest.mark.parametrize(
    ("shard", "of", "blamed"), [(3, 3, "--shard"), (-1, 3, "--shard"), (0, 0, "--num-shards")]
)
def test_a_shard_outside_its_range_is_an_error(shard, of, blamed):
    args = cli.parser("doc", shards=True).parse_args(["--shard", str(shard), "--num-shards", str(of)])
    with pytest.raises(ConfigError, match=f"^{blamed}"):
        cli.load_config(args)


@pytest.mark.parametrize("resumable", [True, False])
def test_slurms_warning_ends_only_a_script_that_can_go_on_later(resumable):
    result = run_main("""
        import os, signal
        os.kill(os.getpid(), signal.SIGUSR2)
        if cli.stop_requested():
            cli.check_stop()
        print("went on")
    """, resumable)  # fmt: skip
    assert (result.returncode, result.stdout) == ((cli.EXIT_STOPPED, "") if resumable else (0, "went on\n"))


def test_sigterm_ends_a_script_that_saves_nothing_half_way():
    result = run_main("""
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
        print("went on")
    """)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("import torch; raise torch.OutOfMemoryError('CUDA')", "error: the device is out of memory"),
        (
            "raise RuntimeError('MPS backend out of memory (MPS allocated: 9.0 GB)')",
            "error: the device is out of memory",
        ),
        ("raise MemoryError", "error: out of memory"),
    ],
)
def test_memory_that_runs_out_is_no_traceback(error, message):
    result = run_main(error)
    assert result.stderr.splitlines()[0] == message
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)


def test_torch_running_out_of_the_hosts_memory_is_as_numpy_doing_so(capsys):
    told = []
    for request in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8)):
        assert cli.exit_code_of(request) == 1
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert told[0].startswith("error: out of memory\n       --help says how much the script needs")


ASYNCHRONOUS = "CUDA kernel errors might be asynchronously reported at some other API call.\nFor debugging ..."
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040)"


@pytest.mark.parametrize(
    ("text", "line", "advice"),
    [
        (
            f"CUDA error: no kernel image is available for execution on the device\n{ASYNCHRONOUS}",
            None,
            "CUDA 12.6",
        ),
        (f"{OLD_DRIVER}. Please update your GPU driver.", f"{OLD_DRIVER}.", "update the driver"),
        ("CUDA error: the provided PTX was compiled with an unsupported toolchain.", None, "update the driver"),
        (f"CUDA error: an illegal memory access was encountered\n{ASYNCHRONOUS}", None, "CUDA_LAUNCH_BLOCKING"),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle )`", None, "CONSTRAINTS="),
        ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", None, "CONSTRAINTS="),
        (
            "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
            None,
            "try another GPU",
        ),
    ],
)
def test_an_error_of_a_gpu_is_two_lines_that_say_what_helps(text, line, advice, capsys, caplog):
    def main():
        raise RuntimeError(text)

    assert cli.exit_code_of(main) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: {line or text.splitlines()[0]}"
    assert advice in second
    assert 'infrastructure.device to "cpu"' in second
    assert "Traceback" not in caplog.text
    with caplog.at_level("DEBUG", "pipeline"):  # for whoever looks for its cause
        cli.exit_code_of(main)
    assert "in main" in caplog.text


def test_other_errors_of_the_run_show_where():
    assert "Traceback" in run_main("raise RuntimeError('a bug of ours')").stderr


def test_a_package_that_is_not_installed_is_named_with_the_way_out():
    result = run_main("import no_such_package")
    assert result.returncode == 1
    assert "the Python package no_such_package is not installed" in result.stderr
    assert "make install" in result.stderr
    assert "Traceback" in run_main("import common.no_such_module").stderr  # a bug of ours


def test_closed_streams_do_no_harm(tmp_path):
    """The first file that is opened would have the number of stderr, and messages would go into it."""
    body = f"file = open({str(tmp_path / 'a')!r}, 'w'); os.write(2, b'a message'); raise PipelineError('no')"
    code = "import os, sys; from common import cli; from common.errors import PipelineError\n"
    code += f"def main():\n    {body}\ncli.run(main)"
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" 2>&- >&- <&-', sys.executable, code], timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert (tmp_path / "a").read_text() == ""
