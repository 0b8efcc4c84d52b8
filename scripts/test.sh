#!/usr/bin/env bash
# Sets the project up with its development tools and runs every check: format, lint, types, imports, tests.
#
#   bash scripts/test.sh [--fast] [options of pytest]     --fast leaves out the tests marked slow
#
# Stops at the first check that fails. PYTHON=python3.12 chooses the interpreter, VENV=folder the virtual
# environment (default .venv).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

for argument in "$@"; do
  shift
  if [ "$argument" = "--fast" ]; then
    set -- "$@" -m "not slow"
  else
    set -- "$@" "$argument"
  fi
done

prepare_venv dev
cd "$ROOT"

check() {
  local tool=$1
  shift
  say "$tool"
  "$VENV/bin/$tool" "$@" || fail "$tool failed, see above"
}

check ruff format --check
check ruff check
check pyright --pythonpath "$VENV/bin/python"
check lint-imports
check pytest -n 2 --dist worksteal "$@" # neighbours, which share programs, in one process
