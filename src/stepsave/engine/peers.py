"""Other processes that train the same model: who they are, and how they tell each other something.

The frameworks that start several processes have a service by which they agree (keys and values,
kept by process 0); this is it, and nothing else. Nothing here is a collective operation: who asks
waits, up to a limit, and nobody else does.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from stepsave.errors import PeerError

__all__ = ("Board", "Peers", "count_processes", "find_peers")

LIMIT_S = 600.0
"""How long to wait for another process to begin with what all of them do."""

_LOOK_S, _LOOK_GROWTH, _LOOK_MOST_S = 0.02, 1.2, 0.25
_SHOWN_CHARACTERS = 500  # of an error of the service, or of another process


@dataclasses.dataclass(frozen=True, slots=True)
class Peers:
    """The processes of this training.

    Attributes:
        rank: Which one this is.
        count: How many there are.
        framework: Whose they are, for texts.
        say: Tells all something under a key that was not used before.
        hear: Returns what somebody says under a key, waiting so many seconds at most.
        peek: Returns what somebody has said under a key, None if nobody has.
        hear_all: Returns what was said under all keys below one, by the rest of the key; None
            where that can only be asked key by key.
        forget: Removes a key, and all below it; None where keys stay.
        share_saves: Whether each saves a part; else all have everything, and process 0 saves it.
    """

    rank: int
    count: int
    framework: str
    say: Callable[[str, str], None]
    hear: Callable[[str, float], str]
    peek: Callable[[str], str | None]
    hear_all: Callable[[str], dict[str, str]] | None = None
    forget: Callable[[str], None] | None = None
    share_saves: bool = False

    @property
    def is_leader(self) -> bool:
        """Whether this process opens the directory, and says which backups are valid."""
        return self.rank == 0


class Board:
    """What processes tell each other about one place. All of them open it in the same order."""

    _opened: dict[str, int] = {}  # how often in this process, by place  # noqa: RUF012

    def __init__(self, peers: Peers, place: str) -> None:
        self.peers = peers
        self._place = place
        number = self._opened[place] = self._opened.get(place, 0) + 1
        self._prefix = f"stepsave/{place}/{number}"

    def say(self, what: str, **facts: Any) -> None:
        """Tells the other processes something, once.

        Raises:
            PeerError: If the service does not take it.
        """
        try:
            self.peers.say(f"{self._prefix}/{what}", json.dumps(facts))
        except Exception as e:
            raise PeerError(self._text(f"could not tell the others about `{what}`", e)) from e

    def hear(self, what: str, limit_s: float = LIMIT_S, *, who: int = 0) -> dict[str, Any]:
        """Returns what a process, by its rank, says about something.

        Raises:
            PeerError: If it has not said anything in time.
        """
        try:
            return json.loads(self.peers.hear(f"{self._prefix}/{what}", limit_s))
        except Exception as e:
            raise PeerError(
                self._text(
                    f"waited {limit_s:.0f} s for process {who} to say something about `{what}`", e
                )
            ) from e

    def peek(self, what: str) -> dict[str, Any] | None:
        """Returns what was said about something already; None if nothing was."""
        said = self.peers.peek(f"{self._prefix}/{what}")
        return None if said is None else json.loads(said)

    def watch(
        self, what: str, limit_s: float, is_off: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """Returns what was said about something; None if nothing was in time, or it is called off.

        Unlike `hear` it keeps no connection to the service busy, so other threads can talk.
        """
        end_s, pause_s = time.monotonic() + limit_s, _LOOK_S
        while True:
            said = self.peek(what)
            if said is not None or is_off() or time.monotonic() > end_s:
                return said
            time.sleep(pause_s)
            pause_s = min(pause_s * _LOOK_GROWTH, _LOOK_MOST_S)

    def hear_all(self, what: str) -> dict[int, dict[str, Any]]:
        """Returns what other processes have said so far about something, by their rank.

        Raises:
            PeerError: If the service does not answer.
        """
        if self.peers.hear_all is None:
            said = {rank: self.peek(f"{what}/{rank}") for rank in range(1, self.peers.count)}
            return {rank: facts for rank, facts in said.items() if facts is not None}
        try:
            found = self.peers.hear_all(f"{self._prefix}/{what}")
        except Exception as e:
            raise PeerError(self._text(f"could not hear the others about `{what}`", e)) from e
        return {int(rank): json.loads(said) for rank, said in found.items()}

    def forget(self, what: str) -> None:
        """Removes what was said about something, so that it takes no memory any more.

        Raises:
            PeerError: If the service does not do it.
        """
        if self.peers.forget is None:
            return
        try:
            self.peers.forget(f"{self._prefix}/{what}")
        except Exception as e:
            raise PeerError(self._text(f"could not forget `{what}`", e)) from e

    def text(self, what: str, reason: object = "") -> str:
        """Returns a text about what this process does or finds, for an error."""
        peers = self.peers
        told = f" The reason: {str(reason)[:_SHOWN_CHARACTERS]}" if reason else ""
        who = f"process {peers.rank} of {peers.count} ({peers.framework})"
        return f"{self._place}: {who} {what}.{told}"

    def _text(self, what: str, error: Exception) -> str:
        advice = (
            "All processes must run the same script, with a callback or a checkpointer for the "
            "same place. Look whether one of them has ended"
        )
        return self.text(f"{what}. {advice}", error)


def find_peers() -> Peers | None:
    """Returns the processes of a training that is under way; None if this is the only one.

    To be asked when they have found each other: after `jax.distributed.initialize`,
    `torch.distributed.init_process_group`, or when a strategy of TensorFlow for several workers
    was made. Imports none of them.
    """
    return _of_jax() or _of_torch() or _of_tensorflow()


def count_processes() -> int:
    """Returns how many processes train together."""
    peers = find_peers()
    return 1 if peers is None else peers.count


def _of_jax() -> Peers | None:
    distributed = sys.modules.get("jax._src.distributed")
    state: Any = getattr(distributed, "global_state", None)
    client = getattr(state, "client", None)
    if client is None or state.num_processes in (None, 1):
        return None

    def hear(key: str, limit_s: float) -> str:
        return client.blocking_key_value_get(key, int(limit_s * 1e3))

    def peek(key: str) -> str | None:
        try:
            return client.key_value_try_get(key)
        except Exception:  # noqa: BLE001  JAX's own error, that there is none
            return None

    def hear_all(prefix: str) -> dict[str, str]:
        return {key.rpartition("/")[2]: said for key, said in client.key_value_dir_get(prefix)}

    def forget(key: str) -> None:
        client.key_value_delete(key)

    rank, count, say = state.process_id, state.num_processes, client.key_value_set
    return Peers(rank, count, "JAX", say, hear, peek, hear_all, forget, share_saves=True)


def _of_torch() -> Peers | None:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    count = distributed.get_world_size()
    if count == 1:
        return None
    # Not a collective, which all would have to take part in at the same time.
    store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001

    def hear(key: str, limit_s: float) -> str:
        store.wait([key], dt.timedelta(seconds=limit_s))
        return store.get(key).decode()

    def peek(key: str) -> str | None:
        return store.get(key).decode() if store.check([key]) else None

    return Peers(distributed.get_rank(), count, "PyTorch", store.set, hear, peek)


def _of_tensorflow() -> Peers | None:
    eager: Any = sys.modules.get("tensorflow.python.eager.context")
    if eager is None or "TF_CONFIG" not in os.environ:
        return None
    try:
        config = json.loads(os.environ["TF_CONFIG"])
        cluster, task = config["cluster"], config["task"]
        kinds = [kind for kind in ("chief", "worker") if kind in cluster]
        tasks = [(kind, index) for kind in kinds for index in range(len(cluster[kind]))]
        rank = tasks.index((task["type"], int(task["index"])))
    except (ValueError, KeyError, TypeError):
        return None  # TensorFlow says what is wrong with it; and an evaluator is no peer
    context = eager.context()
    if len(tasks) == 1 or context.coordination_service is None:
        return None

    def hear(key: str, limit_s: float) -> str:
        return context.get_config_key_value(key, int(limit_s * 1e3))

    def peek(key: str) -> str | None:
        try:
            return context.get_config_key_value(key, 10)
        except Exception:  # noqa: BLE001  TensorFlow's own error, that there is none
            return None

    say = context.set_config_key_value
    return Peers(rank, len(tasks), "TensorFlow", say, hear, peek)
