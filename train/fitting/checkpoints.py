"""The files of a run: checkpoints to evaluate, publish and resume from, and its history."""

import contextlib
import io
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from common import errors, files, parquet
from common.errors import PipelineError
from common.provenance import Provenance, Redo, differences, digest_of
from common.sections import Config
from publish.model.projection_head import ProjectionHead
from train import run_record
from train.evaluation import heads
from train.fitting import history

log = logging.getLogger("pipeline")

NAMES = (run_record.LAST, run_record.HISTORY, "curves.png", "bad_batch.pt", run_record.BEST)
_WITH_STATE = ("loss", "optimizer", "bandit")  # attributes of a Run that are saved by state_dict()
_PLAIN = ("step", "mined_with", "history", "timings", "best")  # and those that are saved as they are


def existing(run_dir: Path, record: Provenance, redo: Redo) -> dict | None:
    """The content of checkpoint_last.pt, if it can be resumed; a lone checkpoint_best.pt cannot, and is replaced.
    Raises StaleArtefact if either was made with other settings or inputs than `record`, unless `redo` allows to
    begin anew. If the run in former/ matches, it is put back instead: its successor has not finished."""
    if redo == "all":
        return None
    former = run_dir / files.FORMER / run_record.LAST
    replaced = _matching(former, record)
    paths = [run_dir / run_record.LAST, run_dir / run_record.BEST, *([] if replaced else [former])]
    if path := next(filter(Path.exists, paths), None):
        try:
            saved = heads.load_checkpoint(path)
        except PipelineError as error:
            if not redo:
                advice = f"to train again: {errors.command('', '--remake')}"
                raise PipelineError(f"{str(error).splitlines()[0]}\n{advice}") from None
        else:
            made, amount = Provenance.from_dict(saved["provenance"]), f"{saved['epoch']} epochs"
            amount = f"from {run_dir / files.FORMER}, which matches" if replaced else amount
            if parquet.matches(path, made, record, redo, amount) and "resume" in saved:
                return saved
    if replaced:
        _put_back(run_dir)
    return replaced


def _matching(path: Path, record: Provenance) -> dict | None:
    """The content of a checkpoint if it exists and was made as `record` says."""
    try:
        saved = heads.load_checkpoint(path)
    except PipelineError:
        return None
    return None if differences(Provenance.from_dict(saved["provenance"]), record) else saved


def set_aside(run_dir: Path) -> None:
    """Move a run's files to former/, until the one that begins has finished: see `RunFolder.save`. Those of a run
    that a restart has interrupted are removed instead."""
    former = run_dir / files.FORMER
    with contextlib.suppress(PipelineError):
        if run_record.finished(run_dir / run_record.HISTORY):  # and only then died, before it could remove former/
            shutil.rmtree(former, ignore_errors=True)
    keep = not (former / run_record.BEST).exists()  # which is moved last
    for name in NAMES:
        if keep and (run_dir / name).exists():
            former.mkdir(exist_ok=True)
            os.replace(run_dir / name, former / name)
        (run_dir / name).unlink(missing_ok=True)


def _put_back(run_dir: Path) -> None:
    """Move the files in former/ back, over those of the run that was to replace them."""
    former = run_dir / files.FORMER
    for name in NAMES:
        (run_dir / name).unlink(missing_ok=True)
    for name in reversed(NAMES):  # by the last of these it is known that some are left
        if (former / name).exists():
            os.replace(former / name, run_dir / name)
    with contextlib.suppress(OSError):  # something else is in it
        former.rmdir()
    log.info("%s: the run in former/ matches and is put back", run_dir)


def restore(run, saved: dict) -> None:
    """Restore a fresh `fit.Run` from a checkpoint."""
    state = saved["resume"]
    run.head.load_state_dict(saved["head"])
    for name in _WITH_STATE:
        getattr(run, name).load_state_dict(state[name])
    for name in _PLAIN:
        setattr(run, name, state[name])
    run.sums = np.array(state["sums"])
    run.arms = None if state["arms"] is None else np.array(state["arms"])


def weights_of(head: ProjectionHead) -> dict[str, torch.Tensor]:
    """A copy of the head's state, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()}


def write(path: Path, content: dict) -> None:
    """Save a dict of tensors and plain values, atomically."""
    buffer = io.BytesIO()  # on a full disk, torch.save would replace the error by one of its own
    torch.save(content, buffer)
    with files.atomic(path) as file:
        file.write(buffer.getbuffer())


class RunFolder:
    """The folder of a run; nothing is written if it has none."""

    def __init__(self, cfg: Config, data, record: Provenance, run_dir: Path | None):
        self.cfg, self.data, self.record, self.run_dir = cfg, data, record, run_dir

    def best(self, run) -> dict:
        """The content of checkpoint_best.pt."""
        return self._checkpoint(**run.best)

    def save(self, run, finished: bool) -> None:
        """Write everything. A run resumes from checkpoint_last.pt and rewrites the rest; the history comes last,
        since its record says whether the run is complete."""
        if self.run_dir is None:
            return
        frame, best = history.frame(run.history, run.timings), self.best(run)
        if finished:
            history.draw(self.run_dir / "curves.png", frame)
        write(self.run_dir / run_record.BEST, best)
        row = run.history[-1]
        metrics = {"map@r": row["val_map_at_r"], "recall@1": row["val_recall_at_1"]}
        last = self._checkpoint(row["epoch"], metrics, weights_of(run.head))
        last["resume"] = {
            **{name: getattr(run, name).state_dict() for name in _WITH_STATE},
            **{name: getattr(run, name) for name in _PLAIN},
            "sums": run.sums.tolist(),
            "arms": None if run.arms is None else run.arms.tolist(),
            "finished": finished,
        }
        write(self.run_dir / run_record.LAST, last)
        facts = {"finished": finished, "best_checkpoint": best["provenance"]["id"]}
        seconds = sum(times["seconds"] for times in run.timings)
        history.write(self.run_dir / run_record.HISTORY, frame, self.record.timed(seconds), facts)
        if finished:
            shutil.rmtree(self.run_dir / files.FORMER, ignore_errors=True)

    def _checkpoint(self, epoch: int, metrics: dict, head: dict[str, torch.Tensor]) -> dict:
        settings, whitening = self.cfg.training_model, self.data.baselines["whitening"]
        metrics = {**metrics, "whitening": whitening["validation"], "whitening_shrinkage": whitening["shrinkage"]}
        content = [name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(head.items())]
        finished = self.record.finished(digest_of(*content), {"epochs": epoch})
        return {
            "head": head,
            "input_dim": self.data.train.embeddings.shape[1],
            **settings.model_dump(include={"hidden_dim", "output_dim", "dropout"}),
            "epoch": epoch,
            "metrics": metrics,
            "config": self.record.config,
            "embedding_model": self.data.embedding_model,
            "baselines": self.data.baselines,
            "provenance": finished.to_dict(),
        }
