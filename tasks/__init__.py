"""Task distributions: families of related environments behind one interface and a registry of names.

Importing this package registers the built-in families. It needs gymnasium and NumPy, nothing else.
"""

from __future__ import annotations

from . import cartpole, navigation
from .base import BatchedEnv, ReferenceReturns, Task, TaskDistribution, make, names, register

__all__ = [
    "BatchedEnv",
    "ReferenceReturns",
    "Task",
    "TaskDistribution",
    "cartpole",
    "make",
    "names",
    "navigation",
    "register",
]
