"""The command line of all scripts: flags, errors, signals, progress, the summary line.

Imports nothing heavy: `--help` answers at once.
"""

import argparse
import atexit
import contextlib
import errno
import gc
import logging
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from common.errors import PipelineError, Stopped, explained

log = logging.getLogger("pipeline")
EXIT_STOPPED = 85  # stopped early by a signal with everything saved: Slurm's wrapper requeues the job
_OUR_PACKAGES = ("common", "preprocess", "generate", "difficulty", "train", "publish", "slurm")
_DISK_ERRORS = {  # that a user can fix
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "the file exceeds the size limit (ulimit -f)",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EISDIR: "expected a file, found a directory",
    errno.ENOTDIR: "expected a directory, found a file",
    errno.EEXIST: "expected a directory, found a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the disk cannot be read or written (I/O error)",
}
_stop_signal: int | None = None


def parser(doc: str, *, shards: bool = False) -> argparse.ArgumentParser:
    """The flags that every stage has. `doc`: the script's docstring, shown verbatim by --help."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    config_flags(arguments)
    redo = arguments.add_mutually_exclusive_group()
    remake = "recreate output that is damaged, or made with other settings or from other inputs"
    redo.add_argument("--remake", dest="redo", action="store_const", const="stale", default="", help=remake)
    redo.add_argument("--overwrite", dest="redo", action="store_const", const="all", help="recreate all output")
    if shards:
        arguments.add_argument("--shard", type=int, default=0, metavar="I", help="index of this shard (0)")
        arguments.add_argument("--num-shards", type=int, default=1, metavar="N", help="number of shards (1)")
    return arguments


def config_flags(arguments: argparse.ArgumentParser) -> None:
    """--config and --set, for scripts without --remake and --overwrite."""
    arguments.add_argument("--config", type=Path, metavar="PATH", help="settings (the repository's config.toml)")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="override a setting; repeatable"
    )


def load_config(args: argparse.Namespace):
    """The settings that the arguments select; checks --shard and sets the log level.

    Raises ConfigError; for a stage also if an older version's files are where this one would not find them.
    """
    from common import config
    from common.errors import ConfigError
    from common.layout import former_layout

    num_shards = getattr(args, "num_shards", 1)
    if num_shards < 1:
        raise ConfigError("--num-shards must be 1 or more")
    if not 0 <= getattr(args, "shard", 0) < num_shards:
        raise ConfigError(f"--shard must be between 0 and --num-shards - 1 = {num_shards - 1}")
    cfg = config.load(args.config, args.set)
    if "redo" in args:  # a stage's: jobs can be followed and cancelled all the same
        former_layout.refuse(cfg)
    log.setLevel(cfg.logging.level.upper())
    return cfg


def run(main, *, resumable: bool = False) -> None:
    """Run a script's `main` and exit: 0 done, 1 failed, 2 invalid arguments, 85 stopped with everything saved.

    Errors that a user can cause are printed to stderr without a traceback; any other is a bug and shows one.
    `resumable`: the script calls `check_stop` and continues later, so SIGTERM and SIGUSR2 end it with 85. Other
    scripts are ended by SIGTERM as usual and ignore SIGUSR2, Slurm's warning before the time limit.
    """
    _open_closed_streams()
    collect_seldom()
    for device in ("MPS", "XPU"):  # torch reads this as it is imported: the CPU computes what they lack
        os.environ.setdefault(f"PYTORCH_ENABLE_{device}_FALLBACK", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    if resumable:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, _remember_signal)
    else:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    sys.exit(exit_code_of(main))


def _open_closed_streams() -> None:
    """Where the standard streams were closed (2>&-): the next file to be opened would be taken for one of them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def collect_seldom() -> None:
    """Collect garbage seldom, and not when the process ends.

    torch and transformers create hundreds of thousands of objects that stay. Scanning them repeatedly while they
    load, and once more at exit, takes up to a third of the time of a script that does little else.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)  # registered first, so called last


def exit_code_of(main) -> int:
    """Call `main()` and turn what it raises into a message and an exit code."""
    try:
        return main() or 0
    except PipelineError as error:
        return _fail(*str(error).splitlines(), code=error.exit_code)
    except Stopped:
        print("stopped by a signal; finished work is saved, and the next run continues", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("interrupted; finished files are kept", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in _OUR_PACKAGES:
            raise
        missing = f"the Python package {error.name} is not installed for {sys.executable}"
        advice = "run `make install`, then `source .venv/bin/activate`; docs/installing.md has other ways"
        return _fail(missing, advice)
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # the reader of our output has gone: `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        # a copy or a rename names two files, of which the second is written
        path = error.filename if error.errno == errno.EIO else error.filename2 or error.filename
        if not path and "/" in (error.strerror or ""):
            path = error.strerror  # Arrow names the file in its text
        where = f" ({path})" if path else ""
        return _fail(f"{_DISK_ERRORS[error.errno]}{where}", "fix this and rerun: finished files are kept")
    except Exception as error:
        lines = explained(error)
        if lines is None:
            raise
        log.debug("%s", lines[0], exc_info=error)
        return _fail(*lines)


def _fail(*lines: str, code: int = 1) -> int:
    print("error:", "\n       ".join(lines), file=sys.stderr)
    return code


def _remember_signal(number, _frame) -> None:
    global _stop_signal
    _stop_signal = number


def stop_requested() -> bool:
    """Whether SIGTERM or SIGUSR2 has arrived: save the work so far, then call `check_stop`."""
    return _stop_signal is not None


def check_stop() -> None:
    """Raise Stopped if a signal has asked this run to end. Call it where no unfinished work is lost."""
    if stop_requested():
        raise Stopped


class Progress:
    """Counts rows in, out and rejected; shows a bar on a terminal, else a line now and then; ends in a summary.

    Log messages and Python's warnings appear above the bar. `total`: the number of rows, or None if only the share
    of the work done is known (see `add`). `unit`: what a row is, in the singular.
    """

    def __init__(self, stage: str, unit: str, total: int | None = None, interval_s: float = 30.0):
        self.stage, self.total, self.interval_s = stage, total, interval_s
        self.units = unit if unit.endswith("s") else unit + "s"
        self.rows_in = self.rows_out = 0
        self.rejected: Counter[str] = Counter()
        self._share = 0.0  # of the work, if `total` is not known
        self._started = self._last_line = time.monotonic()
        self._bar = None
        self._shown = contextlib.ExitStack()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            bar = tqdm(total=self.total, unit=f" {self.units}", desc=self.stage, smoothing=0.1, leave=False)
            self._bar = self._shown.enter_context(bar)
            self._shown.enter_context(logging_redirect_tqdm())
            logging.captureWarnings(True)
            self._shown.callback(logging.captureWarnings, False)
        return self

    def __exit__(self, *_) -> None:
        self._shown.close()

    def add(
        self, rows_in: int, rows_out: int | None = None, rejected: dict[str, int] | None = None, share: float = 0.0
    ) -> None:
        """Count finished rows; `rows_out` defaults to `rows_in`. `share`: of all the work, done so far (0..1)."""
        self._share = share or self._share
        self.rows_in += rows_in
        self.rows_out += rows_in if rows_out is None else rows_out
        self.rejected.update(rejected or {})
        if self._bar is not None:
            if self._share:
                self._bar.total = round(self.rows_in / self._share)  # for its percentage and time left
            self._bar.update(rows_in)
        elif time.monotonic() - self._last_line >= self.interval_s:
            self._last_line = time.monotonic()
            print(f"{self.stage}: {self._line()}", file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        share = min(1.0, self.rows_in / self.total) if self.total else self._share
        of_total = f" of {self.total:,}" if self.total else ""
        percent = f" ({share:.0%})" if self.total or share else ""
        line = f"{self.rows_in:,}{of_total} {self.units}{percent}, {_rate(self.rows_in, seconds)}"
        return f"{line}, {duration(seconds * (1 - share) / share)} left" if share else line

    def summary(self, note: str = "") -> int:
        """Print the run's one summary line (ending in `note`) and return exit code 0."""
        seconds = time.monotonic() - self._started
        counts = f"{self.rows_in:,} {self.units} in, {self.rows_out:,} out"
        if self.rejected:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.most_common())
            counts += f", {self.rejected.total():,} rejected ({reasons})"
        rate = _rate(self.rows_in, seconds).replace("/", f" {self.units}/")
        parts = [counts, f"{duration(seconds)}, {rate}", *([note] if note else [])]
        print(f"{self.stage}: {'; '.join(parts)}", flush=True)
        return 0


def nothing_to_do(stage: str, what: str) -> int:
    """Report that `what` (such as "12 files") is up to date; returns exit code 0."""
    print(f"{stage}: nothing to do, {what} up to date", flush=True)
    return 0


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _rate(count: int, seconds: float) -> str:
    """How many per second, or if that is less than one, per minute or hour: "14/min"."""
    rate, per = count / max(seconds, 1e-9), "s"
    for longer in ("min", "h"):
        if 0 < rate < 1:
            rate, per = 60 * rate, longer
    return f"{rate:,.0f}/{per}"
