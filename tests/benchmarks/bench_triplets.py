"""Triplets per second of training: drawing, forward, loss, backward and step, against a DataLoader.

The other way is that of spatial-building-embeddings, the nearest relative of this pipeline: a Dataset that draws
one triplet in Python (the neighbours of an anchor sorted into bands, UCB over the bands, a building of the band,
then an image of it) and a DataLoader that joins them, in-process or with two workers: the faster of the two is the
baseline. Both train the same head with the triplet loss, with the bands and the batch of config.toml.

In float32 the products alone, at the rate of a large matrix product, take three quarters of our step. bfloat16 is
measured where the processor is fast at it.

Command  python tests/benchmarks/bench_triplets.py [--json PATH]
"""

import math
import statistics
from collections import defaultdict

import numpy as np
import timing  # before what lies in the repository: it puts that on the path
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

from common import config, sections
from publish.model.projection_head import ProjectionHead
from train import datasets
from train.fitting import fit
from train.sampling import samplers

ROWS, DIM, VIEWS, PANORAMAS = 100_000, 768, 4, 30_000
STEPS, ROUNDS = 16, 5
CPU = torch.device("cpu")
SETTINGS = ["training.loss=triplet", "training_model.hidden_dim=512", "training_model.output_dim=256"]


def make_data(
    cfg: sections.Config, num_rows: int = ROWS, device: torch.device = CPU
) -> tuple[datasets.TrainingData, dict[str, np.ndarray]]:
    """Random embeddings and neighbours of buildings 40 m apart, as training holds them and as arrays."""
    rng = np.random.default_rng(0)
    building = np.arange(num_rows) // VIEWS
    k, bands = cfg.data.neighbors, cfg.data.num_bands
    arrays = {
        "embeddings": rng.standard_normal((num_rows, DIM), np.float32).astype(np.float16),
        "neighbors": rng.integers(0, num_rows, (num_rows, k), np.int32),
        "offsets": np.tile(np.linspace(0, k, bands + 1).astype(np.uint8), (num_rows, 1)),
        "building_of_row": building,
    }
    columns = {
        "street_view_id": rng.integers(0, PANORAMAS, num_rows),
        "target_lat": building * 40 / 111_195,
        "target_lon": np.zeros(num_rows),
    }
    rows = datasets.make_rows(**arrays, columns=columns, radius_m=cfg.data.ignore_radius_m, device=device)
    torch.manual_seed(0)
    whitening = {
        "mean": torch.zeros(DIM),
        "projection": torch.linalg.qr(torch.randn(DIM, cfg.training_model.output_dim))[0].T,
        "spread": 1.0,
    }
    data = datasets.TrainingData(rows, None, {"whitening": whitening}, {}, {})
    return data, arrays


class Ours:
    """The steps of a run, as `fit.fit` takes them."""

    def __init__(self, cfg: sections.Config, data: datasets.TrainingData):
        self.cfg, self.data, self.run = cfg, data, fit.start(cfg, data)
        self.feed = fit.make_feed(cfg, data, self.run)

    def train(self, steps: int = STEPS) -> None:
        for _ in range(steps):
            fit.train_step(self.cfg, self.data, self.run, self.feed, None)

    def draw(self) -> None:
        """What `train` does before the gather of the embeddings."""
        training = self.cfg.training
        for step in range(STEPS):
            arms = samplers.arms_of_step("ucb", self.run.bandit, step, training.bandit_groups)
            self.feed.sampler.draw(step, arms)


class Triplets(Dataset):
    """One triplet at a time, out of lists and dicts."""

    def __init__(self, cfg: sections.Config, arrays: dict[str, np.ndarray]):
        self.embeddings = torch.from_numpy(arrays["embeddings"]).float()
        building_of_row, offsets = arrays["building_of_row"], arrays["offsets"][0].astype(int)
        names = np.array([f"0088_{number}" for number in range(building_of_row[-1] + 1)], object)
        self.neighbors_of = names[building_of_row[arrays["neighbors"]]].tolist()  # buildings, of each row
        self.bands_of = [np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)).tolist()] * ROWS
        self.rows_of = dict(zip(names, np.arange(ROWS).reshape(-1, VIEWS), strict=True))
        self.buildings, self.rng = names, np.random.default_rng(1)
        self.exploration = cfg.training.bandit_exploration
        self.draws, self.means = defaultdict(int), defaultdict(float)  # by band

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, _) -> tuple:
        building = self.buildings[self.rng.integers(len(self.buildings))]
        anchor, positive = map(int, self.rng.choice(self.rows_of[building], size=2, replace=False))
        negative, band = self.negative_of(anchor)
        rows = anchor, positive, negative
        return (*rows, *(self.embeddings[row] for row in rows), band)

    def negative_of(self, anchor: int) -> tuple[int, int]:
        """(an image of one of the anchor's neighbours in the band that UCB chooses, the band)."""
        by_band = defaultdict(list)
        for neighbor, band in zip(self.neighbors_of[anchor], self.bands_of[anchor], strict=True):
            by_band[band].append(neighbor)
        total = math.log(max(1, sum(self.draws.values())))
        bounds = {
            band: self.means[band] + self.exploration * math.sqrt(total / self.draws[band])
            if self.draws[band]
            else math.inf
            for band in by_band
        }
        band = max(bounds, key=bounds.__getitem__)
        there = [neighbor for neighbor in by_band[band] if neighbor in self.rows_of]
        return int(self.rng.choice(self.rows_of[self.rng.choice(there)])), band

    def reward(self, band: int, value: float) -> None:
        self.draws[band] += 1
        self.means[band] += (value - self.means[band]) / self.draws[band]


class Theirs:
    """The same head trained on what a DataLoader brings."""

    def __init__(self, cfg: sections.Config, arrays: dict[str, np.ndarray], workers: int):
        model = cfg.training_model
        self.margin = cfg.training.margin
        self.head = ProjectionHead(DIM, model.hidden_dim, model.output_dim, model.dropout).train()
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=cfg.training.learning_rate)
        self.data = Triplets(cfg, arrays)
        self.batches = DataLoader(
            self.data,
            cfg.training.batch_size,
            sampler=RandomSampler(self.data, num_samples=STEPS * cfg.training.batch_size),
            num_workers=workers,
            persistent_workers=workers > 0,  # they start once, before the first round is timed, and then wait
        )

    def train(self) -> None:
        for *_, anchors, positives, negatives, bands in self.batches:
            anchors, positives, negatives = (self.head(side) for side in (anchors, positives, negatives))
            s_ap, s_an = (anchors * positives).sum(dim=1), (anchors * negatives).sum(dim=1)
            losses = F.relu(s_an - s_ap + self.margin)
            self.optimizer.zero_grad()
            losses.mean().backward()
            self.optimizer.step()
            for band, loss in zip(bands, losses, strict=True):
                self.data.reward(band.item(), -loss.item())


def measure() -> list[timing.Ratio]:
    """Ratios of the times of a few steps."""
    cfg = config.load(None, SETTINGS)
    data, arrays = make_data(cfg)
    targets = {"float32": 2.0, "bfloat16": 3.5}
    if not torch.cpu._is_avx512_bf16_supported():
        del targets["bfloat16"]
    ours = {dtype: Ours(config.load(None, [*SETTINGS, f"training.dtype={dtype}"]), data) for dtype in targets}
    best_dtype = list(ours)[-1]
    default = config.load(None, [*SETTINGS, "training.loss=infonce"])
    loaders = {f"DataLoader, {workers} workers": Theirs(cfg, arrays, workers) for workers in (0, 2)}
    ways = {**ours, "InfoNCE": Ours(default, data), **loaders}
    taken = timing.seconds(
        {"draw": ours[best_dtype].draw} | {name: way.train for name, way in ways.items()}, ROUNDS
    )

    best = min(loaders, key=lambda name: statistics.median(taken[name]))
    items = {"items": STEPS * cfg.training.batch_size, "unit": "triplets/s"}
    size, step = f"{DIM} to {cfg.training_model.output_dim}", f"the step, {best_dtype}"
    taken[step] = taken[best_dtype]
    return [
        *(
            timing.ratio(f"training, triplet loss, {size}, {dtype}", taken, dtype, best, target=target, **items)
            for dtype, target in targets.items()
        ),
        timing.ratio(f"training, InfoNCE (the default), {size}, float32", taken, "InfoNCE", best, **items),
        timing.ratio("drawing its triplets", taken, "draw", step, target=20, **items),
    ]


if __name__ == "__main__":
    timing.main(__doc__, measure)
