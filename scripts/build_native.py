"""Build the native module ``snipdedup.native._kernels`` in place, or again after a change.

usage: python scripts/build_native.py [--sanitize]

Needs a C++17 compiler, cmake and nanobind (``pip install nanobind``; it is in the extra ``test``).
``SNIPDEDUP_NATIVE=0`` makes snipdedup run without the module. ``--sanitize`` builds it with the
address and undefined-behaviour sanitizers; the script prints how to run tests under them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNDER_SANITIZERS = """\
run the tests under the sanitizers, then build again without --sanitize:
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" \\
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \\
  python -m pytest -n0 tests/native"""


def main(argv: list[str] | None = None) -> int:
    """Run cmake; return 1, and leave no module, if it fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "snipdedup/native", help="for the module"
    )
    work = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    parser.add_argument("--work", type=Path, default=work, help="for cmake's files")
    args = parser.parse_args(argv)
    try:
        build(args.out, args.work, sanitize=args.sanitize)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        # A module that does not fit its sources must not be imported.
        (args.out / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        print(f"the native module was not built: {error}", file=sys.stderr)
        return 1
    if args.sanitize:
        print(UNDER_SANITIZERS)
    return 0


def build(out: Path, work: Path, *, sanitize: bool) -> None:
    """Write the module of this Python to the folder ``out``."""
    import nanobind

    # cmake and ninja of PyPI lie beside the Python of their environment
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise FileNotFoundError("expected cmake, found none on PATH; run: pip install cmake ninja")
    settings = {
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out.resolve(),
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": nanobind.cmake_dir(),
        "SNIP_SANITIZE": "ON" if sanitize else "OFF",
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "PATH": path}
    configure = [cmake, "-S", str(ROOT), "-B", str(work), *generator, *defined]
    for command in (configure, [cmake, "--build", str(work), "--parallel"]):
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    sys.exit(main())
