"""Backups at places of all kinds, whose files are spoiled, and what must come of that.

What is restored is right to the last bit, or nothing is, and whoever asked is told which file is to
blame; on disk nothing is changed either way. A backup that is kept from before takes the place of
a spoiled one, and then a warning names the file.
"""

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from engine_support import assert_same_bits, random_array
from golden_state import KEPT, METADATA, STEP
from golden_state import state as golden_state

import stepsave
from stepsave.engine.read_only import ReadOnlyDirectory
from stepsave.errors import CorruptBackupError
from stepsave.format import planning
from stepsave.format.marker import decode_marker
from stepsave.store.places import open_store
from stepsave.threads import Crew

GOLDEN = Path(__file__).parents[1] / "engine" / "golden"
MARKERS = ("COMMIT", "PREVIOUS")
STEPS = (5, 8, 13)
SHARDS = "pytree/d/c/"


def state_of(step):
    """Arrays in several small shards, none of which is the same in two steps."""
    rng = np.random.default_rng(step)
    return {
        "a": random_array((90, 200), "float32", step),
        "b": {"c": random_array((7,), "int8", step), "n": step, "none": None},
        "z": [rng.integers(1, 255, (60, 300), np.uint8), np.zeros((0, 3), np.float32)],
    }


@contextlib.contextmanager
def small_shards():
    """As the fixture of this name."""
    before = planning.SHARD_TARGET_BYTES, planning.CHUNK_LIMIT_BYTES
    planning.SHARD_TARGET_BYTES, planning.CHUNK_LIMIT_BYTES = 64 << 10, 16 << 10
    try:
        yield
    finally:
        planning.SHARD_TARGET_BYTES, planning.CHUNK_LIMIT_BYTES = before


class Directory:
    """Files below a directory, to be spoiled."""

    def __init__(self, root):
        self.root = Path(root)

    def name(self, path):
        return str(self.root / path)

    def read(self, path):
        return (self.root / path).read_bytes()

    def put(self, path, data):
        """Puts a file there with this content; removes it if that is None."""
        if data is None:
            os.unlink(self.root / path)
        else:
            (self.root / path).write_bytes(data)

    def has(self, path):
        return os.path.lexists(self.root / path)

    def picture(self):
        """By which a change shows; the lock, which is taken, aside."""
        found = {}
        for directory, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(directory, name)
                if path != self.name("LOCK"):
                    entry = os.lstat(path)
                    found[path] = entry.st_size, entry.st_mtime_ns, entry.st_ino
        return found


class Objects:
    """The objects of a bucket, likewise."""

    def __init__(self, url):
        self.store = open_store(url)
        self.root = url

    def name(self, path):
        return self.store.path(path)

    def read(self, path):
        return self.store.read(path, 1 << 30)

    def put(self, path, data):
        if data is None:
            self.store.remove(path)
        else:
            self.store.write_all({path: data})

    def has(self, path):
        return path in self.store.list(path)

    def picture(self):
        return {path: self.store.read_versioned(path)[1] for path in self.store.list("")}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Backups at a place, and what must come of them.

    Attributes:
        name: Of the setting.
        place: Where files are spoiled.
        restore: Restores the newest backup: what was found, and what was said of it.
        states: The whole state by step, newest first.
    """

    name: str
    place: Directory | Objects
    restore: Callable[[], tuple[stepsave.Backup | None, list[str]]]
    states: dict[int, object]

    @property
    def records(self):
        """What the markers vouch for, newest first."""
        found = []
        for name in filter(self.place.has, MARKERS):
            marker = decode_marker(self.place.read(name), name)
            found += marker if isinstance(marker, tuple) else marker.backups
        return found


def reading(target):
    """Returns what restores from a place again and again, as `stepsave.restore` does it once."""
    crew = Crew(3, "spoiling")
    directory = ReadOnlyDirectory(open_store(target), crew)

    def restore():
        found, lost = directory.restore()
        return found, [lost] if lost else []

    return restore


def written(name, place, *, writer="auto", **options):
    """Backups in a directory or a bucket; the newest alone if none are kept."""
    with stepsave.Checkpointer(place, writer=writer, **options) as saver:
        for step in STEPS:
            saver.save(step, state_of(step), {"step": step}).wait()
    kept = options.get("keep", 0)
    steps = STEPS[::-1][: kept + 1]
    where = Objects(place) if "://" in str(place) else Directory(place)
    states = {step: state_of(step) for step in steps}
    return Setting(name, where, reading(place), states)


def golden(version, directory):
    shutil.copytree(GOLDEN / version, directory)
    states = {STEP: golden_state()}
    if version == "v1-kept":
        states |= {step: {"of": np.int16(step)} for step in reversed(KEPT)}
    return Setting(version, Directory(directory), reading(directory), states)


def tiers(name, directory, url):
    """A disk and a bucket with the same backup each; the files on the disk are spoiled.

    Each restore is by a run that opens both, and so may write; the bucket has a whole backup.
    """
    options = {"local_dir": directory, "upload_every": 1}
    with stepsave.Checkpointer(url, **options) as saver:
        saver.save(STEPS[0], state_of(STEPS[0]), {"step": STEPS[0]}).wait()

    def restore():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with stepsave.Checkpointer(url, **options) as saver:
                found = saver.restore()
        return found, [str(one.message) for one in caught]

    return Setting(name, Directory(directory), restore, {STEPS[0]: state_of(STEPS[0])})


@contextlib.contextmanager
def spoiled(place, **files):
    """Puts contents of files, by path, and afterwards what was there before."""
    before = {path: place.read(path) if place.has(path) else None for path in files}
    try:
        for path, data in files.items():
            place.put(path, data)
        yield
    finally:
        for path, data in before.items():
            if data is not None or place.has(path):
                place.put(path, data)


def fault_of(setting, files, *, blamed=(), may_pass=False):
    """What is wrong with what comes of spoiled files; an empty text if nothing is.

    Args:
        setting: The backups.
        files: Contents by path; None for a file that is missing.
        blamed: The paths of which an error or a warning must name one.
        may_pass: Whether the newest backup may be restored as if nothing were: no byte of an array
            was spoiled, nor anything else that a restore reads.
    """
    place = setting.place
    with spoiled(place, **files):
        before = place.picture()
        newest = next(iter(setting.states))
        found, is_refused = None, False
        try:
            found, told = setting.restore()
        except CorruptBackupError as e:
            told, is_refused = [str(e), *getattr(e, "__notes__", ())], True
        except Exception as e:  # noqa: BLE001  any other is a fault to report
            return f"{type(e).__name__}: {e}"
        if place.picture() != before:
            return "something was changed on disk"
    names = [place.name(path) for path in blamed or files]
    is_told = any(name in text for name in names for text in told)
    if is_refused:
        return "" if is_told else f"refused without the name: {told}"
    if found is None or found.step not in setting.states:
        return f"restored {found and found.step}"
    try:
        assert_same_bits(found.state, setting.states[found.step])
    except AssertionError as e:
        return f"WRONG VALUES of step {found.step}: {e}"
    if found.metadata != (METADATA if found.step == STEP else found.metadata):
        return "wrong metadata"
    if found.step == newest and not told:
        return "" if may_pass else "was not noticed"
    return "" if is_told else f"step {found.step} without the name: {told}"
