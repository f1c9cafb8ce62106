"""What stepsave tells its users when something is wrong: found in its source, not by running it.

A message is the text of an error or a warning, with `…` where facts are put in. A name is followed
to what was assigned to it, and a parameter to what callers pass, so a text may be put together
anywhere in its module.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from stepsave import errors

SOURCE = Path(errors.__file__).parent
GAP = "…"
_OWN = frozenset(errors.__all__) - {"Preempted"}  # which writes its text itself
# What callers within stepsave catch, or what tells that the program is wrong.
_NOT_FOR_USERS = {
    "AssertionError", "AttributeError", "NotImplementedError", "StopIteration",
    "InterruptedError",  # ends threads that read after Ctrl-C, when nobody waits for them any more
}  # fmt: skip
_TELLS_LETTERS = 9  # a text with fewer is made elsewhere
# Texts that are handed over: where and under which name they arrive, and what makes them.
_MADE_BY = {
    ("fit/resuming.py", "change"): ("fit/data_position.py", "describe_change"),
    ("fit/resuming.py", "doubt"): ("fit/phases.py", "doubt"),
    ("engine/checkpointer.py", "lost"): ("engine/newest.py", "_tell_loss"),
}


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Message:
    """A text that users meet, and where it is."""

    kind: str  # "" if it is found out only at run time
    text: str
    place: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Site:
    call: ast.Call
    kind: str
    texts: list[ast.expr]


class _Module:
    def __init__(self, path: Path) -> None:
        self.path = path.relative_to(SOURCE).as_posix()
        self.tree = ast.parse(path.read_text())
        self.parents = {
            child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)
        }

    def messages(self) -> Iterator[Message]:
        for site in self.sites():
            if self.quotes_an_error(site):
                continue
            passed_on = self.parameter_of(site)
            for told in self.callers(*passed_on, site.kind) if passed_on else (site,):
                where = f"{self.path}:{told.call.lineno}"
                for parts in itertools.product(*map(self.texts_of, told.texts)):
                    yield Message(told.kind, _joined(GAP.join(parts)), where)

    def sites(self) -> Iterator[_Site]:
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in _OWN:
                yield _Site(node, name, node.args[:1])
            elif ast.unparse(node.func) == "warnings.warn":
                yield _Site(node, _category(node), node.args[:1])
            elif isinstance(self.parents[node], ast.Raise | ast.Return):
                if self.is_builtin_for_users(name) and not self.is_of_the_system(node):
                    yield _Site(node, name, node.args)
                elif isinstance(self.parents[node], ast.Raise) and self.assigned(name, node):
                    yield _Site(node, "", node.args)

    def is_of_the_system(self, call: ast.Call) -> bool:
        """Whether it looks like what the operating system raises, for code that expects that."""
        return bool(call.args) and ast.unparse(call.args[0]).startswith("errno.")

    def is_builtin_for_users(self, name: str) -> bool:
        is_error = inspect.isclass(found := getattr(builtins, name, None)) and issubclass(
            found, Exception
        )
        # Whoever calls the pure format quotes what it says, in an error of stepsave's own.
        is_quoted = self.path.startswith("format/")
        return is_error and not is_quoted and name not in _NOT_FOR_USERS

    def function_of(self, node: ast.AST) -> ast.FunctionDef | None:
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.FunctionDef):
                return node
        return None

    def parameter_of(self, site: _Site) -> tuple[str, int] | None:
        """Function and number of the parameter that a text is, if it is one."""
        function = self.function_of(site.call)
        if function is None or not self.tells_little(site):
            return None
        names = [one.arg for one in function.args.args]
        names = names[1:] if names[:1] == ["self"] else names
        used = _names_in(site.texts) & set(names)
        return (function.name, names.index(used.pop())) if used else None

    def quotes_an_error(self, site: _Site) -> bool:
        """Whether it only adds a place to what it caught, whose text is a message itself."""
        node: ast.AST = site.call
        while not isinstance(node, ast.ExceptHandler | ast.FunctionDef) and node in self.parents:
            node = self.parents[node]
        caught = node.name if isinstance(node, ast.ExceptHandler) else None
        return caught in _names_in(site.texts) and self.tells_little(site)

    def tells_little(self, site: _Site) -> bool:
        own = [
            node.value
            for text in site.texts
            for node in ast.walk(text)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        return len(re.findall(r"\w", "".join(own))) < _TELLS_LETTERS

    def callers(self, name: str, number: int, kind: str) -> Iterator[_Site]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name:
                yield _Site(node, kind, [node.args[number]])

    def assigned(self, name: str, node: ast.AST) -> list[ast.expr]:
        function = self.function_of(node)
        if function is None:
            return []
        return [
            one.value
            for one in ast.walk(function)
            if isinstance(one, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == name for t in one.targets)
            and not _is_within(node, one)
        ]

    def texts_of(self, node: ast.expr) -> list[str]:
        """All texts that an expression may be."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.FormattedValue():
                return self.texts_of(node.value)
            case ast.JoinedStr():
                return self.products(node.values)
            case ast.Tuple():
                return [text for one in node.elts for text in self.texts_of(one)]
            case ast.BinOp(op=ast.Add()):
                return self.products([node.left, node.right])
            case ast.IfExp():
                return self.texts_of(node.body) + self.texts_of(node.orelse)
            case ast.Name():
                return self.texts_of_name(node)
            case ast.Call(func=ast.Attribute(attr="format", value=template)):
                return [re.sub(r"\{.*?\}", GAP, text) for text in self.texts_of(template)]
            case ast.Call(func=ast.Attribute(attr="text" | "_text")):  # adds who says it
                return [GAP + text + GAP for text in self.products(node.args)]
        return [GAP]

    def texts_of_name(self, node: ast.Name) -> list[str]:
        if (self.path, node.id) in _MADE_BY:
            return list(_returned_by(*_MADE_BY[self.path, node.id]))
        if values := self.assigned(node.id, node):
            return [text for value in values for text in self.texts_of(value)]
        values = self.constants(node.id) or [
            value
            for module in _modules()
            if not node.id.startswith("_")
            for value in module.constants(node.id)
        ]
        return [text for value in values for text in self.texts_of(value)] or [GAP]

    def constants(self, name: str) -> list[ast.expr]:
        """What is assigned to a name at the head of the module."""
        return [
            node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
        ]

    def products(self, nodes: list[ast.expr]) -> list[str]:
        return ["".join(parts) for parts in itertools.product(*map(self.texts_of, nodes))]


@functools.cache
def _modules() -> tuple[_Module, ...]:
    paths = sorted(SOURCE.rglob("*.py"))
    return tuple(_Module(path) for path in paths if "demo" not in path.parts)


def _returned_by(path: str, name: str) -> Iterator[str]:
    (module,) = (module for module in _modules() if module.path == path)
    functions = (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef))
    (function,) = (function for function in functions if function.name == name)
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            texts = module.texts_of(node.value)
            yield from (text for text in texts if len(text) > _TELLS_LETTERS)


def messages() -> list[Message]:
    """Returns what stepsave may say, sorted by kind and text."""
    return sorted({message for module in _modules() for message in module.messages()})


def _is_within(node: ast.AST, other: ast.AST) -> bool:
    return any(one is node for one in ast.walk(other))


def _category(call: ast.Call) -> str:
    named = call.args[1:2] + [one.value for one in call.keywords if one.arg == "category"]
    return ast.unparse(named[0]) if named else "UserWarning"


def _names_in(texts: list[ast.expr]) -> set[str]:
    return {node.id for text in texts for node in ast.walk(text) if isinstance(node, ast.Name)}


def _joined(text: str) -> str:
    return re.sub(rf"{GAP}(\W{{0,2}}{GAP})*", GAP, " ".join(text.split()))
