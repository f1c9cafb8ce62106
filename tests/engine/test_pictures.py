"""The picture of a report shows every save and step, in every kind of file."""

import dataclasses
import sys
import xml.etree.ElementTree as ET

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from report_support import COMMITTED, FACTS, FAILED, FLYING, SKIPPED, STEPS

from stepsave.engine import pictures
from stepsave.engine.pictures import draw
from stepsave.engine.report import SaveReport


@pytest.fixture
def panels(monkeypatch):
    """The axes of the picture that was drawn last."""
    found = []
    real = Figure.savefig

    def savefig(self, *args, **options):
        found[:] = self.axes
        return real(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_each_phase_of_each_save_is_as_high_as_it_took(panels):
    draw([COMMITTED, FAILED, SKIPPED, FLYING], STEPS, "title", "png")
    steps, saves = panels
    assert labels(steps) == ["step", "step in which a save was taken"]
    assert labels(saves) == [
        "training held up",
        "queued, prepared",
        "writes",
        "commits",
        "failed",
        "skipped",
    ]
    assert saves.get_ylabel() == "time since the call of save, ms"
    bars = {
        (label, round(bar.get_x(), 3)): (bar.get_y(), bar.get_height())
        for container, label in zip(saves.containers, labels(saves), strict=False)
        for bar in container
    }
    assert bars == {
        ("training held up", 1.0): (0, 250),
        ("training held up", 3.0): (0, 125),
        ("training held up", 5.0): (0, 125),
        ("queued, prepared", 1.0): (250, 250),
        ("queued, prepared", 3.0): (125, 375),
        ("writes", 1.0): (500, 500),
        ("writes", 3.0): (500, 250),
        ("commits", 1.0): (1000, 125),
    }
    assert steps.get_ylabel() == "duration, ms"
    held_up = {line.get_label(): list(line.get_xdata()) for line in steps.get_lines()}
    assert held_up == {"step": [1.0], "step in which a save was taken": [2.5, 3.5]}


def test_steps_that_differ_much_are_drawn_on_a_logarithmic_axis(panels):
    wide = dataclasses.replace(STEPS, max_s=60.0, took_s=(60.0, 1.0, 1.0))
    draw([COMMITTED], wide, "title", "svg")
    assert panels[0].get_yscale() == "log"
    assert panels[0].get_ylabel() == "duration, ms (logarithmic)"


def test_the_same_report_is_the_same_picture():
    one, other = (draw([COMMITTED], STEPS, "title", "svg") for _ in range(2))
    assert one == other
    assert ET.fromstring(one).tag == "{http://www.w3.org/2000/svg}svg"
    assert draw([COMMITTED], STEPS, "title", "png") == draw([COMMITTED], STEPS, "title", "png")


@pytest.mark.parametrize("saves", [[], [SKIPPED], [COMMITTED], [COMMITTED] * 1000])
@pytest.mark.parametrize("steps", [None, STEPS])
def test_however_many_there_are_there_is_a_picture(saves, steps, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(draw(saves, steps, "title", "png"))
    assert imread(path).std() > 0.01


def test_titles_and_legends_do_not_overlap(panels):
    title = str(SaveReport.from_dict(FACTS)).partition("\n")[0]  # as long as they get
    draw([COMMITTED, FAILED, SKIPPED, FLYING], STEPS, title, "png")
    figure = panels[0].figure
    texts = [figure._suptitle]
    for axes in panels:
        texts += axes.get_legend(), axes._left_title, axes.xaxis.label, axes.yaxis.label
    boxes = [text.get_window_extent() for text in texts]
    boxes = [box for box in boxes if box.width > 0]
    assert len(boxes) == 8  # the upper panel has no label below
    for number, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stepsave\[report\]'"):
        draw([COMMITTED], None, "title", "png")


def test_a_kind_of_file_that_nobody_knows_is_refused_naming_those_there_are():
    with pytest.raises(ValueError, match="png"):
        draw([COMMITTED], None, "title", "xyz")


@pytest.mark.parametrize(
    ("longest_s", "unit"),
    [(0.0, "ms"), (0.5, "ms"), (1.9, "ms"), (2.0, "s"), (119, "s"), (121, "min"), (9000, "h")],
)
def test_axes_are_in_a_unit_that_suits(longest_s, unit):
    assert pictures._unit(longest_s)[1] == unit
