import pytest

from stepsave.errors import CorruptBackupError
from stepsave.position import TrainingPosition


def test_a_position_survives_json():
    position = TrainingPosition(global_step=17, epoch=2, batch=3, steps_per_epoch=None)
    assert TrainingPosition.from_json(position.to_json()) == position


@pytest.mark.parametrize(
    ("batch", "steps_per_epoch", "epoch"),
    [(0, 7, 2), (6, 7, 2), (7, 7, 3), (8, 7, 3), (7, None, 2), (0, 0, 2), (5, 0, 2)],
)
def test_training_resumes_at_the_epoch_that_has_batches_left(batch, steps_per_epoch, epoch):
    assert TrainingPosition(20, 2, batch, steps_per_epoch).resume_epoch == epoch


@pytest.mark.parametrize("document", [None, {}, [], "x", {"epoch": 1}, {"step": 1, "epoch": 2}])
def test_metadata_that_is_no_position_is_refused_and_shown(document):
    with pytest.raises(CorruptBackupError, match="Expected a training position") as caught:
        TrainingPosition.from_json(document)
    assert repr(document) in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": -1},
        {"epoch": 1.5},
        {"epoch": True},
        {"batch": "3"},
        {"global_step": None},
        {"global_step": -1},
        {"steps_per_epoch": 7.0},
        {"steps_per_epoch": "7"},
    ],
)
def test_an_impossible_position_is_refused(wrong):
    document = TrainingPosition(17, 2, 3, 7).to_json() | wrong
    with pytest.raises(CorruptBackupError, match="Impossible training position"):
        TrainingPosition.from_json(document)
