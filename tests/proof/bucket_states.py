"""What a trainer that dies leaves in a bucket: each request that had its answer is done, each that
was under way is done or not, in any combination.

Requests are recorded at a proxy before a real server, and what they leave is built in `memory://`.
"""

import dataclasses
import itertools
import random
import urllib.parse

from bucket_support import BUCKET, Proxy

from proof.crash_scenarios import SCENARIOS, Run
from proof.recovery import assert_is_of
from stepsave import Checkpointer
from stepsave.engine.known_files import COMMIT
from stepsave.engine.markers import Markers
from stepsave.store.places import open_store
from stepsave.testing.crashes import ACKNOWLEDGED, DELETED, LOOK

NAMES = (
    "first save",
    "second save",
    "double_checkpoint",
    "keep=2",
    "delete",
    "delete several",
    "mark ended",
)
EXHAUSTIVE = 6  # requests under way at once
FOREIGN = {"beside": b"somebody else's", "20/1/layout.json": b"{}"}

_numbers = itertools.count()


@dataclasses.dataclass(slots=True)
class Request:
    """A change that a server was asked for.

    Attributes:
        key: Of the object, below the place.
        data: What it is to be; None if it is to go.
        is_done: Whether the server has said so.
    """

    key: str
    data: bytes | None
    is_done: bool = False


class RequestLog:
    """Events in their order: a request begins, it ends, a mark."""

    def __init__(self, place):
        self.prefix = place.partition("://")[2].removeprefix(f"{BUCKET}/") + "/"
        self.events = []
        self._open = {}

    def watch(self, number, method, path, body, status):
        """Told by the proxy of each request when it comes, and before its answer goes."""
        if status is not None:
            request = self._open.pop(number, None)
            if request is not None:
                request.is_done = 200 <= status < 300
                self.events.append(("end", request))
            return
        key = _key_of(method, path)
        if key is None or not key.startswith(self.prefix):
            return
        request = Request(key.removeprefix(self.prefix), None if method == "DELETE" else body)
        self._open[number] = request
        self.events.append(("begin", request))

    def mark(self, what, step=-1):
        self.events.append((what, step))


def _key_of(method, path):
    """The object that a request changes; None if it changes none."""
    url = urllib.parse.urlsplit(path)
    query = urllib.parse.parse_qs(url.query)
    if method == "POST" and "uploadType" in query:
        return query["name"][0]
    of_google = f"/storage/v1/b/{BUCKET}/o/"
    if method == "DELETE" and url.path.startswith(of_google):
        return urllib.parse.unquote(url.path.removeprefix(of_google))
    if method in ("PUT", "DELETE") and url.path.startswith(f"/{BUCKET}/"):
        return urllib.parse.unquote(url.path.removeprefix(f"/{BUCKET}/"))
    return None


class BucketRun(Run):
    """A scenario in a bucket."""

    directory = property(lambda self: self.top)


def record_bucket(name, proxy):
    """Records a scenario at a proxy."""
    log = RequestLog(proxy.place)
    proxy.watch = log.watch
    try:
        SCENARIOS[name].act(BucketRun(proxy.place, "auto", log.mark))
    finally:
        proxy.watch = None
    return log


def bucket_states(log, rng, samples):
    """Yields what may be there, once each: objects by key, and which step was acknowledged."""
    found = {}
    begin = max((n for n, event in enumerate(log.events) if event[0] == LOOK), default=0)
    objects, under_way, acknowledged = {}, [], -1
    for number, (what, value) in enumerate(log.events):
        if what in (ACKNOWLEDGED, DELETED):
            acknowledged = value
        elif what == "begin":
            under_way.append(value)
        elif what == "end":
            under_way.remove(value)
            _apply(objects, value)
        if number < begin:
            continue
        for chosen in _subsets(under_way, rng, samples):
            state = dict(objects)
            for request in chosen:
                _apply(state, request)
            key = tuple(sorted((path, hash(data)) for path, data in state.items()))
            if key not in found or found[key][1] < acknowledged:
                found[key] = state, acknowledged
    return list(found.values())


def _subsets(requests, rng, samples):
    if len(requests) <= EXHAUSTIVE:
        for count in range(len(requests) + 1):
            yield from itertools.combinations(requests, count)
        return
    yield from ([], requests)
    for one in requests:
        yield [one]
        yield [other for other in requests if other is not one]
    for _ in range(samples):
        yield [one for one in requests if rng.random() < 0.5]


def _apply(objects, request):
    if not request.is_done:  # refused, whenever it came
        return
    if request.data is None:
        objects.pop(request.key, None)
    else:
        objects[request.key] = request.data


def recover_bucket(state, acknowledged, scenario):
    """Restores from a state, saves, and looks for debris.

    Raises:
        AssertionError: If anything of it is not as promised.
    """
    place = f"memory://states/{next(_numbers)}"
    store = open_store(place)
    store.write_all({**state, **FOREIGN})
    try:
        _recover(place, store, acknowledged, scenario)
    except Exception as e:
        e.add_note(f"{acknowledged} acknowledged; there were {sorted(state)}")
        raise
    finally:
        store.remove_below("")


def _recover(place, store, acknowledged, scenario):
    keep = max(scenario.options.get("keep", 0), scenario.options.get("double_checkpoint", 0))
    with Checkpointer(place, **scenario.options) as saver:
        backup = saver.restore()
        found = -1 if backup is None else backup.step
        assert found >= acknowledged, f"step {acknowledged} was acknowledged, {found} restored"
        if backup is not None:
            assert_is_of(backup)
        if acknowledged > keep:
            kept = [record.step for record in saver.kept]
            assert len(kept) >= keep, f"of {keep} only {kept} are kept"
            for step in kept:
                assert_is_of(saver.restore(step=step))
        step = max(found, 0) + 10
        BucketRun(place, "auto", lambda *_: None).save(saver, step)
        restored = saver.restore()
        assert restored.step == step
        assert_is_of(restored)
    markers = Markers(store)
    markers.read_markers()
    paths = set(store.list(""))
    expected = {COMMIT, *FOREIGN}
    for record in markers.records:
        files = [f.path for f in record.files]
        files += [f"pytree/d/c/{n}" for n in range(len(record.shard_digests))]
        expected |= {f"{record.directory}/{path}" for path in files}
    assert paths == expected, f"debris: {sorted(paths - expected)}, gone: {expected - paths}"
    for path, data in FOREIGN.items():
        assert store.read(path, 100) == data


def recover_from_bucket(name, proxy, seed, samples, most=None):
    """Records a scenario and recovers from all that it may leave; see `recover_from_all`."""
    assert isinstance(proxy, Proxy)
    rng = random.Random(seed)
    states = bucket_states(record_bucket(name, proxy), rng, samples)
    if most is not None and len(states) > most:
        states = rng.sample(states, most)
    bad = []
    for state, acknowledged in states:
        try:
            recover_bucket(state, acknowledged, SCENARIOS[name])
        except Exception as e:  # noqa: BLE001  each is to be counted
            bad.append(e)
    return len(states), bad
