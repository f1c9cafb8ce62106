"""What Keras's `save_weights` walks: the objects below a model that have a state of their own.

Like `keras_internals` this touches what Keras keeps private; `tests/fit/test_saveables.py` fails
when Keras changes it. The walk is that of `_save_state` in keras/src/saving/saving_lib.py, so that
nothing is left out that it finds.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from typing import Any, cast

import keras

__all__ = (
    "carried_states",
    "derive_values",
    "has_own_way",
    "kind_of",
    "no_import_of_tensorflow",
    "own_variables",
    "walk",
)

Path = tuple[str, ...]


def walk(model: Any) -> Iterator[tuple[Path, Any]]:
    """Yields each object whose state Keras saves with a model, once, with its path.

    Paths are made of names of attributes and classes: they do not depend on names of layers, nor on
    when these were built.
    """
    from keras.src.saving import keras_saveable

    visited: set[int] = set()
    children = _Children()

    def visit(saveable: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if id(saveable) in visited:
            return
        visited.add(id(saveable))
        yield path, saveable
        for name, child in children.of(saveable):
            if isinstance(child, keras_saveable.KerasSaveable):
                yield from visit(child, (*path, name))
            elif isinstance(child, (list, dict, tuple)):
                yield from visit_all(cast("Any", child), (*path, name), set())

    def visit_all(container: Any, path: Path, outer: set[int]) -> Iterator[tuple[Path, Any]]:
        if id(container) in outer:
            return  # it holds itself
        outer.add(id(container))
        used: dict[str, int] = {}
        for child in list(container.values()) if isinstance(container, dict) else container:
            is_saveable = isinstance(child, keras_saveable.KerasSaveable)
            if is_saveable or isinstance(child, (list, dict, tuple)):
                name = _unique_name(child if is_saveable else None, used)
                inner = visit(child, (*path, name)) if is_saveable else None
                yield from inner or visit_all(child, (*path, name), outer)

    yield from visit(model, ())


class _Children:
    """What `_walk_saveable` yields, finding out once what it skips, and not for each object."""

    def __init__(self) -> None:
        self._skipped: dict[str, set[str]] = {}
        self._inherited: dict[type, set[str]] = {}

    def of(self, saveable: Any) -> Iterator[tuple[str, Any]]:
        from keras.src.saving import saving_lib

        kind, own = saveable._obj_type(), vars(saveable)
        if kind not in self._skipped:
            self._skipped[kind] = set(saving_lib.get_attr_skipset(kind))
        if type(saveable) not in self._inherited:
            self._inherited[type(saveable)] = set(dir(type(saveable)))
        if kind in ("Sequential", "Functional"):
            yield "layers", saveable.layers
        # torch keeps layers that are attributes apart.
        names = self._inherited[type(saveable)].union(own, own.get("_modules", ()))
        names = [name for name in names - self._skipped[kind] if not name.startswith("__")]
        for name in sorted(names, key=saving_lib._name_key):  # pyright: ignore[reportPrivateUsage]
            try:
                child = getattr(saveable, name)
            except Exception:  # noqa: BLE001, S112  a property's; Keras passes over it too
                continue
            yield name, child


def _unique_name(saveable: Any, used: dict[str, int]) -> str:
    from keras.src.utils import naming

    kind = "container" if saveable is None else naming.to_snake_case(type(saveable).__name__)
    number = used[kind] = used.get(kind, -1) + 1
    return f"{kind}_{number}" if number else kind


def kind_of(saveable: Any) -> str:
    """What an object is: `"optimizer"`, `"metric"` or `"layer"`; else the name of its class."""
    for kind, keras_class in (
        ("optimizer", keras.optimizers.Optimizer),
        ("metric", keras.metrics.Metric),
        ("layer", keras.layers.Layer),
    ):
        if isinstance(saveable, keras_class):
            return kind
    return type(saveable).__name__


def own_variables(saveable: Any) -> list[Any]:
    """The variables of an object itself, without those of what it holds; torch's buffers too."""
    kind = kind_of(saveable)
    if kind == "layer":
        variables = [*saveable._trainable_variables, *saveable._non_trainable_variables]
        return variables + _buffers(saveable)
    return list(saveable.variables) if kind in ("optimizer", "metric") else []


def carried_states(saveable: Any) -> list[Any]:
    """What a stateful RNN carries from batch to batch; Keras does not save it."""
    states = keras.tree.flatten(getattr(saveable, "states", None)) if _is_layer(saveable) else ()
    return [state for state in states if isinstance(state, keras.Variable)]


def _is_layer(saveable: Any) -> bool:
    return isinstance(saveable, keras.layers.Layer)


def _buffers(layer: Any) -> list[Any]:
    if keras.backend.backend() != "torch" or type(layer).__name__ != "TorchModuleWrapper":
        return []
    module = layer.module
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = module.state_dict()  # its tensors are the module's own
    return [
        _Buffer(name, value)
        for name, value in state.items()
        if name not in parameters and hasattr(value, "copy_")
    ]


class _Buffer:
    """A buffer of a torch module, such as the statistics of a `BatchNorm`, like a variable."""

    def __init__(self, path: str, tensor: Any) -> None:
        self.path = path
        self.value = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = str(tensor.dtype).removeprefix("torch.")

    def assign(self, value: Any) -> None:
        self.value.detach().copy_(keras.ops.convert_to_tensor(value, dtype=self.dtype))


def has_own_way(saveable: Any) -> bool:
    """Whether an object saves or loads itself in a way of its own, not just by its variables.

    Keras's own layers that do so (quantized ones, say) have nothing but variables, except for
    the weights of `tf_idf`.
    """
    for name in ("save_own_variables", "load_own_variables"):
        module = getattr(getattr(type(saveable), name, None), "__module__", "keras.src.")
        if not module.startswith("keras.src.") or module.endswith(".index_lookup"):
            return True
    return False


def derive_values(saveable: Any) -> None:
    """Has a layer renew what it derives from its variables, as when Keras loads them."""
    if isinstance(saveable, keras.layers.Normalization) and saveable.built:
        saveable.finalize_state()


@contextlib.contextmanager
def no_import_of_tensorflow() -> Generator[None, None, None]:
    """Has Keras serialise without importing TensorFlow, where that is installed but not in use.

    It does so, which takes seconds, only to ask whether something is of a type of TensorFlow's.
    Nothing can be before it was imported.
    """
    from keras.src.utils import module_utils

    lazy: Any = module_utils.tensorflow
    if "tensorflow" in sys.modules or getattr(lazy, "_available", True) is not None:
        yield
        return
    lazy._available = False
    try:
        yield
    finally:
        lazy._available = None
