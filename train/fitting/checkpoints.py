"""The files of a run: checkpoints to evaluate, publish and resume from, and its history."""

import io
from pathlib import Path

import numpy as np
import torch

from common import files, parquet
from common.provenance import Provenance, digest_of
from common.sections import Config
from train import run_record
from train.evaluation import heads
from train.fitting import history

NAMES = (run_record.BEST, run_record.LAST, run_record.HISTORY, "curves.png", "bad_batch.pt")


def existing(run_dir: Path, record: Provenance) -> dict | None:
    """The content of checkpoint_last.pt, or None; a lone checkpoint_best.pt cannot be resumed, and is replaced.

    Raises StaleArtefact if either was made with other settings or inputs than `record`.
    """
    for name in (run_record.LAST, run_record.BEST):
        path = run_dir / name
        if path.exists():
            saved = heads.load_checkpoint(path)
            parquet.refuse_stale(path, Provenance(**saved["provenance"]), record, f"{saved['epoch']} epochs")
            return saved if "resume" in saved else None
    return None


def restore(run, saved: dict) -> None:
    """Restore a fresh `fit.Run` from a checkpoint."""
    state = saved["resume"]
    run.head.load_state_dict(saved["head"])
    run.loss.load_state_dict(state["loss"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.bandit.load_state_dict(state["bandit"])
    run.sums, run.mined_with = np.array(state["sums"]), state["mined_with"]
    run.arms = None if state["arms"] is None else np.array(state["arms"])
    run.step, run.history, run.timings, run.best = (state[key] for key in ("step", "history", "timings", "best"))


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

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        if self.run_dir is not None:
            for name in NAMES:
                (self.run_dir / name).unlink(missing_ok=True)

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
        state = {name: tensor.detach().cpu() for name, tensor in run.head.state_dict().items()}
        row = run.history[-1]
        metrics = {"map@r": row["val_map_at_r"], "recall@1": row["val_recall_at_1"]}
        last = self._checkpoint(row["epoch"], metrics, state)
        last["resume"] = {
            "step": run.step,
            "loss": run.loss.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "bandit": run.bandit.state_dict(),
            "sums": run.sums.tolist(),
            "mined_with": run.mined_with,
            "arms": None if run.arms is None else run.arms.tolist(),
            "history": run.history,
            "timings": run.timings,
            "best": run.best,
            "finished": finished,
        }
        write(self.run_dir / run_record.LAST, last)
        facts = {"finished": finished, "best_checkpoint": best["provenance"]["id"]}
        history.write(self.run_dir / run_record.HISTORY, frame, self.record, facts)

    def _checkpoint(self, epoch: int, metrics: dict, head: dict[str, torch.Tensor]) -> dict:
        settings, whitening = self.cfg.training_model, self.data.baselines["whitening"]
        content = [name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(head.items())]
        finished = self.record.finished(digest_of(*content), {"epochs": epoch})
        return {
            "head": head,
            "input_dim": self.data.train.embeddings.shape[1],
            "hidden_dim": settings.hidden_dim,
            "output_dim": settings.output_dim,
            "dropout": settings.dropout,
            "epoch": epoch,
            "metrics": {
                **metrics,
                "whitening": whitening["validation"],
                "whitening_shrinkage": whitening["shrinkage"],
            },
            "config": self.record.config,
            "embedding_model": self.data.embedding_model,
            "baselines": self.data.baselines,
            "provenance": finished.to_dict(),
        }
