"""The decoders of all that a backup says of itself, and what each of them must do.

A decoder raises one of the documented errors, which names the file; or what it returns, encoded
again, decodes to the same. It does so with little memory and in little time, whatever it is given.
"""

import json

import numpy as np

from proof.hostile import LEAVES
from stepsave.errors import CorruptBackupError
from stepsave.format.holding import decode_holding, encode_holding
from stepsave.format.layout import decode_layout, encode_layout
from stepsave.format.marker import decode_marker, encode_claim, encode_marker
from stepsave.format.orbax import saved_at_s
from stepsave.format.packing import pack, unpack
from stepsave.format.records import DTYPES, Claim, read_json
from stepsave.format.tree import decode_training

ARRAYS = [np.zeros(leaf.shape, DTYPES[leaf.dtype]) for leaf in LEAVES]
PATHS = [leaf.path for leaf in LEAVES]
SOURCE = "the/path"


def _training(data):
    document, notes = decode_training(data, SOURCE, PATHS, ARRAYS)
    return document, tuple(notes)


def _values(data):
    """As the metadata has them, which `decode_training` has read."""
    try:
        document = read_json(data)
    except ValueError as e:
        raise CorruptBackupError(f"{SOURCE}: {e}") from e
    return unpack(document, ARRAYS)


def _time(data):
    try:
        return saved_at_s(data)
    except ValueError as e:  # as `examining` takes it
        raise CorruptBackupError(f"{SOURCE}: {e}") from e


def _encode_marker(found):
    return encode_claim(found) if isinstance(found, Claim) else encode_marker(*found)


def _encode_time(found):
    time_ns = min(round(found * 1e9), 2**63 - 1)  # a float of the largest is larger
    return json.dumps({"commit_timestamp_nsecs": time_ns}).encode()


DECODERS = {
    "marker": lambda data: decode_marker(data, SOURCE),
    "claim": lambda data: decode_marker(data, SOURCE),
    "layout": lambda data: decode_layout(data, SOURCE),
    "training": _training,
    "holding": lambda data: decode_holding(data, SOURCE),
    "values": _values,
    "time": _time,
}
ENCODERS = {
    "marker": _encode_marker,
    "claim": _encode_marker,
    "layout": encode_layout,
    "training": lambda found: json.dumps(found[0]).encode(),
    "holding": encode_holding,
    "values": lambda found: json.dumps(pack(found)).encode(),
    "time": _encode_time,
}


def fault_of(kind, data):
    """What is wrong with how a decoder takes some bytes; an empty text if nothing is."""
    try:
        found = DECODERS[kind](data)
    except CorruptBackupError as e:
        # Of a value in the metadata, whoever unpacks it knows the file.
        is_named = SOURCE in str(e) or kind == "values"
        return "" if is_named else f"refused without the name: {e}"
    except Exception as e:  # noqa: BLE001  any other is a finding
        return _name(e)
    try:
        encoded = ENCODERS[kind](found)
        again = ENCODERS[kind](DECODERS[kind](encoded))
    except Exception as e:  # noqa: BLE001
        return f"what it has become cannot be read again: {_name(e)}"
    return "" if encoded == again else "not the same when read again"


def _name(error):
    """A text that is the same for one fault, and another for another."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    code = frame.tb_frame.f_code
    return f"{type(error).__name__} in {code.co_name}"
