"""Calibrated scores and intervals of edges of a served detector, without Ray, and the band on its page."""

from dataclasses import replace
from pathlib import Path

import pytest

from dfine_core import LoadedDetector
from pipeline.data.sources.synthetic import CLASSES
from pipeline.serve.replica import ServeSettings
from tests.support.calibrations import a_calibration
from tests.support.service_in_process import detected_by, example_page, opened
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records


@pytest.fixture(scope="module")
def image() -> bytes:
    return synthetic_records(1)[0].image


def calibrated() -> LoadedDetector:
    return replace(small_detector(CLASSES[:3]), calibration=a_calibration())


def test_a_calibrated_detector_answers_as_it_does_in_python(image: bytes, tmp_path: Path) -> None:
    detector = calibrated()
    with opened(str(detector.save(tmp_path / "detector")), precision="fp32", coverage=0.8) as service:
        found, asked = detected_by(service, "", image), detected_by(service, "coverage=0.95&threshold=0.5", image)
        model = service.description()
        whole = detected_by(service, "coverage=0.9&joint=true", image)
        refused = detected_by(service, "coverage=0.7&joint=true", image, status=422)
    for answer, coverage, threshold, joint in (
        (found, 0.8, None, False),
        (asked, 0.95, 0.5, False),
        (whole, 0.9, None, True),
    ):
        (expected,) = detector(image, threshold, coverage=coverage, joint=joint)
        (each,) = answer["detections"]
        assert expected.edge_std_px is not None
        assert expected.edge_intervals is not None
        assert 0 < len(expected) == len(each["scores"])
        assert each["scores"] == pytest.approx(expected.scores.tolist(), rel=1e-3)
        for row in range(len(expected)):
            assert each["edge_std_px"][row] == pytest.approx(expected.edge_std_px[row].tolist(), rel=1e-2)
            for pair, wanted in zip(each["edge_intervals"][row], expected.edge_intervals[row].tolist(), strict=True):
                assert pair == pytest.approx(wanted, rel=1e-2, abs=1e-1)
        share = f"{100 * coverage:g} % of the {'true boxes with all four edges' if joint else 'true edges'}"
        assert answer["intervals"] == f"{share}, conformal, fitted on 40 images"
        assert answer["scores"] == "calibrated on 40 images"
    assert (model["coverage"], model["joint"], model["calibration"]) == (0.8, False, "on 40 images")
    assert refused["field"] == "coverage"
    assert "the calibration has 0.5, 0.8, 0.9, 0.95" in refused["error"]
    assert model["thresholds"] == list(detector.least_scores())


def test_a_server_of_joint_intervals_gives_them_unless_a_request_says_otherwise(image: bytes, tmp_path: Path) -> None:
    with opened(str(calibrated().save(tmp_path / "detector")), coverage=0.8, joint=True) as service:
        texts = [detected_by(service, query, image)["intervals"] for query in ("", "joint=false", "coverage=0.5")]
        assert service.description()["joint"] is True
    assert [text.partition(",")[0] for text in texts] == [
        *("80 % of the true boxes with all four edges", "80 % of the true edges"),
        "50 % of the true boxes with all four edges",
    ]
    with pytest.raises(ValueError, match=r"joint says what coverage counts: give a coverage"):
        ServeSettings(source="anything", joint=True)


def test_without_calibration_and_coverage_the_answer_has_no_new_keys(image: bytes, tmp_path: Path) -> None:
    with opened(str(small_detector().save(tmp_path / "detector"))) as service:
        answer, asked = detected_by(service, "", image), detected_by(service, "coverage=0.9", image)
        joint = detected_by(service, "joint=true", image, status=422)
        assert (service.description()["coverage"], service.description()["calibration"]) == (None, None)
    assert set(answer) == {"model", "detections", "threshold"}
    assert set(answer["detections"][0]) == {"boxes", "scores", "labels", "names", "width", "height"}
    assert joint["field"] == "joint"
    assert asked["intervals"].endswith("by the distributions alone: the detector has no calibration")
    assert len(asked["detections"][0]["edge_intervals"]) == len(answer["detections"][0]["scores"]) > 0


def test_a_detector_without_distributions_refuses_a_coverage(image: bytes, tmp_path: Path) -> None:
    folder = str(small_detector(regression="direct").save(tmp_path / "detector"))
    with opened(folder) as service:
        answer = detected_by(service, "coverage=0.9", image, status=422)
    assert answer["field"] == "coverage"
    assert "its edges have no distributions" in answer["error"]
    with pytest.raises(ValueError, match="its edges have no distributions"), opened(folder, coverage=0.9):
        pass


@pytest.mark.slow  # a browser
def test_the_page_shows_the_band_of_the_box_that_is_pointed_at(tmp_path: Path) -> None:
    for name, each in (("calibrated", calibrated()), ("plain", replace(calibrated(), calibration=None))):
        with example_page(each, tmp_path / name, "&threshold=0.3") as page:
            assert page.evaluate("element('band').hidden") == (name == "plain")
            before = page.evaluate("canvas.toDataURL()")
            x, y = page.evaluate(
                "(() => { const kept = detections.filter(isKept), area = canvas.getBoundingClientRect();"
                " const [l, t, r, b] = kept[0].box, scale = area.width / canvas.width * canvas.dataset.scale;"
                " return [area.left + scale * (Math.max(l, 0) + r) / 2, area.top + scale * (Math.max(t, 0) + b) / 2]; })()"
            )
            page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            page.wait_for("marked !== null")
            assert page.evaluate("canvas.toDataURL()") != before
            if name == "calibrated":
                assert page.evaluate("element('band-text').textContent").startswith("90 % of the true edges, conformal")
                assert page.evaluate("marked.edges.every(([low, high]) => low < high)")
                with_band = page.evaluate("canvas.toDataURL()")
                assert page.evaluate("marked.edges = undefined; redraw(); canvas.toDataURL()") != with_band
                assert "standard deviation in px: left" in page.evaluate(
                    "element('list').querySelector('button').title"
                )
            page.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
            page.wait_for("marked === null")
            assert page.evaluate("canvas.toDataURL()") == before
            assert page.messages == []
