"""The state of the global random generators: Python's, NumPy's, torch's, TensorFlow's, Keras's.

JAX has none: its keys are values, to be saved like any other array. The same holds for
generators that a program makes itself, such as `numpy.random.default_rng()`.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from stepsave.errors import CorruptBackupError
from stepsave.format.packing import pack, unpack

__all__ = ("RngState", "capture", "hand_in_keras", "moved", "restore")

_ON_HOST = ("python", "numpy", "torch")

_keras: tuple[Callable[[], Any], Callable[[Any], None]] | None = None


def hand_in_keras(get: Callable[[], Any], put: Callable[[Any], None]) -> None:
    """Has Keras's global seed generator captured and restored with the others from now on.

    Where Keras keeps it only `stepsave.fit` knows, which calls this when it is imported.

    Args:
        get: Returns its state on the host; None if it was not used yet.
        put: Makes it go on from a state.
    """
    global _keras  # noqa: PLW0603  there is one global generator
    _keras = get, put


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RngState:
    """What the global generators will draw next; None where a library is not imported.

    Attributes:
        python: Of `random`: version, words of the Mersenne twister, the other Gaussian.
        numpy: Of `numpy.random`.
        torch: Of torch's generator on the CPU, bytes.
        torch_cuda: Of torch's generator on each CUDA device, if CUDA is in use.
        tensorflow: Of the generator that seeds TensorFlow's eager random operations.
        tensorflow_generator: Of `tf.random.get_global_generator()`, if it exists.
        keras: Of Keras's global seed generator, if it exists, was asked for, and `stepsave.fit`
            is imported, which knows where Keras keeps it.
    """

    python: Any
    numpy: Any
    torch: Any = None
    torch_cuda: Any = None
    tensorflow: Any = None
    tensorflow_generator: Any = None
    keras: Any = None

    def to_json(self) -> dict[str, Any]:
        """Returns a document for the metadata of a backup, of about 10 KB."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: pack(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, document: Any) -> RngState:
        """Raises `CorruptBackupError` if the document is not what `to_json` returns."""
        try:
            return cls(**{name: unpack(value) for name, value in document.items()})
        except (TypeError, AttributeError) as e:
            raise CorruptBackupError(
                f"Expected states of random generators in the backup, found {document!r:.200}."
            ) from e


def capture(*, keras: bool = True) -> RngState:
    """Returns the present state of the global random generators.

    Args:
        keras: Whether to read Keras's global seed generator too. It lives on the device:
            on a GPU with torch reading it waits for what was queued before.
    """
    tensorflow, generator = _capture_tensorflow()
    torch, cuda = _capture_torch()
    version, words, gauss = random.getstate()
    return RngState(
        python=(version, np.array(words, np.uint32), gauss),
        numpy=np.random.get_state(legacy=False),  # noqa: NPY002  the global one is the point
        torch=torch,
        torch_cuda=cuda,
        tensorflow=tensorflow,
        tensorflow_generator=generator,
        keras=None if _keras is None or not keras else _keras[0](),
    )


def moved(before: RngState, after: RngState) -> frozenset[str]:
    """Names of those of Python's, NumPy's and torch's generators that were drawn from between."""
    then, now = before.to_json(), after.to_json()
    return frozenset(name for name in _ON_HOST if then.get(name) != now.get(name))


def restore(state: RngState, *, leave: Collection[str] = ()) -> None:
    """Makes the global random generators go on from `state`.

    Generators of libraries that are not imported now, or were not then, are left alone.

    Args:
        state: What `capture` returned.
        leave: Names, as `moved` returns them, of generators to leave alone.

    Raises:
        CorruptBackupError: If a generator refuses the state.
    """
    try:
        if "python" not in leave:
            version, words, gauss = state.python
            random.setstate((version, tuple(int(word) for word in words), gauss))
        if "numpy" not in leave:
            np.random.set_state(state.numpy)  # noqa: NPY002
        if "torch" not in leave:
            _restore_torch(state)
        _restore_tensorflow(state)
    except (TypeError, ValueError, RuntimeError, KeyError) as e:
        raise CorruptBackupError(f"A random generator refuses its saved state: {e}.") from e
    if state.keras is not None and _keras is not None:
        _keras[1](state.keras)


def tensorflow_seed() -> int | None:
    """TensorFlow's global seed; None if none is set, -1 where it cannot be told."""
    return getattr(_tensorflow_context(), "_seed", -1)


def _capture_torch() -> tuple[Any, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return None, None
    cuda = None
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda = [state.numpy() for state in torch.cuda.get_rng_state_all()]
    return torch.get_rng_state().numpy(), cuda


def _restore_torch(state: RngState) -> None:
    torch = sys.modules.get("torch")
    if torch is None or state.torch is None:
        return
    torch.set_rng_state(torch.from_numpy(np.array(state.torch)))
    if state.torch_cuda is not None and torch.cuda.is_available():
        # As many devices as there are now: a resumed run may have fewer.
        for device, words in enumerate(state.torch_cuda[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(torch.from_numpy(np.array(words)), device)


def _tensorflow_context() -> Any:
    """TensorFlow's eager context, where `tf.random.set_seed` keeps a Python generator.

    Private; without it eager random operations of TensorFlow are not repeated exactly.
    """
    if "tensorflow" not in sys.modules:
        return None
    module = sys.modules.get("tensorflow.python.eager.context")
    return None if module is None else module.context()


def _tensorflow_generator() -> Any:
    # Not `tf.random.get_global_generator`, which makes one.
    module = sys.modules.get("tensorflow.python.ops.stateful_random_ops")
    return getattr(module, "global_generator", None)


def _capture_tensorflow() -> tuple[Any, Any]:
    context, generator = _tensorflow_context(), _tensorflow_generator()
    rng = getattr(context, "_rng", None)  # None if no seed was set
    state = None
    if rng is not None:
        version, words, gauss = rng.getstate()
        state = (version, np.array(words, np.uint32), gauss)
    return state, None if generator is None else generator.state.numpy()


def _restore_tensorflow(state: RngState) -> None:
    rng = getattr(_tensorflow_context(), "_rng", None)
    if rng is not None and state.tensorflow is not None:
        version, words, gauss = state.tensorflow
        rng.setstate((version, tuple(int(word) for word in words), gauss))
    generator = _tensorflow_generator()
    if generator is not None and state.tensorflow_generator is not None:
        generator.reset(state.tensorflow_generator)
