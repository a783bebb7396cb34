"""Lines of metrics and grids in TensorBoard's files, and a tracker that cannot be opened."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edmdistill.errors import TrainingError
from edmdistill.training import trackers as module
from edmdistill.training.trackers import require_trackers, trackers


def _events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def _scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _events(folder).Scalars(name)]


def test_tensorboard_has_each_line_once(tmp_path: Path) -> None:
    """A run that goes on from 64 images after lines up to 128 has no line of the first try beyond 64."""
    for start, value in ((0, 1.0), (64, 2.0)):
        with trackers(["tensorboard"], tmp_path, {}, start) as opened:
            for images in range(start + 32, start + 97, 32):
                opened.log({"images": images, "loss/generator": value})
    assert _scalars(tmp_path / "tensorboard", "loss/generator") == [(32, 1), (64, 1), (96, 2), (128, 2), (160, 2)]


def test_grids_are_shown(tmp_path: Path) -> None:
    """A run's grids, gray or in color, arrive pixel by pixel, at the images after which they were drawn."""
    drawn = {}
    for name, mode in (("samples", "L"), ("x0", "RGB")):
        drawn[name] = tmp_path / f"{name}.png"
        Image.effect_noise((12, 8), 99).convert(mode).save(drawn[name])
    with trackers(["tensorboard"], tmp_path, {}, 0) as opened:
        opened.show(drawn, 64)
    events = _events(tmp_path / "tensorboard")
    for name, file in drawn.items():
        (event,) = events.Images(name)
        assert event.step == 64
        with Image.open(io.BytesIO(event.encoded_image_string)) as shown, Image.open(file) as picture:
            assert shown.convert("RGB").tobytes() == picture.convert("RGB").tobytes()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"--log-with tensorboard needs .* pip install 'edmdistill\[tb\]'"):
        require_trackers(["tensorboard"])
    with pytest.raises(TrainingError, match="there is no tracker 'mlflow': choose from tensorboard, wandb"):
        require_trackers(["mlflow"])


def test_what_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with (
        pytest.raises(TrainingError, match="--log-with tensorboard cannot be opened"),
        trackers(["tensorboard"], tmp_path, {}, 0),
    ):
        pass


def test_a_run_at_weights_and_biases_has_an_id_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on under it wherever its folder is moved, and another run in a folder of the same path gets another."""
    asked: list[str] = []

    class Wandb:
        def __init__(self, project: str, **options: str) -> None:
            asked.append(options["id"])

        def start(self) -> None: ...
        def finish(self) -> None: ...

    monkeypatch.setitem(module.LOGGER_TYPE_TO_CLASS, "wandb", Wandb)

    def open_in(folder: Path) -> str:
        with trackers(["wandb"], folder, {}, 0):
            return asked[-1]

    (tmp_path / "a").mkdir()
    first = open_in(tmp_path / "a")
    assert open_in(tmp_path / "a") == first
    moved = (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "a").mkdir()
    assert open_in(tmp_path / "a") != first
    assert open_in(moved) == first


def test_what_a_tracker_says_becomes_part_of_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wandb:
        def __init__(self, *_: object, **__: object) -> None: ...

        def start(self) -> None:
            raise ValueError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(module.LOGGER_TYPE_TO_CLASS, "wandb", Wandb)
    said = r"cannot be opened: No API key configured\. Use `wandb login` to log in; fix that, or leave it out$"
    with pytest.raises(TrainingError, match=said), trackers(["wandb"], tmp_path, {}, 0):
        pass
