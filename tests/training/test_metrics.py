import pytest

from edmdistill.training.metrics import Window


def test_means_over_the_rounds_since_the_last_line():
    window = Window()
    for loss in (1.0, 2.0, 6.0):
        window.add({"loss": loss})
    line = window.line(24, 8)
    assert (line["images"], line["step"], line["loss"]) == (24, 3, 3)
    assert line["images_per_second"] == pytest.approx(24 / line["seconds"], rel=1e-6)
    window.add({"loss": 5.0})
    assert window.line(32, 8)["loss"] == 5


def test_goes_on_from_its_progress():
    window = Window()
    window.add({"loss": 0.1})
    other = Window(**window.progress())
    for one in (window, other):
        one.add({"loss": 0.2})
    assert window.line(16, 8)["loss"] == other.line(16, 8)["loss"]
