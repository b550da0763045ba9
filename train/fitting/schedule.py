"""How long a run trains: the steps of an epoch, and the learning rate of each step."""

import math

from common.sections import Training

AUTO_STEPS = (10, 500)  # fewest and most steps of an epoch with training.steps_per_epoch = "auto"


def steps_per_epoch(training: Training, num_images: int) -> int:
    """training.steps_per_epoch; with "auto" as many anchors as there are training images, within AUTO_STEPS.

    Validation follows each epoch. So an epoch must be short where there are few images, each of which the head
    would otherwise have seen hundreds of times before its first validation.
    """
    if training.steps_per_epoch != "auto":
        return training.steps_per_epoch
    fewest, most = AUTO_STEPS
    return min(max(math.ceil(num_images / training.batch_size), fewest), most)


def learning_rate_factor(training: Training, step: int, total_steps: int) -> float:
    """Linear warm-up over training.warmup_steps, at most a tenth of all steps; then cosine decay to 0."""
    warmup_steps = min(training.warmup_steps, total_steps // 10)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
