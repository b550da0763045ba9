"""The tables behind settings that name a choice: each name that config.toml allows has an entry, and no other."""

from typing import get_args

import pytest
from conftest import ROOT

from common import config, sections
from common.errors import ConfigError
from generate import backbone
from publish.model import modeling_spatial_embeddings
from train import loss
from train.sampling import samplers

TABLES = {
    ("training", "sampler"): samplers.SAMPLERS,
    ("training", "loss"): loss.LOSSES,
    ("embedding_model", "pooling"): modeling_spatial_embeddings.POOLINGS,
}


@pytest.mark.parametrize(("section", "key"), TABLES)
def test_every_name_that_is_allowed_has_an_entry(section, key):
    model = sections.Config.model_fields[section].annotation
    assert set(get_args(model.model_fields[key].annotation)) == set(TABLES[section, key])


@pytest.mark.parametrize("name", [name for name, objective in loss.LOSSES.items() if not objective.uses_triplets])
def test_mining_is_refused_with_a_loss_that_does_not_use_the_negative_of_a_triplet(name):
    with pytest.raises(ConfigError, match=f'mining = "semi_hard" selects a negative .* loss = "{name}"'):
        config.load(None, [f"training.loss={name}", "training.sampler=random", "training.mining=semi_hard"])


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_mining_is_refused_with_the_samplers_that_learn_from_what_it_replaces(sampler):
    settings = ["training.loss=triplet", f"training.sampler={sampler}", "training.mining=semi_hard"]
    if samplers.SAMPLERS[sampler].learns:
        with pytest.raises(ConfigError, match="learns from the negatives"):
            config.load(None, settings)
    else:
        assert config.load(None, settings).training.mining == "semi_hard"


def test_a_name_without_an_entry_is_an_error_that_says_where_it_goes():
    known = f"has no such entry, only {', '.join(loss.LOSSES)}"
    with pytest.raises(ConfigError, match=f'training.loss = "nonesuch": train/loss.py {known}'):
        loss.Loss("nonesuch", 0.1, 0.1, mines=False)
    known = f"has no such entry, only {', '.join(samplers.SAMPLERS)}"
    with pytest.raises(ConfigError, match=f'"nonesuch": train/sampling/samplers.py {known}'):
        samplers.arms_of_step("nonesuch", None, 0, 4)
    settings = config.load().embedding_model.model_copy(update={"pooling": "nonesuch"})
    with pytest.raises(
        ConfigError, match=r'"nonesuch": publish/model/modeling_spatial_embeddings.py has no such entry, only'
    ):
        backbone.check(settings, "dinov2")


def test_a_sampler_and_the_table_of_files_name_files_that_exist():
    for path in ("train/loss.py", "train/sampling/samplers.py", "publish/model/modeling_spatial_embeddings.py"):
        assert (ROOT / path).exists()
