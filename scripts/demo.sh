#!/usr/bin/env bash
# Makes the environment where it is missing and runs `snip demo` in the folder you stand in.
# usage: bash scripts/demo.sh [flags of snip demo]

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment ".[report]"
exec "$venv/bin/snip" demo "$@"
