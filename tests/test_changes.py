"""A finished chain is changed (a setting, a tar, a file) and `submit.py --local` is run again: it makes what is
missing, or says what is stale with a command that, run as printed, leads to the right artefacts.

The stages run in this process: most of them import for longer than they work here.
"""

import contextlib
import gzip
import importlib
import io
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import warm
from local_backbone import write_local_backbone
from same_artefacts import assert_same_artefacts
from synthetic import write_dataset

from common import cli, config, errors, parquet
from slurm import chain, local, submit

SETTINGS = (
    *("embedding_model.pooling=mean", "data.rows_per_part=20", "data.split_cell_m=300", "data.neighbors=20"),
    *("data.train_ratio=0.5", "data.val_ratio=0.25", "data.test_ratio=0.25", "training_model.output_dim=64"),
    *("infrastructure.embedding_batch_size=16", "paths.raw_dir=../raw", "slurm.num_shards=2"),
    "embedding_model.label=fixed",  # else another pooling has folders of its own, and nothing is stale
)
THIRD = "0090.tar"
pytestmark = pytest.mark.timeout(300)


class StageHere:
    """A stage's command, run in this process, in place of `subprocess.Popen`."""

    def __init__(self, command: list[str], **_):
        script = Path(command[1]).relative_to(Path(__file__).resolve().parents[1])
        main = importlib.import_module(".".join(script.with_suffix("").parts)).main
        with mock.patch.object(sys, "argv", command[1:]):  # messages repeat it
            self.returncode = cli.exit_code_of(lambda: main(command[2:]))

    def poll(self) -> int:
        return self.returncode


class Place:
    """A folder with tars and what the chain has made of them."""

    def __init__(self, folder: Path, backbone: Path, monkeypatch, to: str = "compute_visual_neighbors"):
        self.root, self.raw, self.to, self.monkeypatch = folder / "run", folder / "raw", to, monkeypatch
        settings = (*SETTINGS, f"paths.root={self.root}", f"embedding_model.name={backbone}")
        self.flags = [word for setting in settings for word in ("--set", setting)] + ["--to", to]
        self.paths = config.load(None, settings).paths

    def folder(self, name: str) -> Path:
        """That of "merged", for instance."""
        return getattr(self.paths, f"{name}_dir")

    def relative(self, *names: str) -> list[str]:
        """The folders below `root`."""
        return [str(self.folder(name).relative_to(self.root)) for name in names]

    def run(self, *more: str) -> tuple[int, str]:
        """`submit.py` with these flags: its exit code and what it and the stages say."""
        return self.run_words(["slurm/submit.py", *self.flags, *more])

    def run_words(self, words: list[str]) -> tuple[int, str]:
        told = io.StringIO()
        self.monkeypatch.setattr(sys, "argv", words)
        self.monkeypatch.setattr(local, "subprocess", SimpleNamespace(Popen=StageHere))
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = cli.exit_code_of(lambda: submit.main(words[1:]))
        return code, told.getvalue()

    def follow(self, *more: str) -> list[str]:
        """Run `submit.py --local`, and what it prints as it is printed, until it succeeds; the messages."""
        words, messages = ["slurm/submit.py", *self.flags, "--local", *more], []
        for _ in range(4):
            code, told = self.run_words(words)
            if code == 0:
                return messages
            messages.append(told)
            removal = re.search(r"rm /.*", told)
            again = re.search(r"python (\S*slurm/submit\.py .*--remake .*)", told)
            if again:
                words = shlex.split(again[1])
            elif removal:
                subprocess.run(["bash", "-c", removal[0]], check=True)
            else:
                raise AssertionError(f"no command to run: {told}")
        raise AssertionError("the printed commands lead nowhere:\n" + "\n".join(messages))

    def written(self) -> dict[Path, int]:
        """When each file was written."""
        files = (path for path in self.root.rglob("*") if path.is_file() and "logs" not in path.parts)
        return {path.relative_to(self.root): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Finished chains, to copy: of "two" tars, of these and a third, made at once ("three"), and the backbone."""
    folder = tmp_path_factory.mktemp("chains")
    write_local_backbone(folder / "backbone")
    write_dataset(folder / "three" / "raw", streets=9, cities=3, image_px=80, facades_per_street=5)
    shutil.copytree(folder / "three" / "raw", folder / "two" / "raw", ignore=shutil.ignore_patterns(THIRD))
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("two", "three"):
            code, told = Place(folder / name, folder / "backbone", monkeypatch).run("--local")
            assert code == 0, told
    return folder


@pytest.fixture
def copy(chains, tmp_path, monkeypatch):
    """`copy("two")`: a copy of a chain, where it may be changed."""

    def make(source: str, name: str = "copy", **options) -> Place:
        shutil.copytree(chains / source, tmp_path / name)
        return Place(tmp_path / name, chains / "backbone", monkeypatch, **options)

    return make


def add_third_tar(place: Place, chains: Path) -> None:
    shutil.copy2(chains / "three" / "raw" / THIRD, place.raw / THIRD)


def test_a_further_tar_is_explained_before_anything_runs_and_remake_takes_it_in(copy, chains):
    place = copy("two")
    add_third_tar(place, chains)
    before = place.written()
    code, told = place.run("--local")
    assert code == 1
    assert "merge_and_split is stale (made on 20" in told
    assert "it was made from 2 tars; there are 3 now: 0090 came" in told
    assert re.search(
        r"merge_and_split \(\d+ images, [\d.]+ s\); after it, summarize_ids .*, compute_visual_n", told
    )
    assert "restore" not in told  # nothing can be restored: no setting has changed
    assert place.written() == before

    assert place.follow() == [told]
    assert_same_artefacts(place.root, chains / "three" / "run", folders=("data",))
    after = place.written()
    kept = [path for path in before if re.search(r"/00(88|89)", str(path)) and "difficulty" not in str(path)]
    assert len(kept) >= 8
    assert all(after[path] == before[path] for path in kept)
    code, told = place.run("--local")
    assert (code, told[:13]) == (0, "nothing to do")


def test_on_slurm_a_stale_step_is_refused_before_the_first_job_and_its_jobs_get_the_flag(copy, chains, clients):
    place = copy("two")
    add_third_tar(place, chains)
    clients(
        sbatch=f"echo >> {place.root}/calls; wc -l < {place.root}/calls",
        squeue="true",
        scontrol="echo 'MaxArraySize = 1001'",
    )
    code, plan = place.run("--dry-run")
    assert code == 0
    assert re.search("^merge_and_split +stale +after", plan, re.MULTILINE)
    assert re.search("^summarize_ids +follows merge_and_split +after", plan, re.MULTILINE)
    code, told = place.run()
    assert code == 1
    assert "merge_and_split is stale" in told
    assert not (place.root / "calls").exists()

    command = re.search("^to redo what is stale: python (.*)", plan, re.MULTILINE)[1]
    assert "--dry-run" not in command
    code, told = place.run_words([*shlex.split(command), "--dry-run"])
    assert re.search("^merge_and_split +stale, to be remade +after", told, re.MULTILINE)
    lines = [line for line in told.splitlines() if line.startswith("sbatch")]
    flagged = [re.search(r"/(\w+)\.py", line)[1] for line in lines if " --remake " in line]
    assert flagged == ["merge_and_split", "summarize_ids", "compute_visual_neighbors"]
    assert len(lines) == 6
    code, told = place.run_words(shlex.split(command))
    assert code == 0, told
    (record,) = (place.root / "logs" / "runs").glob("*/run.json")
    steps = chain.steps_of_record(json.loads(record.read_text()), config.load())  # of --continue
    assert [step.name for step in steps if chain.REMAKE in step.operands][:2] == [
        "merge_and_split",
        "summarize_ids",
    ]


def test_a_neighbour_search_in_parts_is_remade_as_a_whole(copy):
    place, flags = copy("two"), ("--dry-run", "--set", "slurm.difficulty_shards=2", "--set", "data.neighbors=15")
    code, plan = place.run(*flags)
    assert code == 0
    assert re.search(r"^neighbor_parts +stale \(2 of 2 tasks\) +after", plan, re.MULTILINE)
    assert re.search("^compute_visual_neighbors +follows neighbor_parts +after", plan, re.MULTILINE)
    assert plan.endswith(" --remake neighbor_parts\n")
    code, plan = place.run(*flags, "--remake", "compute_visual_neighbors")
    assert re.search(r"^neighbor_parts +stale \(2 of 2 tasks\), to be remade +after", plan, re.MULTILINE)
    assert len(re.findall("^sbatch .*compute_visual_neighbors.py --remake ", plan, re.MULTILINE)) == 2


def test_a_run_that_is_killed_while_it_remakes_goes_on_where_it_was(copy, monkeypatch):
    """generate_embeddings dies by SIGKILL between two of its parts; then the same command is run again."""
    place = copy("two", to="merge_and_split")
    flags = ("--local", "--remake", "generate_embeddings", "--set", "embedding_model.views=[1.0]")
    parts = sorted(place.folder("embeddings").glob("*.parquet"))
    former = {part: part.stat().st_mtime_ns for part in parts}

    class Victim:
        def __init__(self, command, **_):
            process = warm.Warm(command[1], *command[2:], lingers=True)
            while process.process.is_alive() and parts[0].stat().st_mtime_ns == former[parts[0]]:
                time.sleep(0.002)
            process.process.kill()
            self.returncode = process.finish().returncode

        def poll(self):
            return self.returncode

    monkeypatch.setattr("test_changes.StageHere", Victim)
    code, told = place.run(*flags)
    assert code == 1
    assert "the chain stopped at generate_embeddings" in told
    remade = {part: part.stat().st_mtime_ns for part in parts if part.stat().st_mtime_ns != former[part]}
    monkeypatch.undo()
    assert remade.keys() < set(parts)
    for step in ("generate_embeddings", "merge_and_split"):  # the mixture is not taken for whole
        code, told = place.run("--local", *flags[3:], "--from", step)
        assert code == 1
        assert "generate_embeddings is stale" in told
    code, told = place.run(*flags)
    assert code == 0, told
    assert all(part.stat().st_mtime_ns == when for part, when in remade.items())
    assert place.run(*flags)[1].startswith("nothing to do")


def remove(place: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(place.glob("*.parquet")))
    path.unlink()
    return path.name


def damage(place: Path, rng: random.Random) -> str:
    """Cut a file off, as a full disk does."""
    path = rng.choice(sorted(place.glob("*.parquet")))
    path.write_bytes(path.read_bytes()[: -rng.randint(1, 200)])
    return path.name


FOLDERS = ("intermediates", "fingerprints", "embeddings", "merged", "summary", "difficulty")
STAGES = (
    *("process_tar", "compute_fingerprints", "generate_embeddings", "merge_and_split", "summarize_ids"),
    "compute_visual_neighbors",
)
FIRST_CHANGED = {  # setting, with another value -> the first stage that depends on it
    "data.fingerprint=exact": "compute_fingerprints",
    "embedding_model.views=[1.0]": "generate_embeddings",
    "embedding_model.pooling=cls": "generate_embeddings",
    "data.rows_per_part=30": "compute_fingerprints",
    "data.split_buffer_m=10": "merge_and_split",
    "data.dedup_max_hamming=1": "merge_and_split",
    "global.seed=5": "merge_and_split",
    "data.train_ratio=0.6, data.val_ratio=0.15": "merge_and_split",
    "data.neighbors=15": "compute_visual_neighbors",
    "data.band_percentiles=[30,60]": "compute_visual_neighbors",
}


@pytest.mark.parametrize("number", range(18))
def test_a_file_that_is_removed_or_damaged_is_made_again_and_nothing_else_is(copy, chains, number):
    rng = random.Random(number)
    place, change = copy("three"), rng.choice([remove, damage])
    folder = place.folder(FOLDERS[number % len(FOLDERS)])
    name, before = change(folder, rng), place.written()
    messages = place.follow()
    assert len(messages) == (change is damage)
    assert_same_artefacts(place.root, chains / "three" / "run", folders=("data",))
    assert place.run("--local")[1].startswith("nothing to do")
    after = place.written()
    elsewhere = [path for path in before if not re.search(f"/({folder.name}|merged)", str(path))]
    assert all(after[path] == before[path] for path in elsewhere), name


@pytest.mark.parametrize("setting", FIRST_CHANGED)
def test_a_changed_setting_is_explained_and_remade_as_if_its_files_had_been_removed(copy, chains, setting):
    first = FIRST_CHANGED[setting]
    place = copy("three", to=first if first == "compute_visual_neighbors" else "merge_and_split")
    flags = [word for part in setting.split(", ") for word in ("--set", part)]
    (told,) = place.follow(*flags)
    assert f"error: {first} is stale" in told
    assert f"{setting.partition('=')[0]} = " in told

    oracle = copy("three", name="oracle", to=place.to)
    redone = FOLDERS[STAGES.index(first) :]
    for folder in [path for name in redone for path in oracle.folder(name).parent.glob(f"{name}*")]:
        shutil.rmtree(folder)
    assert oracle.run("--local", *flags)[0] == 0
    made = oracle.relative(*(name for name in redone if oracle.folder(name).exists()))
    assert_same_artefacts(place.root, oracle.root, folders=made)


def test_what_was_made_from_a_removed_tar_is_left_out_after_the_printed_commands(copy, chains):
    place = copy("three")
    (place.raw / THIRD).unlink()
    stale, lost = place.follow()
    assert "it was made from 3 tars; there are 2 now: 0090 went" in stale
    assert "to keep it, restore 0090" in stale
    assert "restore the tars, or remove what was made from them: rm " in lost
    assert_same_artefacts(place.root, chains / "two" / "run", folders=place.relative(*FOLDERS))


def test_a_tar_that_was_packed_anew_is_read_again_and_what_has_not_changed_is_kept(copy, chains):
    place = copy("three")
    (place.raw / THIRD).write_bytes(gzip.compress(gzip.decompress((place.raw / THIRD).read_bytes()), 1))
    before = place.written()
    (told,) = place.follow()
    assert f"process_tar is stale (made on {time.strftime('%Y')}" in told
    assert "it was made from an earlier version of 0090.tar" in told
    assert_same_artefacts(place.root, chains / "three" / "run", folders=place.relative(*FOLDERS))
    changed = {path for path, when in place.written().items() if before[path] != when}
    assert {str(path.parent) for path in changed} == {
        *("data/intermediates_rejects", "data/intermediates_index"),
        *place.relative("intermediates", "fingerprints", "embeddings"),
    }
    assert all(path.name.startswith("0090") for path in changed)


def command_in(told: str) -> list[str]:
    """The command that redoes what is stale, as it is printed."""
    return shlex.split(re.search("^ *to redo what is (?:stale|damaged): python (.*)", told, re.MULTILINE)[1])


@pytest.mark.parametrize("selection", [("--from", "train"), ("--only=train",)])
def test_a_selection_of_stages_knows_what_is_stale_before_it(copy, chains, selection):
    place = copy("two", to="train")
    add_third_tar(place, chains)  # does not matter to a training on what is there
    flags = place.flags if selection[0] == "--from" else place.flags[:-2]
    assert "stale" not in place.run_words(["slurm/submit.py", *flags, "--dry-run", *selection])[1]
    before = place.written()
    words = ["slurm/submit.py", *flags, "--local", *selection, "--set", "data.neighbors=15"]
    code, told = place.run_words(words)
    assert code == 1
    assert "error: compute_visual_neighbors is stale" in told
    assert place.written() == before
    code, plan = place.run_words([*command_in(told), "--dry-run"])
    assert code == 0, plan
    lines = [line.split("after")[0].split() for line in plan.splitlines()[:2]]
    assert lines == [["compute_visual_neighbors", "stale,", "to", "be", "remade"], ["train", "to", "do"]]


def test_the_plan_names_the_study_that_depends_on_what_is_stale(copy):
    from train.tuning import shared_study

    place = copy("two", to="train")
    flags = ("--tune", "2", "--dry-run", "--set", "tuning.num_trials=3")
    cfg = config.load(None, [*place.flags[1:-2:2], "tuning.num_trials=3"])
    study = shared_study.open_study(cfg, shared_study.record(cfg), create=True)
    for value in (0.1, 0.2, 0.3):
        study.tell(study.ask(), value)
    assert re.search("^optuna_worker +2 tasks done", place.run(*flags)[1], re.MULTILINE)

    _, plan = place.run(*flags, "--set", "data.neighbors=15")
    assert re.search("^optuna_worker +follows compute_visual_neighbors", plan, re.MULTILINE)
    assert re.search(r"; after it, optuna_worker \(3 trials(, [\d.]+ s)?\)$", plan, re.MULTILINE)
    _, plan = place.run(*flags, "--set", "training.margin=0.3", "--from", "optuna_worker")  # is searched
    assert "stale" not in plan
    _, plan = place.run(*flags, "--set", "tuning.trial_epochs=7", "--from", "optuna_worker")
    assert re.search(
        r"^optuna_worker is stale: it was made with tuning\.trial_epochs = \d+ \(now 7\)$", plan, re.M
    )
    assert command_in(plan)[-2:] == ["--remake", "optuna_worker"]


def images_of(told: str) -> dict[str, int]:
    """Step -> the images that it is said to redo."""
    return {name: int(count) for name, count in re.findall(r"(\w+) \((\d+) images", told)}


def test_the_cost_is_that_of_what_is_redone_and_of_new_tars(copy, chains):
    place = copy("three")
    (place.raw / THIRD).write_bytes(gzip.compress(gzip.decompress((place.raw / THIRD).read_bytes()), 1))
    rows = {path.stem: parquet.num_rows(path) for path in place.folder("intermediates").glob("*.parquet")}
    told = images_of(place.run("--dry-run")[1])
    assert told["compute_fingerprints"] == told["generate_embeddings"] == rows["0090"]
    assert told["process_tar"] < told["merge_and_split"]
    assert told["merge_and_split"] == sum(rows.values())

    place = copy("two", name="grown")
    add_third_tar(place, chains)
    told = images_of(place.run("--dry-run")[1])
    assert list(told)[:4] == ["process_tar", "compute_fingerprints", "generate_embeddings", "merge_and_split"]
    assert told["generate_embeddings"] == pytest.approx(rows["0090"], rel=0.3)  # by the sizes of the tars
    assert told["merge_and_split"] == pytest.approx(sum(rows.values()), rel=0.1)


def test_a_removed_tar_is_told_before_anything_runs_with_all_that_was_made_from_it(copy, chains):
    place = copy("three")
    (place.raw / THIRD).rename(place.raw / "0091.tar")  # one has gone, another one has come
    before = place.written()
    code, told = place.run("--local", "--set", "data.split_buffer_m=10")
    assert code == 1
    assert "merge_and_split is stale" in told
    assert place.written() == before
    removed = [Path(name).relative_to(place.root) for name in shlex.split(re.search("rm (/.*)", told)[1])]
    assert set(removed) == {path for path in before if re.match("0090[-.]", path.name)}

    (place.folder("intermediates") / "0090.parquet").unlink()  # as the command of another backbone's run did
    assert "restore the tars" in place.run("--dry-run", "--set", "data.split_buffer_m=10")[1]


def test_damaged_files_are_not_called_stale(copy):
    place = copy("two")
    name = damage(place.folder("merged"), random.Random(0))
    _, plan = place.run("--dry-run")
    assert re.search("^merge_and_split +damaged +after", plan, re.MULTILINE)
    assert f"merge_and_split has damaged files: {place.folder('merged') / name}\n" in plan
    assert "stale" not in plan
    assert command_in(plan)[-2:] == ["--remake", "merge_and_split"]


def test_the_search_is_remade_by_either_name_and_a_misspelt_one_has_a_suggestion(copy):
    place, flags = copy("two"), ("--local", "--dry-run", "--set", "data.neighbors=15", "--remake")
    plans = [place.run(*flags, name)[1] for name in ("compute_visual_neighbors", "neighbor_parts")]
    assert "compute_visual_neighbors   stale, to be remade" in plans[0]
    assert plans[0] == plans[1]
    code, told = place.run(*flags, "compute_visual_neighbours")
    assert (code, "did you mean compute_visual_neighbors?" in told) == (2, True)


def test_a_stage_names_the_command_of_all_shards_and_in_a_job_the_one_that_submits_it(monkeypatch):
    words = ["generate/generate_embeddings.py", "--shard", "1", "--num-shards", "2", "--set", "data.neighbors=15"]
    monkeypatch.setattr(sys, "argv", words)
    own = "python generate/generate_embeddings.py --set data.neighbors=15 --remake"
    assert errors.command("", "--remake") == own
    monkeypatch.setattr(sys, "argv", [*words, "--set", "paths.raw_dir=/local/staged-7-1"])
    monkeypatch.setenv(errors.JOB_SETTINGS, "--config logs/runs/1/config.toml")
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    submit_again = "python slurm/submit.py --config logs/runs/1/config.toml --remake"
    assert errors.command("", "--remake") == f"{submit_again} generate_embeddings"
    assert errors.command("train/train.py", "--remake") == f"{submit_again} train"
    tuned = errors.command("train/fetch_best_and_train.py", "--remake")
    assert tuned == "python slurm/submit.py --config logs/runs/1/config.toml --tune 1 --remake train"
    overwrite = errors.command("preprocess/process_tar.py", "--overwrite")
    assert overwrite == "python preprocess/process_tar.py --config logs/runs/1/config.toml --overwrite"
