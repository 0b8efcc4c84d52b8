# Prepares the virtual environment that demo.sh and test.sh run in; sourced by them, not run by itself.
#
#   prepare_venv [EXTRA]   installs the project (editable), with the extra when one is named, into $VENV
#
# PYTHON chooses the interpreter (default: the first Python 3.11 or newer found), VENV the folder of the
# environment (default: .venv in the repository). An environment that is there is reused, and nothing is
# installed again until pyproject.toml changes. Written for bash 3.2, which macOS still ships.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}

say() { printf '== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo "none"; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_new_enough "$PYTHON" ||
      fail "PYTHON=$PYTHON is not a working Python 3.11 or newer (found: $(version_of "$PYTHON")); name another one"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
    if is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is needed, python3 is: $(version_of python3); install one or set PYTHON=/path/to/python"
}

create_venv() {
  local python=$1
  if [ -e "$VENV" ] && [ ! -d "$VENV" ]; then
    fail "VENV=$VENV is a file; name a folder"
  fi
  if [ -d "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
    fail "VENV=$VENV is not a virtual environment and not empty; name another folder"
  fi
  "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
    fail "$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv) or set PYTHON"
  say "creating $VENV with Python $(version_of "$python")"
  "$python" -m venv --clear "$VENV" || fail "could not create $VENV"
}

prepare_venv() {
  local extra=${1:-} python stamp want
  python=$(find_python)
  if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    create_venv "$python"
  elif [ -n "${PYTHON:-}" ] && [ "$(version_of "$VENV/bin/python")" != "$(version_of "$python")" ]; then
    fail "$VENV holds Python $(version_of "$VENV/bin/python"), not $(version_of "$python"): remove it or set VENV=another/folder"
  elif ! is_new_enough "$VENV/bin/python"; then
    fail "$VENV holds Python $(version_of "$VENV/bin/python"), 3.11 or newer is needed: remove it or set VENV=another/folder"
  fi
  VENV=$(cd "$VENV" && pwd) # later steps change the folder

  # What was installed is kept beside it, one file per extra; the full set serves the plain one too.
  want=$(echo "$ROOT" && cat "$ROOT/pyproject.toml")
  for stamp in "$VENV/svd2-installed-${extra:-plain}" "$VENV/svd2-installed-dev"; do
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
      return
    fi
  done
  say "installing svd2-jax${extra:+ with its $extra tools} (a few minutes the first time)"
  # Python compiles what it imports; pip would take half a minute to compile all.
  "$VENV/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-compile \
    --editable "$ROOT${extra:+[$extra]}" ||
    fail "the installation failed, see above"
  printf '%s\n' "$want" >"$VENV/svd2-installed-${extra:-plain}"
}
