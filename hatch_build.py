"""Put the native module into a wheel where it can be built; make a pure wheel where it cannot.

The README gets links that hold on a package index: absolute ones if pyproject.toml names a
``Repository`` among the URLs, else none, and no pictures.

An editable installation gets the module beside its sources. ``SNIPDEDUP_NATIVE=0`` builds none.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

COMPILERS = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
WANTED = os.environ.get("SNIPDEDUP_NATIVE") != "0"


RELATIVE = re.compile(
    r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)"
)  # a link or picture of this project


class IndexReadme(MetadataHookInterface):
    """Adds README.md with links that hold anywhere."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the readme."""
        home = metadata.get("urls", {}).get("Repository")
        text = Path(self.root, "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": anywhere(text, home)}


def anywhere(text: str, home: str | None) -> str:
    """Return Markdown with relative links below ``home``; without one, with their words alone."""

    def place(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        if home is None:
            return "" if picture else words
        return f"{picture}[{words}]({home}/{'raw' if picture else 'blob'}/main/{path})"

    return RELATIVE.sub(place, text)


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
