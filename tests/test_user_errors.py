"""What users get wrong: one or two lines on stderr that say what to do, the exit code as documented."""

import importlib
import subprocess

import pytest
from conftest import ROOT

from common import cli, config
from slurm import chain

STAGES = {step.name: step.module.replace(".", "/") + ".py" for step in chain.steps_of(config.load())}
ALL = {
    **STAGES,
    "fetch_best_and_train": "train/fetch_best_and_train.py",
    "optuna_worker": "train/optuna_worker.py",
}


def told(result, code: int) -> str:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 3, result.stderr
    assert lines[0].startswith("error: ")
    return result.stderr


@pytest.mark.parametrize("script", sorted(ALL.values()))
def test_a_missing_input_is_named_with_the_stage_that_makes_it(script, tmp_path, capsys):
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    code = cli.exit_code_of(lambda: main(["--set", f"paths.root={tmp_path}"]))  # here: most import for seconds
    message = told(subprocess.CompletedProcess([], code, stderr=capsys.readouterr().err), code=1)
    assert str(tmp_path) in message


@pytest.mark.parametrize("script", sorted(ALL.values()))
def test_a_misspelt_setting_is_an_error_with_a_suggestion(script, run_script):
    assert "did you mean margin?" in told(run_script(script, "--set", "training.marginn=1"), code=2)


def test_an_unknown_key_in_the_file_is_an_error(run_script, tmp_path):
    text = (ROOT / "config.toml").read_text().replace("margin = 0.1", "margin = 0.1\nmargn = 0.2", 1)
    (tmp_path / "config.toml").write_text(text)
    message = told(run_script("preprocess/process_tar.py", "--config", tmp_path / "config.toml"), code=2)
    assert "[training] margn is not a known key; did you mean margin?" in message


def test_a_missing_tar_directory_an_empty_one_and_an_empty_tar_are_told_apart(run_script, tmp_path):
    def run():
        return told(run_script("preprocess/process_tar.py", "--set", f"paths.root={tmp_path}"), code=1)

    raw = tmp_path / "data" / "raw"
    assert str(raw) in run()
    raw.mkdir(parents=True)
    assert ".tar" in run()
    (raw / "0001.tar").write_bytes(b"")
    assert "0001.tar" in run()


def test_a_compressed_tar_is_refused_by_name(run_script, tmp_path):
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    (raw / "0001.tar").write_bytes(b"\xfd7zXZ\0" + bytes(600))
    message = told(run_script("preprocess/process_tar.py", "--set", f"paths.root={tmp_path}"), code=1)
    assert "decompress" in message
