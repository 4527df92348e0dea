#!/usr/bin/env bash
# Make a virtual environment and install qbench into it, editable, with the versions of constraints.txt.
#   VENV         where (.venv)
#   PYTHON       which Python to make it with (python3)
#   TORCH_INDEX  address of PyTorch's CPU-only wheel index; empty: torch comes from pip's own index,
#                which on Linux means the CUDA build
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv} python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "qbench needs Python 3.11 or newer; $python is $("$python" --version 2>&1 || true). Set PYTHON=, e.g. PYTHON=python3.12" >&2
    exit 1
}
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
if [ -n "${TORCH_INDEX:-}" ]; then
    "${pip[@]}" --no-deps --index-url "$TORCH_INDEX" torch torchvision
fi
"${pip[@]}" --editable '.[dev]'
