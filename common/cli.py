"""What every script has in common on the command line: flags, errors, signals, progress, the summary line.

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

from common.errors import PipelineError, Stopped

log = logging.getLogger("pipeline")
EXIT_STOPPED = 85  # stopped early by a signal with everything saved: Slurm's wrapper requeues the job
_OUR_PACKAGES = ("common", "preprocess", "generate", "difficulty", "train", "publish", "slurm")
_stop_signal: int | None = None


def parser(doc: str, *, shards: bool = False) -> argparse.ArgumentParser:
    """The flags that every stage has. `doc`: the script's docstring, shown by --help as it is."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    config_flags(arguments)
    arguments.add_argument("--overwrite", action="store_true", help="make again what is there already")
    if shards:
        arguments.add_argument("--shard", type=int, default=0, metavar="I", help="which part of the work (0)")
        arguments.add_argument("--num-shards", type=int, default=1, metavar="N", help="of how many (1)")
    return arguments


def config_flags(arguments: argparse.ArgumentParser) -> None:
    """--config and --set, for the scripts that have no --overwrite."""
    arguments.add_argument("--config", type=Path, metavar="PATH", help="settings (the repository's config.toml)")
    arguments.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override a setting; repeatable",
    )


def load_config(args: argparse.Namespace):
    """The settings that the arguments name; checks --shard and sets the log level. Raises ConfigError."""
    from common import config
    from common.errors import ConfigError

    num_shards = getattr(args, "num_shards", 1)
    if num_shards < 1:
        raise ConfigError("--num-shards takes a number of shards, 1 or more")
    if not 0 <= getattr(args, "shard", 0) < num_shards:
        raise ConfigError(f"--shard must lie between 0 and --num-shards - 1 = {num_shards - 1}")
    cfg = config.load(args.config, args.set)
    log.setLevel(cfg.logging.level.upper())
    return cfg


def run(main, *, resumable: bool = False) -> None:
    """Run a script's `main` and exit: 0 done, 1 failed, 2 unusable arguments, 85 stopped with all saved.

    An error that a user can cause is told on stderr without a traceback; any other is a bug and shows one.
    `resumable`: the script calls `check_stop` and goes on where it stopped, so SIGTERM and SIGUSR2 end it with 85.
    Others are ended by SIGTERM at once, as any program; SIGUSR2, Slurm's warning before the time limit, leaves
    them the minutes that remain.
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
    """Collect garbage seldom, and not at the end of the process.

    torch and transformers are hundreds of thousands of objects that stay. Looking through them again and again
    while they load, and once more at the end, takes up to a third of the time of a script that does little else.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)  # registered first, so called last


def exit_code_of(main) -> int:
    """Call `main()` and turn what it raises into a message and an exit code."""
    try:
        return main() or 0
    except PipelineError as error:
        first, *rest = str(error).splitlines()
        print("\n       ".join([f"error: {first}", *rest]), file=sys.stderr)
        return error.exit_code
    except Stopped:
        print("stopped by a signal; what is finished is saved, and the next run continues", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("interrupted; finished files are kept", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in _OUR_PACKAGES:
            raise
        print(f"error: the Python package {error.name} is not installed for {sys.executable}", file=sys.stderr)
        print("       run `make install`, then `source .venv/bin/activate`", file=sys.stderr)
        return 1
    except MemoryError:
        print("error: the memory of this machine or job does not suffice", file=sys.stderr)
        print("       --help says what the script needs; on Slurm --mem in slurm.<stage>.sbatch", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        print("error: the device's memory does not suffice", file=sys.stderr)
        print("       free it, make batches or infrastructure.search_memory_mb smaller, or set", file=sys.stderr)
        print("       infrastructure.device to another", file=sys.stderr)
        return 1
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # the reader of our output has gone: `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "the file is larger than is allowed here (ulimit -f)",
            errno.EACCES: "permission denied",
            errno.EROFS: "the file system is read-only",
            errno.EISDIR: "this is a folder, and a file is wanted",
            errno.ENOTDIR: "this is a file, and a folder is wanted",
            errno.EEXIST: "this is a file, and a folder is wanted",
            errno.EIO: "the disk cannot be read or written here",
        }.get(error.errno or 0)
        if advice is None:
            raise
        # of the two of a copy or a renaming, the second is the one that is written
        path = error.filename if error.errno == errno.EIO else error.filename2 or error.filename
        where = f" ({path})" if path else ""
        print(f"error: {advice}{where}", file=sys.stderr)
        print("       mend that and run it again: finished files are kept", file=sys.stderr)
        return 1


def _remember_signal(number, _frame) -> None:
    global _stop_signal
    _stop_signal = number


def stop_requested() -> bool:
    """Whether SIGTERM or SIGUSR2 has arrived: save what is worth saving, then call `check_stop`."""
    return _stop_signal is not None


def check_stop() -> None:
    """Raise Stopped if a signal has asked this run to end. Call it where nothing unfinished is lost."""
    if stop_requested():
        raise Stopped


class Progress:
    """Counts rows in, out and rejected; shows a bar on a terminal, else a line now and then; ends in a summary.

    `total`: how many rows will come in, or None where only the share of the work that is done gets known, by
    `add`. `unit`: what a row is, in the singular.
    """

    def __init__(self, stage: str, unit: str, total: int | None = None, interval_s: float = 30.0):
        self.stage, self.unit, self.total, self.interval_s = stage, unit, total, interval_s
        self.rows_in = self.rows_out = 0
        self.rejected: Counter[str] = Counter()
        self._share = 0.0  # of the work, where `total` is not known
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
        self,
        rows_in: int,
        rows_out: int | None = None,
        rejected: dict[str, int] | None = None,
        share: float | None = None,
    ) -> None:
        """Count rows that are done; `rows_out` defaults to `rows_in`. `share`: of all work, done by now (0..1)."""
        self._share = self._share if share is None else share
        self.rows_in += rows_in
        self.rows_out += rows_in if rows_out is None else rows_out
        self.rejected.update(rejected or {})
        if self._bar is not None:
            if self._share:
                self._bar.total = round(self.rows_in / self._share)  # for its percent and time left
            self._bar.update(rows_in)
        elif time.monotonic() - self._last_line >= self.interval_s:
            self._last_line = time.monotonic()
            print(f"{self.stage}: {self._line()}", file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        rate, per = _rate(self.rows_in, seconds)
        share = self.rows_in / self.total if self.total else self._share
        counted = f"{self.rows_in:,} of {self.total:,}" if self.total else f"{self.rows_in:,}"
        if not (self.total or share):
            return f"{counted} {_plural(self.unit)}, {rate:,.0f}/{per}"
        remaining = seconds * (1 - share) / share if share else float("inf")
        return f"{counted} {_plural(self.unit)} ({share:.0%}), {rate:,.0f}/{per}, {duration(remaining)} left"

    def summary(self, note: str = "") -> int:
        """Print the run's one summary line (with `note` at its end) and return exit code 0."""
        seconds = time.monotonic() - self._started
        parts = [f"{self.rows_in:,} {_plural(self.unit)} in, {self.rows_out:,} out"]
        if self.rejected:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.most_common())
            parts[0] += f", {self.rejected.total():,} rejected ({reasons})"
        rate, per = _rate(self.rows_in, seconds)
        parts.append(f"{duration(seconds)}, {rate:,.0f} {_plural(self.unit)}/{per}")
        if note:
            parts.append(note)
        print(f"{self.stage}: {'; '.join(parts)}", flush=True)
        return 0


def nothing_to_do(stage: str, what: str) -> int:
    """Say that `what` (such as "12 files") is finished already; returns exit code 0."""
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
    """(how many per time, "s"); where that is less than one, per "min" or "h"."""
    rate, per = count / max(seconds, 1e-9), "s"
    for longer in ("min", "h"):
        if 0 < rate < 1:
            rate, per = 60 * rate, longer
    return rate, per


def _plural(unit: str) -> str:
    return unit if unit.endswith("s") else unit + "s"
