#!/usr/bin/env bash
# Resolves requirements.txt from tools/lock.in: bash tools/lock.sh (needs uv). torch and what only its CUDA build needs are left out:
# the Makefile installs torch first, in the build that suits the machine.
set -euo pipefail
cd "$(dirname "$0")/.."
resolved=$(uv pip compile tools/lock.in --override tools/lock.overrides --universal --python-version 3.11 \
  --no-emit-index-url --no-annotate --no-header --quiet)
{
  sed -n '/^#/p' requirements.txt
  grep -vE "'never'|== '(emscripten|win32)'\$" <<<"$resolved" |
    sed -E "s/ ; sys_platform (==|!=) '(linux|emscripten)'\$//" |
    grep -vE '^(nvidia-|cuda-|triton|torch==)'
} >requirements.txt.new
mv requirements.txt.new requirements.txt
