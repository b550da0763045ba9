"""The command line of every script: flags, errors, signals, progress and the summary line.

Imports nothing heavy, so `--help` is instant.
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

from common.errors import PipelineError, Stopped

log = logging.getLogger("pipeline")
EXIT_STOPPED = 85  # stopped by a signal with everything saved: Slurm's wrapper requeues the job
_OUR_PACKAGES = ("common", "preprocess", "generate", "difficulty", "train", "publish", "slurm")
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file size limit exceeded (ulimit -f)",
    errno.EACCES: "permission denied",
    errno.EROFS: "read-only file system",
    errno.EISDIR: "expected a file, found a directory",
    errno.ENOTDIR: "expected a directory, found a file",
    errno.EEXIST: "expected a directory, found a file",
    errno.EIO: "input/output error",
}
_stop_signal: int | None = None


def parser(doc: str, *, shards: bool = False) -> argparse.ArgumentParser:
    """The flags of every stage. `doc`: the script's docstring, shown verbatim by --help."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    config_flags(arguments)
    arguments.add_argument("--overwrite", action="store_true", help="recreate existing outputs")
    if shards:
        arguments.add_argument("--shard", type=int, default=0, metavar="I", help="index of this shard (0)")
        arguments.add_argument("--num-shards", type=int, default=1, metavar="N", help="number of shards (1)")
    return arguments


def config_flags(arguments: argparse.ArgumentParser) -> None:
    """--config and --set, for scripts without --overwrite."""
    arguments.add_argument("--config", type=Path, metavar="PATH", help="settings (the repository's config.toml)")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="override a setting; repeatable"
    )


def load_config(args: argparse.Namespace):
    """The configuration for these arguments; checks --shard and sets the log level. Raises ConfigError."""
    from common import config
    from common.errors import ConfigError

    num_shards = getattr(args, "num_shards", 1)
    if num_shards < 1:
        raise ConfigError("--num-shards must be at least 1")
    if not 0 <= getattr(args, "shard", 0) < num_shards:
        raise ConfigError(f"--shard must be between 0 and --num-shards - 1 = {num_shards - 1}")
    cfg = config.load(args.config, args.set)
    log.setLevel(cfg.logging.level.upper())
    return cfg


def run(main, *, resumable: bool = False) -> None:
    """Run a script's `main` and exit: 0 done, 1 failed, 2 invalid arguments, 85 stopped with everything saved.

    Errors that a user can cause are printed without a traceback; any other error is a bug and shows one.
    `resumable`: the script calls `check_stop` and can continue later, so SIGTERM and SIGUSR2 end it with code 85.
    Otherwise SIGTERM ends it at once, and SIGUSR2, Slurm's warning before the time limit, is ignored: the script
    may still finish in the remaining minutes.
    """
    collect_seldom()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    if resumable:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, _remember_signal)
    else:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    sys.exit(exit_code_of(main))


def collect_seldom() -> None:
    """Run the garbage collector rarely, and not at exit.

    torch and transformers create hundreds of thousands of permanent objects. Scanning them repeatedly during
    import, and once more at exit, takes up to a third of the time of a short script.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)  # registered first, so it runs last


def exit_code_of(main) -> int:
    """Call `main()`; print the error that it raises, and return the exit code."""
    try:
        return main() or 0
    except PipelineError as error:
        _print_error(*str(error).splitlines())
        return error.exit_code
    except Stopped:
        print("stopped by a signal; finished work is saved, and the next run continues", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("interrupted; finished files are kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # the reader of our output has exited: `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, MemoryError, RuntimeError, OSError) as error:
        lines = _explain(error)
        if not lines:
            raise
        _print_error(*lines)
        return 1


def _print_error(*lines: str) -> None:
    print("error: " + "\n       ".join(lines), file=sys.stderr)


def _explain(error: Exception) -> list[str]:
    """The message for an error of the environment: what is wrong, and what to do. Empty for a bug."""
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] not in _OUR_PACKAGES:
        return [
            f"the Python package {error.name} is not installed for {sys.executable}",
            "run `make install`, then `source .venv/bin/activate`",
        ]
    if isinstance(error, MemoryError):
        return ["out of memory", "--help states the script's needs; on Slurm, raise --mem in slurm.<stage>.sbatch"]
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return [
            "the device is out of memory",
            "free some, lower batch sizes or infrastructure.search_memory_mb, or change infrastructure.device",
        ]
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        # of the two paths of a copy or a rename, the second is the one being written
        path = error.filename if error.errno == errno.EIO else error.filename2 or error.filename
        where = f" ({path})" if path else ""
        return [f"{_DISK_ERRORS[error.errno]}{where}", "fix this and rerun: finished files are kept"]
    return []


def _remember_signal(number, _frame) -> None:
    global _stop_signal
    _stop_signal = number


def stop_requested() -> bool:
    """Whether SIGTERM or SIGUSR2 has arrived. If so, save the state and call `check_stop`."""
    return _stop_signal is not None


def check_stop() -> None:
    """Raise Stopped if a signal has asked this run to end. Call it where no unsaved work is lost."""
    if stop_requested():
        raise Stopped


class Progress:
    """Counts rows in, out and rejected; shows a bar on a terminal, else a line at intervals; ends in a summary.

    `total`: the expected number of rows, or None if only the completed share of the work is known (see `add`).
    `unit`: what a row is, in the singular.
    """

    def __init__(self, stage: str, unit: str, total: int | None = None, interval_s: float = 30.0):
        self.stage, self.unit, self.total, self.interval_s = stage, unit, total, interval_s
        self.rows_in = self.rows_out = 0
        self.rejected: Counter[str] = Counter()
        self._units = unit if unit.endswith("s") else f"{unit}s"
        self._share = 0.0  # of the work done, if `total` is unknown
        self._started = self._last_line = time.monotonic()
        self._bar = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, unit=f" {self.unit}", desc=self.stage, smoothing=0.1, leave=False)
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(
        self, rows_in: int, rows_out: int | None = None, rejected: dict[str, int] | None = None, share: float = 0.0
    ) -> None:
        """Count finished rows; `rows_out` defaults to `rows_in`. `share` of the total work done so far (0..1)."""
        self._share = share or self._share
        self.rows_in += rows_in
        self.rows_out += rows_in if rows_out is None else rows_out
        self.rejected.update(rejected or {})
        if self._bar is not None:
            if self._share:
                self._bar.total = round(self.rows_in / self._share)  # for the percentage and the time left
            self._bar.update(rows_in)
        elif time.monotonic() - self._last_line >= self.interval_s:
            self._last_line = time.monotonic()
            print(f"{self.stage}: {self._line()}", file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        rate, per = _rate(self.rows_in, seconds)
        share = self.rows_in / self.total if self.total else self._share
        of_total = f" of {self.total:,}" if self.total else ""
        counts = f"{self.rows_in:,}{of_total} {self._units}"
        if not (self.total or share):
            return f"{counts}, {rate:,.0f}/{per}"
        remaining = seconds * (1 - share) / share if share else float("inf")
        return f"{counts} ({share:.0%}), {rate:,.0f}/{per}, {duration(remaining)} left"

    def summary(self, note: str = "") -> int:
        """Print the run's summary line, ending with `note`, and return exit code 0."""
        seconds = time.monotonic() - self._started
        parts = [f"{self.rows_in:,} {self._units} in, {self.rows_out:,} out"]
        if self.rejected:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.most_common())
            parts[0] += f", {self.rejected.total():,} rejected ({reasons})"
        rate, per = _rate(self.rows_in, seconds)
        parts.append(f"{duration(seconds)}, {rate:,.0f} {self._units}/{per}")
        if note:
            parts.append(note)
        print(f"{self.stage}: {'; '.join(parts)}", flush=True)
        return 0


def nothing_to_do(stage: str, what: str) -> int:
    """Report that `what` (such as "12 files") is up to date; return exit code 0."""
    print(f"{stage}: nothing to do, {what} up to date", flush=True)
    return 0


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds == float("inf"):
        return "unknown time"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _rate(count: int, seconds: float) -> tuple[float, str]:
    """The rate and its unit of time: "s", or "min" or "h" if it would be below one."""
    rate, per = count / max(seconds, 1e-9), "s"
    for longer in ("min", "h"):
        if 0 < rate < 1:
            rate, per = 60 * rate, longer
    return rate, per
