"""Put the native module into a wheel where it can be built; make a pure wheel where it cannot.

An editable installation gets the module beside its sources. ``SNIPDEDUP_NATIVE=0`` builds none.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPILERS = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
WANTED = os.environ.get("SNIPDEDUP_NATIVE") != "0"


class NativeModule(BuildHookInterface):
    """Builds ``snipdedup.native._kernels`` by scripts/build_native.py."""

    def dependencies(self) -> list[str]:
        """Name what the build needs, unless there is no compiler to use it."""
        if not WANTED or not any(map(shutil.which, COMPILERS)):
            return []
        needed = ["nanobind>=2.4"]
        if not shutil.which("cmake"):
            needed.append("cmake")
        if not shutil.which("ninja") and not shutil.which("make"):
            needed.append("ninja")
        return needed

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the module; a build that fails leaves the wheel as it is."""
        if not WANTED or self.target_name != "wheel":
            return
        self.scratch = tempfile.TemporaryDirectory()  # lives until the wheel is written
        out = Path(self.root, "snipdedup/native")
        if version != "editable":
            out = Path(self.scratch.name, "out")
        script = [sys.executable, "scripts/build_native.py", "--out", out]
        work = ["--work", Path(self.scratch.name, "work")]
        if subprocess.run([*script, *work], cwd=self.root, check=False).returncode:
            self.app.display_warning("no native module: numpy and torch do its work, more slowly")
        elif version != "editable":
            module = next(out.glob("_kernels*"))
            build_data["force_include"][str(module)] = f"snipdedup/native/{module.name}"
            build_data.update(pure_python=False, infer_tag=True)
