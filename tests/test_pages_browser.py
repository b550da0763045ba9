"""summary.html and study.html in a browser, as test_report_browser.py does for report.html."""

import re

import pytest
import small_study
from conftest import paths_below
from test_report_browser import look_at, pytestmark  # noqa: F401 - skipped where that is

from common import files
from preprocess import summarize_ids
from train.tuning import study_page, study_trials


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both pages, of a small merge."""
    root = small_study.write_merge(tmp_path_factory.mktemp("pages"))
    summarize_ids.main(["--set", f"paths.root={root}", "--set", "data.split_cell_m=300"])
    cfg = small_study.load(root, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_trials, "fit", small_study.stand_in())
        tuning = small_study.open_study(cfg)
        small_study.work(cfg, tuning)
    study_page.write(root / "study.html", tuning)
    summary = files.beside(paths_below(root).summary_dir, "report")
    return {"summary": summary / "summary.html", "study": root / "study.html"}


@pytest.mark.parametrize("name", ["summary", "study"])
def test_a_page_is_whole_dark_and_legible_on_a_phone(made, tmp_path, name):
    found, console, asked = look_at(tmp_path, made[name], 390, "dark")
    assert console == asked == []
    assert found["wider_by"] == 0
    assert found["ink"] == "rgb(227, 231, 235)"
    figures = re.findall(r"<svg .*?</svg>", made[name].read_text(), re.DOTALL)
    assert len(figures) == len({label for label, _ in found["figures"]}) == len(found["figures"]) > 3
    for figure, (label, shown) in zip(figures, found["figures"], strict=True):
        units = float(re.findall(r'viewBox="0 0 ([\d.]+)', figure)[0])
        smallest = min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", figure))
        assert smallest * shown / units > 8, label  # px; of all cities' maps in one figure: 2
