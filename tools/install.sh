#!/usr/bin/env bash
# Makes a virtual environment and installs the pinned lists and this package into it: bash tools/install.sh FOLDER.
# The Makefile calls it and says by environment variables: PYTHON, TORCH (a release), TORCH_INDEX (or nothing).
set -euo pipefail
folder=$1
log=$folder/install.log
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '%(%T)T install      %s\n' -1 "$*"; }
run() { # one line for a step, its output in the log
  local text=$1 began=$SECONDS
  shift
  if ! "$@" >>"$log" 2>&1; then
    echo "$text failed; the end of $log:" >&2
    tail -n 20 "$log" >&2
    exit 3
  fi
  say "$text: $((SECONDS - began)) s"
}
pip() { "$folder/bin/python" -m pip install --no-input "$@"; }
torch_there() { # "2.13.0 cpu", "2.13.0 cuda" or nothing; without importing it, which a CUDA build without its libraries cannot do
  "$folder/bin/python" - <<'PY'
import importlib.util, pathlib, runpy
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin is not None:
    version = runpy.run_path(str(pathlib.Path(spec.origin).with_name("version.py")))
    print(version["__version__"].split("+")[0], "cuda" if version["cuda"] else "cpu")
PY
}
reached() {
  "$folder/bin/python" - "$1" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).read(1)
except OSError:
    sys.exit(1)
PY
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then # there is none, or its making was cut off
  new_enough "$PYTHON" || {
    echo "Python 3.11 or later is needed; $PYTHON is: $("$PYTHON" --version 2>&1 || true). Name another one: make PYTHON=python3.12 …" >&2
    exit 3
  }
  "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || {
    echo "Python's venv is missing. Install it: sudo apt-get install -y make git python3-venv" >&2
    exit 3
  }
  "$PYTHON" -m venv "$folder"
fi
new_enough "$folder/bin/python" || {
  echo "Python 3.11 or later is needed; the one in $folder is: $("$folder/bin/python" --version). Remove $folder and start again." >&2
  exit 3
}
: >"$log"

# torch comes first and without dependencies: those of a CPU build are in requirements.txt, and a CUDA build's 2 GB of libraries are
# fetched only when it is one. With a GPU, and where PyTorch's CPU index cannot be reached, it is what pip finds: on PyPI a CUDA build,
# which runs without a GPU as well, but not without its libraries.
gpu=no
if timeout 30 nvidia-smi -L >/dev/null 2>&1; then gpu=yes; fi
read -r have build <<<"$(torch_there)"
if [ "$have" = "$TORCH" ] && [ "$gpu $build" != "yes cpu" ]; then
  say "torch $TORCH is there ($build build)"
else
  index=$TORCH_INDEX
  if [ -z "$index" ] && [ "$gpu" = no ] && reached "$cpu_index"; then index=$cpu_index; fi
  run "torch $TORCH${index:+ from $index}" pip --no-deps --force-reinstall "torch==$TORCH" ${index:+--index-url "$index"}
  read -r have build <<<"$(torch_there)"
fi
if [ "$build" = cuda ] && [ -z "$TORCH_INDEX" ] && grep -qx "torch==$TORCH" requirements-cuda.txt; then
  run "CUDA libraries, pinned" pip --no-deps -r requirements-cuda.txt
elif [ "$build" = cuda ]; then # another release, or another index: its own libraries
  run "CUDA libraries of torch $TORCH" pip "torch==$TORCH" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
elif [ "$gpu" = yes ]; then
  say "there is an NVIDIA GPU, but pip found a CPU build of torch; name an index: make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130"
fi
run "the pinned list" pip --no-deps -r requirements.txt
run "this package" pip --no-deps --no-build-isolation -e .
run "a first import" "$folder/bin/python" -c "import torch, deepspeed, diffusers, transformers"
