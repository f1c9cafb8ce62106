"""The JSON from which stock Keras rebuilds a model beside its backup."""

from __future__ import annotations

import json
import logging
from typing import Any, cast

from stepsave.fit import keras_internals
from stepsave.fit.keras_saving import no_import_of_tensorflow

__all__ = ("model_config",)

_logger = logging.getLogger("stepsave")


def model_config(model: Any) -> str | None:
    """Returns the JSON from which `keras.saving.load_model` rebuilds a model.

    Returns:
        None if the model cannot be serialised, holds assets (vocabularies), which a backup
        does not carry, or would be rebuilt with other names and so without its values.
    """
    if any(hasattr(layer, "save_assets") for layer in keras_internals.flatten_layers(model)):
        _logger.info("%r has assets: its backups load with load_weights only", model.name)
        return None
    try:
        with no_import_of_tensorflow():
            config = json.loads(model.to_json())
    except Exception as e:  # noqa: BLE001  any layer's get_config may raise anything
        _logger.info(
            "%r cannot be serialised: its backups load with load_weights only: %r", model.name, e
        )
        return None
    if _nests_sequential(config):
        _logger.info(
            "%r nests Sequential models, whose variables Keras names otherwise when it "
            "rebuilds them: its backups load with load_weights only",
            model.name,
        )
        return None
    config["config"] = _drop_build_configs(config["config"])
    return json.dumps(config)


def _nests_sequential(config: Any, *, inside: bool = False) -> bool:
    if isinstance(config, list):
        return any(_nests_sequential(item, inside=inside) for item in cast("list[Any]", config))
    if not isinstance(config, dict):
        return False
    entries = cast("dict[str, Any]", config)
    is_sequential = entries.get("class_name") == "Sequential"
    if is_sequential and inside:
        return True
    inside |= is_sequential
    return any(_nests_sequential(value, inside=inside) for value in entries.values())


def _drop_build_configs(config: Any) -> Any:
    """Drops what says how to build each inner layer by itself.

    With it Keras (3.15) builds inner layers of `Sequential` models and of wrappers before
    what holds them, so that their variables lose the outer names; `load_model` from an Orbax
    directory then finds no values for them, and says nothing. Without it the whole model is
    built at once, as it was at first.
    """
    if isinstance(config, list):
        return [_drop_build_configs(item) for item in cast("list[Any]", config)]
    if not isinstance(config, dict):
        return config
    return {
        key: _drop_build_configs(value)
        for key, value in cast("dict[str, Any]", config).items()
        if key not in ("build_config", "build_input_shape")
    }
