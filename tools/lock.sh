#!/usr/bin/env bash
# Resolves requirements.txt and requirements-cuda.txt from tools/lock.in: bash tools/lock.sh [--upgrade] (needs uv).
# Pins that still fit stay as they are, unless --upgrade is given or they are named: --upgrade-package NAME.
set -euo pipefail
cd "$(dirname "$0")/.."
new=$(mktemp -d)
trap 'rm -r "$new"' EXIT
cat requirements.txt requirements-cuda.txt >"$new/resolved.txt" # uv prefers what the output file already says
uv pip compile tools/lock.in --override tools/lock.overrides --universal --python-version 3.11 \
  --no-emit-index-url --no-annotate --no-header --quiet "$@" -o "$new/resolved.txt"
# What the overrides turn off, and what Linux never takes, leaves the lists; markers that are always true on Linux do too.
grep -vE "== '(never|emscripten|win32)'$" "$new/resolved.txt" |
  sed -E "s/ ; sys_platform (==|!=) '(linux|emscripten)'\$//" >"$new/kept.txt"
cuda='^(torch==|triton|nvidia-(?!ml-py)|cuda-)' # nvidia-ml-py is pure Python, and wanted beside any build of torch
{ sed -n '/^#/p' requirements.txt && grep -vP "$cuda" "$new/kept.txt"; } >"$new/requirements.txt"
{ sed -n '/^#/p' requirements-cuda.txt && grep -P "$cuda" "$new/kept.txt"; } >"$new/requirements-cuda.txt"
mv "$new/requirements.txt" "$new/requirements-cuda.txt" .
