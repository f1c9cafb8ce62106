"""Training data, and how to come back to a place in it.

Each kind of data that `fit` takes is positioned in its own way. Where it can seek, it seeks;
everywhere else batches are read and passed over, which costs time but not exactness.
"""

from __future__ import annotations

from stepsave.fit.keras_data import EpochData
from stepsave.fit.sources.indexed import ArraySource, LoaderSource, PyDatasetSource
from stepsave.fit.sources.sequential import GeneratorSource, GrainSource, TensorFlowSource
from stepsave.fit.sources.source import Source

__all__ = ("Source", "source_for")

_SOURCES: dict[str, type[Source]] = {
    "ArrayDataAdapter": ArraySource,
    "PyDatasetAdapter": PyDatasetSource,
    "TFDatasetAdapter": TensorFlowSource,
    "TorchDataLoaderAdapter": LoaderSource,
    "GrainDatasetAdapter": GrainSource,
    "GeneratorDataAdapter": GeneratorSource,
}


def source_for(data: EpochData) -> Source:
    """Returns what positions this data."""
    return _SOURCES.get(type(data.adapter).__name__, Source)(data)
