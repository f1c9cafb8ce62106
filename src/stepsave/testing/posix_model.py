"""What a file system may have kept of some operations when the power fails.

The model is the strict reading of POSIX that ALICE (Pillai et al., *All File Systems Are Not
Created Equal*, OSDI 2014) and CrashMonkey with B3 (Mohan et al., *Finding Crash-Consistency Bugs
with Bounded Black-Box Crash Testing*, OSDI 2018) search for bugs with:

- What was synced is there: the contents of a file after `fsync` or `fdatasync` of it, the entries
  of a directory after `fsync` of that.
- Each operation that was not synced is there or not, whatever became of those before and after it:
  data and the entries of directories become durable independently and in any order.
- A write that was not synced may be torn at a sector or a page, or have nothing but its length.
- A rename is never without both names. It may leave both, as on file systems without a journal.
- `fsync` of a new file does not make its entry durable, and that of a directory not its own entry.
- After a failed sync the kernel calls pages clean that may never reach the disk: what it was to
  make durable stays in doubt, also after a sync of the same file that succeeds.

File systems in use are kinder, each in ways of its own: who survives this survives them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping

__all__ = (
    "ROOT",
    "Blob",
    "Disk",
    "DropEntry",
    "Effect",
    "Grow",
    "Mark",
    "Operation",
    "Pending",
    "Rename",
    "Resize",
    "SetEntry",
    "Sync",
    "Tree",
    "Write",
    "outcomes_of",
)

ROOT = 0
"""The number of the directory that everything is in."""

_SECTOR_BYTES, _PAGE_BYTES = 512, 4096


class Blob:
    """Contents of a file, hashed once."""

    __slots__ = ("__dict__", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data

    @functools.cached_property
    def digest(self) -> bytes:
        return hashlib.blake2b(self.data, digest_size=16).digest()

    def written(self, offset: int, data: bytes) -> Blob:
        """With some bytes in it; what was not written before them is zeros."""
        head = self.data[:offset].ljust(offset, b"\0")
        return Blob(head + data + self.data[offset + len(data) :])

    def resized(self, size_bytes: int) -> Blob:
        """Cut, or with zeros behind it."""
        return Blob(self.data[:size_bytes].ljust(size_bytes, b"\0"))


@dataclasses.dataclass(frozen=True, slots=True)
class SetEntry:
    """A directory (`node`) has something (`child`) under a name."""

    node: int
    name: str
    child: int


@dataclasses.dataclass(frozen=True, slots=True)
class DropEntry:
    """A directory has something under a name no more."""

    node: int
    name: str
    child: int


@dataclasses.dataclass(frozen=True, slots=True)
class Rename:
    """Something gets a name in a directory (`node`), and loses the one in `source`."""

    node: int
    name: str
    child: int
    source: int
    old_name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """A file (`node`) has bytes at a place."""

    node: int
    offset: int
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Resize:
    """A file has a length."""

    node: int
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Grow:
    """A file has at least a length."""

    node: int
    size_bytes: int


Effect = SetEntry | DropEntry | Rename | Write | Resize | Grow


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """Something that was done, and is not durable before it is synced.

    Attributes:
        kind: `create`, `write`, `truncate`, `allocate`, `rename`, `link`, `unlink`, `mkdir` or
            `rmdir`.
        path: Of what, relative to the root, for people.
        effects: What it changes.
    """

    kind: str
    path: str
    effects: tuple[Effect, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Sync:
    """A sync of a file or of a directory.

    Attributes:
        path: Of what, for people.
        node: Of what.
        covers: How many entries the log had when it began: others may not be in it.
        failed: Whether it said so.
    """

    path: str
    node: int
    covers: int
    failed: bool = False

    @property
    def kind(self) -> str:
        return "failed sync" if self.failed else "sync"


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """Something that whoever records says: a step was acknowledged, say.

    Attributes:
        what: Which kind of thing.
        step: Of which step, if of any.
    """

    what: str
    step: int = -1

    @property
    def kind(self) -> str:
        return self.what

    @property
    def path(self) -> str:
        return f"step {self.step}" if self.step >= 0 else ""


class Tree:
    """Directories and files by number."""

    def __init__(self, entries: dict[int, dict[str, int]], contents: dict[int, Blob]) -> None:
        self.entries, self.contents = entries, contents

    @classmethod
    def of(cls, files: Mapping[str, bytes | None]) -> tuple[Tree, int]:
        """Builds one from paths, None for directories; returns it and the next free number."""
        tree, last = cls({ROOT: {}}, {}), ROOT
        for path, data in sorted(files.items()):
            directory, _, name = path.rpartition("/")
            parent = tree.find(directory)
            assert parent is not None, f"{path} without its directory"
            last += 1
            tree.entries[parent][name] = last
            if data is None:
                tree.entries[last] = {}
            else:
                tree.contents[last] = Blob(data)
        return tree, last + 1

    def copy(self) -> Tree:
        """A copy that shares nothing which changes."""
        entries = {node: dict(names) for node, names in self.entries.items()}
        return Tree(entries, dict(self.contents))

    def find(self, path: str) -> int | None:
        """The number of what is at a path."""
        node = ROOT
        for name in filter(None, path.split("/")):
            found = self.entries.get(node, {}).get(name)
            if found is None:
                return None
            node = found
        return node

    def walk(self, node: int = ROOT, at: str = "") -> Iterator[tuple[str, Blob | None]]:
        """Yields what can be reached, by path; None for directories."""
        for name, child in self.entries[node].items():
            path = at + name
            if child in self.entries:
                yield path, None
                yield from self.walk(child, f"{path}/")
            else:
                yield path, self.contents[child]

    def apply(self, effect: Effect) -> None:
        """Changes it."""
        match effect:
            case SetEntry(node, name, child):
                self._names(node)[name] = child
            case DropEntry(node, name, child):
                if self.entries[node].get(name) == child:
                    del self._names(node)[name]
            case Rename(node, name, child, source, old_name):
                self._names(node)[name] = child
                self.apply(DropEntry(source, old_name, child))
            case Write(node, offset, data):
                self.contents[node] = self.contents[node].written(offset, data)
            case Resize(node, size_bytes):
                self.contents[node] = self.contents[node].resized(size_bytes)
            case Grow(node, size_bytes):
                found = self.contents[node]
                self.contents[node] = found.resized(max(size_bytes, len(found.data)))

    def with_effects(self, effects: Iterable[Effect]) -> Tree:
        """Returns what it is after them; it stays as it is."""
        tree = Tree(dict(self.entries), dict(self.contents))
        owned: set[int] = set()
        for effect in effects:
            directories = (
                {effect.node, effect.source} if isinstance(effect, Rename) else {effect.node}
            )
            for node in directories & self.entries.keys() - owned:
                tree.entries[node] = dict(self.entries[node])
                owned.add(node)
            tree.apply(effect)
        return tree

    def _names(self, node: int) -> dict[str, int]:
        return self.entries[node]


@dataclasses.dataclass(slots=True)
class Pending:
    """An effect that is not known to be durable.

    Attributes:
        effect: The effect.
        operation: What it is of.
        number: Where in the log that is.
        in_doubt: Whether a sync of it failed: then none makes it durable any more.
        is_fixed: Whether it is durable, behind others of the same file that are not.
    """

    effect: Effect
    operation: Operation
    number: int
    in_doubt: bool = False
    is_fixed: bool = False


class Disk:
    """What is durable, and what is pending, as operations come.

    Attributes:
        durable: What a power cut leaves for sure.
        pending: What it leaves or not, in the order in which it was done.
    """

    def __init__(self, tree: Tree) -> None:
        """All of the tree is durable."""
        self.durable = tree.copy()
        self.pending: list[Pending] = []
        self._count = 0

    def do(self, operation: Operation | Sync | Mark) -> None:
        """Takes the next operation of a log."""
        if isinstance(operation, Operation):
            for effect in operation.effects:
                # What something new is made of is there if anything of it is.
                if isinstance(effect, SetEntry) and operation.kind == "mkdir":
                    self.durable.entries.setdefault(effect.child, {})
                elif isinstance(effect, SetEntry) and operation.kind == "create":
                    self.durable.contents.setdefault(effect.child, Blob(b""))
                self.pending.append(Pending(effect, operation, self._count))
        elif isinstance(operation, Sync):
            self._sync(operation)
        self._count += 1

    def tree(self, chosen: Iterable[Effect]) -> Tree:
        """Returns what is there if these are what became of the pending ones, in order."""
        return self.durable.with_effects(chosen)

    def _sync(self, sync: Sync) -> None:
        for one in self.pending:
            if one.effect.node != sync.node or one.number >= sync.covers:
                continue
            if sync.failed and not one.is_fixed:
                one.in_doubt = True
            elif not one.in_doubt:
                one.is_fixed = True
        left: list[Pending] = []
        before: set[tuple[int, str]] = set()
        for one in self.pending:
            touched = _touched(one.effect)
            if one.is_fixed and not touched & before:
                self.durable.apply(one.effect)
            else:
                left.append(one)
                before |= touched
        self.pending = left


def _touched(effect: Effect) -> set[tuple[int, str]]:
    if isinstance(effect, Rename):
        return {(effect.node, effect.name), (effect.source, effect.old_name)}
    return {(effect.node, effect.name if isinstance(effect, SetEntry | DropEntry) else "")}


def outcomes_of(pending: Pending) -> tuple[tuple[Effect, ...], ...]:
    """What may become of a pending effect: the first is nothing, the second all of it."""
    effect = pending.effect
    if pending.is_fixed:
        return ((effect,),)
    if isinstance(effect, Rename):
        return (), (effect,), (SetEntry(effect.node, effect.name, effect.child),)
    if not isinstance(effect, Write):
        return (), (effect,)
    node, offset, data = effect.node, effect.offset, effect.data
    size_bytes = len(data)
    cuts = {
        _SECTOR_BYTES,
        size_bytes // 2 // _PAGE_BYTES * _PAGE_BYTES,
        (size_bytes - 1) // _SECTOR_BYTES * _SECTOR_BYTES,
    }
    torn: list[tuple[Effect, ...]] = [(Grow(node, offset + size_bytes),)]
    for cut in sorted(cuts):
        if 0 < cut < size_bytes:
            torn.append((Write(node, offset, data[:cut]),))
            torn.append((Write(node, offset + cut, data[cut:]),))
    return (), (effect,), *torn
