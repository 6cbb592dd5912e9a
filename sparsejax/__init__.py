"""Sparse training for JAX, and the small dense models that it ends in.

Subpackages are imported at first use: `sparsejax.serving` runs where neither Flax nor
optax is wanted.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsejax import (
        analysis,
        compaction,
        distributions,
        lottery,
        masks,
        models,
        recipes,
        saliency,
        schedules,
        serving,
        sparse_optax,
    )

__all__ = [
    "analysis",
    "compaction",
    "distributions",
    "lottery",
    "masks",
    "models",
    "recipes",
    "saliency",
    "schedules",
    "serving",
    "sparse_optax",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
