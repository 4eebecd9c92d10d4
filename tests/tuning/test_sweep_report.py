"""Report of a sweep: its content, self-contained HTML, and a usable page with a thousand trials."""

import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.tuning.analysis.sweep_figures import svg
from pipeline.tuning.analysis.sweep_report import (
    SweepReport,
    draw_figures,
    headline,
    make_report,
    map_keys,
    report_page,
    sweep_facts,
    trial_table,
)
from pipeline.tuning.space import Point
from pipeline.tuning.sweep import Sweep
from pipeline.tuning.trial_records import TrialRecord, read_records, write_records
from tests.support.simulated_sweeps import loaded, simulated

SPACE = {
    "model.reg_max": {"integer": [8, 64, 2]},
    "loss.ddf": {"uniform": [0, 5]},
    "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
    "model.regression": {"choice": ["fdr", "direct"]},
    "loss.ddf_temperature": {"uniform": [2, 10], "when": {"model.regression": "fdr"}},
}
VOID = {"meta", "br", "img", "link", "input", "hr"}


def true_mean(point: Point) -> float:
    if point.get("optimizer.lr", 8e-4) > 2e-2:
        return 0.01  # training does not converge
    return 0.42 - 0.03 * float(point["loss.ddf"] < 1) - 0.03 * float(point.get("model.regression") == "direct")


def changed(record: TrialRecord, **values: Any) -> TrialRecord:
    return TrialRecord(**{**vars(record), **values})


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return loaded(tmp_path_factory.mktemp("sweep"), space=SPACE, trials=30)


@pytest.fixture(scope="module")
def records(sweep: Sweep) -> list[TrialRecord]:
    found = simulated(sweep, true_mean, sd=0.008, rungs=(1, 3))
    found[7] = changed(found[7], status="failed", reason="<b>out of memory</b>", curve=(), final={}, rung=None)
    found[8] = changed(found[8], status="running", curve=found[8].curve[:1], final={}, rung=None)
    return found


@pytest.fixture(scope="module")
def report(sweep: Sweep, records: list[TrialRecord]) -> SweepReport:
    return make_report(sweep, records)


@pytest.fixture(scope="module")
def page(report: SweepReport) -> str:
    return report_page(report)


class Checked(HTMLParser):
    """Parser that checks nesting, and collects text and references to other resources."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.outside += [
            f"{name}={value}"
            for name, value in attributes
            if name.split(":")[-1] in ("src", "href") and not (value or "").startswith(("#", "data:"))
        ]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_well_formed(page: str) -> None:
    checked = Checked(page)
    assert checked.open == []
    assert checked.outside == []
    assert "url(http" not in page
    assert "@import" not in page


def test_the_verdict_comes_first_and_no_best_is_claimed(page: str) -> None:
    text = Checked(page).text
    assert re.findall("<h2>(.*?)</h2>", page)[:2] == ["Verdict on points", "Verdict on settings"]
    assert not re.search(r"\bbest (trial|point|setting|value)s?\b", text)
    for part in ("not distinguishable", "worse", "degrees of freedom", "Holm", "after evaluation 1", "fresh seeds"):
        assert part in text, part


def test_names_and_reasons_are_escaped(page: str) -> None:
    assert "<b>out of memory" not in page
    assert "&lt;b&gt;out of memory" in page


def test_every_figure_is_there_and_each_is_valid_svg_that_follows_the_pages_colours(report: SweepReport) -> None:
    figures = draw_figures(report)
    assert list(figures) == ["effects", "cost", "importance", "map", "pareto", "parallel"]
    ids: list[str] = []
    for name, figure in figures.items():
        text = svg(figure, name)
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg")
        assert "currentColor" in text
        assert "#1a1b1c" not in text
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))  # they share one page


def test_every_trial_is_a_row_with_its_config_status_and_cost(report: SweepReport, records: list[TrialRecord]) -> None:
    rows = trial_table(report)
    assert {len(column) for column in rows.values()} == {len(records)}
    assert rows["#"] == sorted(record.number for record in records)
    assert rows["status"].count("failed") == 1
    assert rows["status"].count("running") == 1
    assert sum(str(status).startswith("pruned after") for status in rows["status"]) > 10
    assert rows["AP before training"][0] == 0.0123
    assert rows["loss.ddf_temperature"].count(None) > 0  # inactive keys have no value
    assert rows["GPU s"][0] == round(records[0].cost_s)


def test_the_map_shows_bins_by_ddf_weight_where_both_are_searched(report: SweepReport, tmp_path: Path) -> None:
    assert map_keys(report) == ("model.reg_max", "loss.ddf")
    other = loaded(tmp_path, space={key: SPACE[key] for key in ("optimizer.lr", "loss.ddf")})
    assert set(map_keys(make_report(other, []))) == {"optimizer.lr", "loss.ddf"}


def test_the_facts_include_the_cost_and_the_status_of_trials(report: SweepReport, records: list[TrialRecord]) -> None:
    values = dict(sweep_facts(report))
    hours = sum(record.cost_s for record in records) / 3600
    assert values["cost"].startswith(f"{hours:.2f} GPU-hours")
    assert "1 failed, 1 running" in values["trials"]
    assert values["scheduler"] == "asha at evaluations 1, 3"
    assert "3 points confirmed" in headline(report)


def test_a_report_can_be_made_at_any_time(sweep: Sweep, records: list[TrialRecord]) -> None:
    for known in ([], records[:5]):
        report = make_report(sweep, known)
        page = report_page(report)
        assert Checked(page).open == []
        assert "No point was confirmed yet" in page


def test_a_single_key_and_a_single_value_make_a_report(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, space={"model.reg_max": {"choice": [16]}}, trials=1, confirm={"top": 1})
    report = make_report(sweep, simulated(sweep, lambda _: 0.4))
    assert "map" not in draw_figures(report)
    assert Checked(report_page(report)).open == []


def test_records_are_read_back_unchanged(records: list[TrialRecord], tmp_path: Path) -> None:
    write_records(tmp_path / "trials.json", records)
    assert read_records(tmp_path / "trials.json") == records


def test_the_cost_of_re_binning_is_shown_for_each_trial_with_the_ap_of_the_initial_detector(tmp_path: Path) -> None:
    space = {"model.reg_max": {"choice": [8, 16, 32]}}
    sweep = loaded(tmp_path, init="pretrained", space=space, searcher={"kind": "grid"}, trials=None)
    before = {8: 0.25, 16: 0.35, 32: 0.4}
    known = [
        changed(record, ap_before_training=before[record.point["model.reg_max"]])
        for record in simulated(sweep, lambda _: 0.4)
    ]
    bins = {"reg_max": 32, "reg_scale": 4.0, "up": 0.5}
    report = make_report(sweep, known, bins)
    assert (
        dict(sweep_facts(report))["starts from"] == f"{Path.cwd()}/pretrained, AP 0.4000 on this data before training"
    )
    rows = trial_table(report)
    lost = dict(zip(rows["model.reg_max"], rows["lost by re-binning"], strict=True))
    assert lost == pytest.approx({8: 0.15, 16: 0.05, 32: 0.0})
    others = make_report(sweep, known, {**bins, "reg_max": 64})
    assert "is not known" in dict(sweep_facts(others))["starts from"]
    assert make_report(sweep, known).source_ap is None


@pytest.mark.slow
def test_a_thousand_trials_make_a_page_of_a_few_megabytes_in_half_a_minute(sweep: Sweep) -> None:
    many = simulated(sweep, true_mean, sd=0.008, rungs=(1, 3), points=1000)
    assert len(many) >= 1000
    began = time.process_time()
    page = report_page(make_report(sweep, many))
    assert time.process_time() - began < 30
    assert len(page) < 4e6
    assert page.count("<tr>") > 1000
