"""For tests of your own: what every store must do, stores that fail, and what crashes leave."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepsave.testing.bucket_contract import BucketStoreContract
    from stepsave.testing.contract import StoreContract
    from stepsave.testing.faults import Died, FaultStore
    from stepsave.testing.local_contract import LocalStoreContract

__all__ = ("BucketStoreContract", "Died", "FaultStore", "LocalStoreContract", "StoreContract")

_HOMES = {
    "BucketStoreContract": "bucket_contract",
    "Died": "faults",
    "FaultStore": "faults",
    "LocalStoreContract": "local_contract",
    "StoreContract": "contract",
}


def __getattr__(name: str) -> Any:
    # Imported when it is used: of a contract, `pytest` can still be told to rewrite the assertions.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
