#!/usr/bin/env bash
# Sets the project up and re-draws a short clip with the small model that comes with it: out/demo.mp4, out/demo.png.
#
#   bash scripts/demo.sh [options of `svd2 demo`]
#
# PYTHON=python3.12 chooses the interpreter, VENV=folder the virtual environment (default .venv).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

prepare_venv
cd "$ROOT"
say "svd2 demo $*"
exec "$VENV/bin/svd2" demo "$@"
