#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv from requirements.lock and installs this package into it, editable. Called by the Makefile; safe to interrupt and to repeat.
#   PYTHON=/path/to/python3.11 tools/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.installed     # the digest of what is installed; written last
pending=$venv/.installing  # stands while an installation is under way: one that was cut short is not built upon

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
is_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_311 "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11; this project is pinned to 3.11."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3 python; do
        if is_311 "$candidate"; then printf '%s\n' "$candidate"; return; fi
    done
    fail "no Python 3.11 found (tried python3.11, python3, python). Install it (Debian: python3.11 and python3.11-venv; or pyenv, uv, conda)" \
         "or name it: make setup PYTHON=/path/to/python3.11"
}

digest=$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1)
if [[ -f $stamp && ! -e $pending && "$(<"$stamp")" == "$digest" ]] && is_311 $venv/bin/python; then
    touch "$stamp"  # a checkout has only changed the times of the files
    exit 0
fi

if [[ -e $pending ]] || { [[ -e $venv ]] && ! is_311 $venv/bin/python; }; then
    echo "setup: $venv is incomplete or of another Python: making it anew"
    rm -rf "$venv"
fi
if [[ ! -e $venv ]]; then
    python=$(find_python)
    echo "setup: creating $venv with $("$python" --version)"
    mkdir -p "$venv" && touch "$pending"
    "$python" -m venv "$venv" || fail "python -m venv failed (on Debian and Ubuntu install python3.11-venv)"
fi

touch "$pending"
rm -f "$stamp"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
echo "setup: installing $(grep -c '==' requirements.lock) pinned packages into $venv (2 to 4 minutes; 2 GB of disk, more with CUDA)"
"${pip[@]}" install -qq --progress-bar off -r requirements.lock
"${pip[@]}" install -qq --no-deps --no-build-isolation --editable .
"${pip[@]}" check >/dev/null || "${pip[@]}" check
printf '%s\n' "$digest" >"$stamp"
rm -f "$pending"
echo "setup: done in ${SECONDS} s"
