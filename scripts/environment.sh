# Makes .venv in the project's folder, or finds that it stands already; sourced by the scripts
# beside it. What pip is told by its own variables and configuration (indexes, wheels, certificates)
# holds, so a machine's usual way to the CPU or the CUDA build of torch works here too.

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

# Prints what an installation depends on: a venv that was moved must be made anew.
wanted() {
  echo "$root"
  cat "$root/pyproject.toml" "$root/constraints.txt"
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
