"""Thresholds of a served detector, without Ray."""

from dataclasses import replace
from pathlib import Path

import pytest

from dfine_core.thresholds import ClassThresholds
from pipeline.data.sources.synthetic import CLASSES
from tests.support.service_in_process import detected_by, example_page, opened
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records


def test_the_thresholds_of_the_detector_decide_unless_a_request_or_the_server_has_one(tmp_path: Path) -> None:
    own = ClassThresholds((0.3, None, 0.6), (None,) * 3, 0.9)
    detector = replace(small_detector(CLASSES[:3]), thresholds=own)
    folder = str(detector.save(tmp_path / "detector"))
    content = synthetic_records(1)[0].image
    with opened(folder) as service:
        every = detected_by(service, "threshold=0", content)
        found = detected_by(service, "", content)
        two = detected_by(service, "max_detections=2", content)
        assert service.description()["thresholds"] == [0.3, 0.4, 0.6]
    pairs = zip(every["detections"][0]["scores"], every["detections"][0]["labels"], strict=True)
    expected = [score for score, label in pairs if score >= (0.3, 0.4, 0.6)[label]]
    assert 0 < len(expected) < len(every["detections"][0]["scores"])
    assert found["detections"][0]["scores"] == expected
    assert found["threshold"] == detector.threshold_text()
    assert every["threshold"] == "0, as given"
    assert len(two["detections"][0]["scores"]) == 2
    with opened(folder, threshold=0.5) as one:
        assert one.description()["thresholds"] == [0.5, 0.5, 0.5]
        assert all(score >= 0.5 for score in detected_by(one, "", content)["detections"][0]["scores"])


@pytest.mark.slow  # a browser
def test_the_page_starts_with_the_models_thresholds_and_names_them(tmp_path: Path) -> None:
    own = ClassThresholds((0.3, None, 0.6), (None,) * 3, 0.9)
    detector = replace(small_detector(CLASSES[:3]), thresholds=own)
    for name, each in (("own", detector), ("plain", replace(detector, thresholds=None))):
        with example_page(each, tmp_path / name) as page:
            assert page.evaluate("element('own').checked") == (name == "own")
            assert page.evaluate("element('own-label').hidden") == (name == "plain")
            assert page.evaluate("element('own-text').textContent") == each.threshold_text()
            least = list(each.least_scores())
            shown = page.evaluate("document.querySelectorAll('#list button').length")
            assert shown == page.evaluate(f"detections.filter(e => e.score >= {least}[e.label]).length") > 0
            page.evaluate("slider.value = 0.5; slider.dispatchEvent(new Event('input'))")
            shown = page.evaluate("document.querySelectorAll('#list button').length")
            assert shown == page.evaluate("detections.filter(e => e.score >= 0.5).length")
            assert page.messages == []
