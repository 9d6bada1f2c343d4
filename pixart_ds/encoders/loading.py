"""Loading a model so that a damaged checkpoint is an error: the libraries fill weights that it lacks with random numbers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch


def load_whole(load: Callable[..., Any], folder: str, *, own: str | None = None, **options: Any) -> Any:
    """A model of transformers or diffusers, each of whose weights the checkpoint holds.

    Args:
        load: `from_pretrained` of the model's class.
        folder: Folder or hub name.
        own: Begins the names of weights for which the class must have a place; None: others are passed over.
        options: For `load`.

    Raises:
        ValueError: Weights are missing, cannot be read, or are of another kind of model.
        OSError: There is no such model.
    """
    from safetensors import SafetensorError

    try:
        model, told = load(folder, output_loading_info=True, **options)
    except (SafetensorError, pickle.UnpicklingError, EOFError) as cause:
        raise ValueError(f"its weights cannot be read: {cause}; copy or fetch them again") from cause
    except RuntimeError as cause:  # of other shapes, a torn archive; the host's memory is no fault of the model
        if isinstance(cause, torch.OutOfMemoryError) or "allocate memory" in str(cause):
            raise
        raise ValueError(f"its weights cannot be loaded: {cause}") from cause
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"its checkpoint lacks {len(missing)} weights of a {type(model).__name__}, {_first(missing)}")
    if own is not None and (foreign := sorted(key for key in told["unexpected_keys"] if key.startswith(own))):
        raise ValueError(f"it holds weights for which a {type(model).__name__} has no place, {_first(foreign)}")
    return model


def _first(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"the first is {keys[0]}"
