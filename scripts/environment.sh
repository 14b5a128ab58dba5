# Makes .venv in the project's folder, or finds that it stands already (.venv-lowest for the lowest
# versions); sourced by the scripts beside it. What pip is told by its own variables and
# configuration (indexes, wheels, certificates) holds, so a machine's usual way to the CPU or the
# CUDA build of torch works here too.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
    # ensurepip too: some Linux distributions ship Python without what a venv needs
    if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      echo "$name"
      return
    fi
  done
  echo "expected Python 3.11 or newer with venv, found none among python3, python3.11 ...;" \
    "install it (Debian, Ubuntu: apt install python3 python3-venv) or name it: PYTHON=/path" >&2
  return 1
}

# Prints what an installation depends on: a venv that was moved must be made anew. The installation
# builds the native module beside its sources.
wanted() {
  echo "$root"
  (cd "$root" && cat pyproject.toml constraints.txt CMakeLists.txt hatch_build.py \
    snipdedup/native/cpp/*.?pp)
}

# make_environment TARGET: install "." or ".[test]", unless that was done already.
make_environment() {
  local stamp="$venv/installed" python
  if [ "$1" != ".[test]" ] && wanted | cmp -s - "$stamp.[test]"; then
    return # the test environment holds the plain one
  fi
  if wanted | cmp -s - "$stamp$1"; then
    return
  fi
  if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
    python=$(find_python)
    echo "making $venv with $("$python" --version)" >&2
    "$python" -m venv --clear "$venv"
  fi
  echo "installing snipdedup into $venv; torch is large, the first time takes minutes" >&2
  (cd "$root" && "$venv/bin/python" -m pip install --quiet -c constraints.txt -e "$1") >&2
  wanted >"$stamp$1"
}

# make_lowest: install ".[test]" into .venv-lowest, each direct dependency in the lowest version
# that pyproject.toml allows. uv finds the versions, pip installs them: it knows this machine's
# builds.
make_lowest() {
  venv="$root/.venv-lowest"
  if wanted | cmp -s - "$venv/installed"; then
    return
  fi
  local python
  python=$(PYTHON="${PYTHON:-python3.11}" find_python) # a newer one lacks wheels of the lowest
  echo "making $venv with $("$python" --version); PyPI's torch 2.4 brings gigabytes of CUDA" >&2
  "$python" -m venv --clear "$venv"
  (
    cd "$root"
    "$venv/bin/python" -m pip install --quiet uv
    # What torch needs besides depends on the build that pip finds.
    "$venv/bin/uv" pip compile --quiet --no-header --no-annotate --python "$venv/bin/python" \
      --resolution lowest-direct --extra test pyproject.toml |
      grep -vE '^(nvidia-|triton)' >"$venv/lowest.txt"
    "$venv/bin/python" -m pip install --quiet -r "$venv/lowest.txt" -e ".[test]"
  ) >&2
  wanted >"$venv/installed"
}
