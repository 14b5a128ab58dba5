"""Kernels in C++ where they were built; elsewhere ``kernels`` is None and numpy does the work."""

from __future__ import annotations

import os
from types import ModuleType

kernels: ModuleType | None
try:
    if os.environ.get("SNIPDEDUP_NATIVE") == "0":
        raise ImportError
    from snipdedup.native import _kernels as kernels
except ImportError:
    kernels = None
