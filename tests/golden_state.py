"""The state of the golden backups. Must never change: it says what old backups hold.

    python tests/golden_state.py DIRECTORY

writes a backup of it, as was done once for each format version.
"""

import sys

import numpy as np

import stepsave
from stepsave.format.records import DTYPES

STEP = 1200
METADATA = {"epoch": 3, "note": "größer als 1 MiB? no", "values": [1, 2.5, None, True]}


def state():
    made = {name: (np.arange(12).reshape(3, 4) % 2).astype(dtype) for name, dtype in DTYPES.items()}
    counting = np.arange(1000, dtype=np.float32) / 7
    return {
        "dtypes": made,
        "nested": {"a/b": {"ü": counting}, "scalar": np.array(2.5), "empty": np.zeros((0, 3))},
    }


if __name__ == "__main__":
    with stepsave.Checkpointer(sys.argv[1]) as saver:
        saver.save(STEP, state(), METADATA).wait()
