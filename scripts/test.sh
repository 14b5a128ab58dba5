#!/usr/bin/env bash
# Makes the environment where it is missing; runs lint, types, the docs check and the tests.
# usage: bash scripts/test.sh [--lowest] [--all] [arguments of pytest]
#   --lowest   the tests alone, with the lowest versions that pyproject.toml allows (.venv-lowest)
#   --all      the slow tests too (minutes)

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

lowest=
if [ "${1-}" = "--lowest" ]; then
  lowest=1
  shift
fi
select=(-m "not slow")
if [ "${1-}" = "--all" ]; then
  select=()
  shift
fi
# Two processes, a file of tests each at a time: much of a test's time is spent waiting.
if [ $# -eq 0 ]; then
  select+=(-n 2 --dist loadfile)
fi
if [ -n "$lowest" ]; then
  make_lowest
  exec "$venv/bin/python" -m pytest -q ${select[@]+"${select[@]}"} "$@"
fi

make_environment ".[test]"
failed=()
check() {
  echo "== $*"
  "$venv/bin/python" "$@" || failed+=("$*")
}

# All of them run, so that one run shows everything there is to mend; pytest's line comes last.
check -m ruff check .
check -m ruff format --check .
check -m mypy
check scripts/make_cli_docs.py --check
check -m zensical build --strict --clean
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
fi
echo "== pytest"
"$venv/bin/python" -m pytest -q ${select[@]+"${select[@]}"} "$@" || exit
[ ${#failed[@]} -eq 0 ]
