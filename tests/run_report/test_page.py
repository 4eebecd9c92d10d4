"""The page of results of a small real run."""

import re
from pathlib import Path

import pytest

from jobs import report as report_job
from pipeline.run_report.write import EACH
from pipeline.training import loop
from tests.support.browser import browser
from tests.support.training_runs import alone, experiment, job, shard_folders


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    setting = experiment(folder, shard_folders(folder), schedule={"steps": 4}, evaluation={"every_steps": 2})
    loop.train(job(setting), alone())
    return folder / "runs" / "run"


def test_the_command_writes_one_file_without_links_to_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_job.main([str(run)])
    assert capsys.readouterr().out.strip().endswith(f"page of results: {run}/report.html")
    page = (run / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)
    for part in ("What to try next", "Training", "Classes", "Errors", "Worst images", "Set-up"):
        assert f"<h2>{part}</h2>" in page, part
    assert "this run started from random weights".capitalize() in page
    assert "AP over 6 images varies widely" in page
    # 6 validation images, each shown once: as one of the worst or as one of the best.
    captions = re.findall(r"<figcaption>([^<]*): \d+ found, \d+ missed, \d+ wrong</figcaption>", page)
    assert 0 < len(captions) == len(set(captions)) <= min(6, 2 * EACH)
    assert len(re.findall(r"<tr><td>", page)) == 8  # classes
    assert "losses and rates are missing" in page  # this run was not tracked


def test_on_a_narrow_screen_panels_keep_a_readable_size_and_the_page_does_not_move_sideways(
    run: Path, tmp_path: Path
) -> None:
    report_job.main([str(run), "--out", str(tmp_path / "report.html")])
    with browser(tmp_path / "profile") as page:
        page.send("Emulation.setDeviceMetricsOverride", width=500, height=900, deviceScaleFactor=1, mobile=True)
        page.open(f"file://{tmp_path}/report.html")
        assert page.evaluate("document.documentElement.scrollWidth") == 500
        widths = page.evaluate("[...document.querySelectorAll('.wide img')].map(image => image.clientWidth)")
        assert len(widths) >= 2
        assert min(widths) == 760
        assert page.messages == []


def test_other_images_can_be_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = run.parents[1] / "train"
    out = run.parent / "train.html"
    report_job.main([str(run), "--data", str(train), "--out", str(out)])
    assert "24 validation images" in out.read_text()
    assert str(out) in capsys.readouterr().out
