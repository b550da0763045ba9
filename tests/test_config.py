"""common/config.py: strict loading. Every mistake a user can make is told by section, key and remedy."""

import re

import pytest
import tomli

from common import config
from common.errors import ConfigError


@pytest.fixture
def write_config(tmp_path):
    """config.toml with some text replaced, in a folder of its own."""

    def write(*replacements):
        text = config.DEFAULT_PATH.read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write


def test_the_repositorys_config_loads_and_its_paths_are_absolute_and_under_root():
    cfg = config.load()
    assert cfg.paths.raw_dir == config.DEFAULT_PATH.parent / "data" / "raw"
    assert cfg.data.num_bands == len(cfg.data.band_percentiles) + 1


def test_every_key_of_config_toml_has_a_comment():
    text = config.DEFAULT_PATH.read_text()
    for section in ("global", "embedding_model", "data", "training_model", "infrastructure", "logging"):
        body = text.split(f"[{section}]")[1].split("\n[")[0]
        uncommented = [line for line in body.splitlines() if re.match(r"\w+ = ", line) and "#" not in line]
        assert not uncommented


def test_all_mistakes_of_a_file_are_shown_at_once(write_config):
    path = write_config(
        ("margin = 0.1 ", "margn = 0.1 "), ("neighbors = 150", "neighbors = 999"), ("seed = 0", "seed = -1")
    )
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    message = str(caught.value)
    assert "[training] margn is not a known key; did you mean margin?" in message
    assert "[training] margin is missing" in message
    assert "[data] neighbors" in message
    assert "255" in message
    assert "[global] seed" in message


def test_an_unknown_section_and_a_missing_one_are_named(write_config):
    with pytest.raises(ConfigError) as caught:
        config.load(write_config(("[logging]", "[loging]")))
    assert "[logging] is missing" in str(caught.value)
    assert "did you mean logging?" in str(caught.value)


def test_set_overrides_with_toml_values_and_plain_strings():
    cfg = config.load(
        None,
        [
            "training.margin=0.25",
            "data.split_by=building",
            "data.band_percentiles=[10, 50]",
            "paths.root=/scratch/me",
        ],
    )
    assert (cfg.training.margin, cfg.data.split_by, cfg.data.num_bands) == (0.25, "building", 3)
    assert str(cfg.paths.merged_dir) == "/scratch/me/data/dinov2-base-cls-1-0.5/merged"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.marginn=1", "did you mean margin?"),
        ("trainin.margin=1", "did you mean training?"),
        ("training.margin", "--set section.key=value"),
        ("margin=1", "--set section.key=value"),
        ("training.margin=wide", "invalid --set value:\n[training] margin: "),
        ("slurm.train.sbatch=[1]", "invalid --set value:\n"),
        ("data.train_ratio=0.5", "invalid --set value:\n"),
        ("data.train_ratio=0.5", "must be 1"),
        ("training.bandit_groups=100000", "exceeds batch_size"),
        ("tuning.search_space.marginn=[0, 1]", "did you mean margin?"),
        ("tuning.search_space.bandit_exploration=[0, 2, 'log']", "must be above 0"),  # Optuna has no such range
        ("tuning.search_space.margin=[0.5, 0.1]", "margin: the lower end 0.5 is not below 0.1"),
        ("tuning.search_space.run=['a', 'b']", "[tuning.search_space] run must be [low, high]"),
        ("tuning.search_space.seed=[0, 9]", "seed is the same for all trials"),
        ("embedding_model.name=./nowhere", "no such folder"),
        ("embedding_model.views=[]", "[embedding_model] views: List should have at least 1 item"),
        ("embedding_model.views=[1, 1.5]", "[embedding_model.views] 1: Input should be less than or equal to 1"),
        (
            "embedding_model.views=[0.2]",
            "[embedding_model.views] 0: Input should be greater than",
        ),
        ("embedding_model.views=[0.5, 0.5]", "[embedding_model] views: each view must be named once"),
        ("data.split_cell_m=inf", "[data] split_cell_m: Input should be a finite number"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(override, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        config.load(None, [override])


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("training.mining=semihard", "semi_hard"),
        ("training.loss=info_nce", "infonce"),
        ("evaluation.gallery=al", "all"),
    ],
)
def test_a_misspelt_value_is_an_error_with_a_suggestion(override, meant):
    with pytest.raises(ConfigError, match=rf"did you mean {meant}\?"):
        config.load(None, [override])


def test_the_order_of_views_does_not_matter():
    assert config.load(None, ["embedding_model.views=[0.5, 1]"]).embedding_model.views == [1, 0.5]


def test_mistakes_of_a_file_are_the_files_whatever_the_command_line_says(write_config):
    path = write_config(('pooling = "cls"', 'pooling = "max"'))
    with pytest.raises(ConfigError) as caught:
        config.load(path, ["training.margin=wide"])
    first, *others = str(caught.value).splitlines()
    assert first == f"{path} is not a valid configuration:"
    assert [line.partition(":")[0] for line in others] == ["[embedding_model] pooling", "[training] margin"]


@pytest.mark.parametrize("value", ["0.3", "[1]", "{choices=[]}", "['a', 'b']", "{choises=[1]}"])
def test_a_dimension_of_the_search_space_that_cannot_be_read_is_told_once_with_its_forms(value):
    with pytest.raises(ConfigError) as caught:
        config.load(None, [f"tuning.search_space.margin={value}"])
    [_, line] = str(caught.value).splitlines()  # not once for each form, in pydantic's words
    assert line == '[tuning.search_space] margin must be [low, high], [low, high, "log"] or { choices = [...] }'


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        config.load(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[global\nseed")
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load(tmp_path / "broken.toml")


def test_values_are_those_of_the_file():
    plain = tomli.loads(config.DEFAULT_PATH.read_text())
    chosen = config.values(config.load(), "global.seed", "training_model")
    assert chosen == {
        "global.seed": plain["global"]["seed"],
        **{f"training_model.{key}": value for key, value in plain["training_model"].items()},
    }


def test_a_model_folder_beside_the_config_becomes_an_absolute_path(write_config, tmp_path):
    path = write_config(('name = "facebook/dinov2-base"', 'name = "models/mine"'))
    assert not config.is_folder(config.load(path).embedding_model.name)  # no such folder: a name on the hub
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert config.load(path).embedding_model.name == str(tmp_path / "models" / "mine")


@pytest.mark.parametrize("name", ["2024", "2024-05-01", "true", "seed1"])
def test_a_name_may_look_like_another_type(name):
    assert config.load(None, [f"training.run={name}"]).training.run == name
    assert config.load(None, [f'training.run="{name}"']).training.run == name


@pytest.mark.parametrize("name", ["..", ".", "a/b", "", "a" * 300])
def test_a_run_stays_in_its_own_folder(name):
    with pytest.raises(ConfigError, match="run"):
        config.load(None, [f"training.run={name}"])


@pytest.mark.parametrize("setting", ["global.seed", "training.seed"])
def test_a_seed_is_one_that_all_generators_take(setting):
    config.load(None, [f"{setting}={2**32 - 1}"])
    with pytest.raises(ConfigError, match="seed: Input should be less than 4294967296"):
        config.load(None, [f"{setting}={2**32}"])


def test_a_byte_order_mark_is_passed_over(write_config):
    path = write_config()
    before = config.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert config.load(path) == before


@pytest.mark.parametrize(
    "storage",
    [
        *(
            "postgresql://me:geheim@host/db",
            "postgresql://me:ge%2Fheim@host/db",
            "postgresql://me:ge/heim@host/db",
        ),
        *("postgresql+psycopg2://host/db?user=me&password=geheim", "postgresql://host/db?sslpassword=geheim"),
        *("mysql://me:geheim@host/db", "postgresql://me:geheim@host:port/db", "me:geheim@host"),
    ],
)
def test_a_password_in_the_settings_is_refused_and_not_repeated(storage, write_config):
    written = write_config(('study_storage = "journal"', f'study_storage = "{storage}"'))
    for path, overrides in ((None, [f"tuning.study_storage={storage}"]), (written, [])):
        with pytest.raises(ConfigError, match=r"\[tuning\] study_storage: .*(PGPASSWORD|must be)") as told:
            config.load(path, overrides)
        assert "heim" not in str(told.value)


def test_a_database_without_a_password_is_taken():
    for storage in ("postgresql://me@host/db", "postgresql://host/db?host=/run/pg&passfile=/home/me/other"):
        assert config.load(None, [f"tuning.study_storage={storage}"]).tuning.study_storage == storage
