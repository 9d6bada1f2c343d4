#!/usr/bin/env bash
# Runs the tests by mark, one after the other: bash tools/test.sh .venv/bin unit distributed … (called by the Makefile).
set -euo pipefail
bin=$1
shift
all="distributed store e2e slurm gpu"
failed=()
for mark in "$@"; do
  case $mark in
    unit) chosen="not ($(sed 's/ / or /g' <<<"$all"))" ;;
    distributed | store | e2e | slurm | gpu) chosen=$mark ;;
    *) echo "there is no mark '$mark'; choose from: unit $all" >&2 && exit 2 ;;
  esac
  echo "── tests: $mark"
  began=$SECONDS code=0
  "$bin/python" -m pytest -q -m "$chosen" --durations=5 || code=$?
  if [ "$code" = 5 ]; then echo "there are no $mark tests yet"; code=0; fi
  [ "$code" = 0 ] || failed+=("$mark")
  echo "── $mark: $((SECONDS - began)) s"
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
