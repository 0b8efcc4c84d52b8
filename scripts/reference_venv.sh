#!/usr/bin/env bash
# Makes the virtual environment that `svd2 bench --against reference` runs the PyTorch implementation in.
#
#   bash scripts/reference_venv.sh FOLDER
#
# PYTHON chooses the interpreter (default python3.11). TORCH is the package to install (default torch==2.13.0);
# on a machine with a GPU name the release that fits its driver. What the implementation pins for its web demo and
# for training is left out, and so are its pins of versions: only inference is run.
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: bash scripts/reference_venv.sh FOLDER" >&2
  exit 2
fi
"${PYTHON:-python3.11}" -m venv "$1"
pip=("$1/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" "${TORCH:-torch==2.13.0}" numpy
"${pip[@]}" diffusers==0.35.1 transformers==4.54.0 einops==0.8.1 omegaconf==2.3.0 ftfy==6.3.1
"${pip[@]}" --no-deps streamdiffusionv2==0.1.1
echo "made $1; now: svd2 bench --checkpoint random:golden --against reference --reference $1"
