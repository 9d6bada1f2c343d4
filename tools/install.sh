#!/usr/bin/env bash
# Makes a virtual environment and installs the pinned list into it: bash tools/install.sh FOLDER (called by the Makefile).
set -euo pipefail
folder=$1
log=$folder/install.log
say() { printf '%(%T)T install      %s\n' -1 "$*"; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  echo "Python 3.11 or later is needed; $PYTHON is $("$PYTHON" --version 2>&1). Name another one: make PYTHON=python3.12 …" >&2
  exit 3
}
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || {
  echo "Python's venv is missing. Install it: sudo apt-get install -y make git python3-venv" >&2
  exit 3
}
[ -x "$folder/bin/python" ] || "$PYTHON" -m venv "$folder"
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
reached() { "$folder/bin/python" - "$1" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).read(1)
except OSError:
    sys.exit(1)
PY
}

have=$("$folder/bin/python" -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null || true)
if [ "$have" = "$TORCH" ]; then
  say "torch $TORCH is there"
elif nvidia-smi -L >/dev/null 2>&1; then
  run "torch $TORCH for the NVIDIA GPU" pip "torch==$TORCH"
elif reached "$TORCH_INDEX"; then
  run "torch $TORCH, CPU build from $TORCH_INDEX" pip "torch==$TORCH" --index-url "$TORCH_INDEX"
else
  run "torch $TORCH, whatever build pip finds ($TORCH_INDEX cannot be reached)" pip "torch==$TORCH"
fi
run "the pinned list" pip --no-deps -r requirements.txt
run "this package" pip --no-deps --no-build-isolation -e .
