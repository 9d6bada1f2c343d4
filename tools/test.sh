#!/usr/bin/env bash
# Runs the tests by mark, one after the other, and closes with the sum: bash tools/test.sh .venv/bin unit distributed … (called by the Makefile).
set -euo pipefail
bin=$1
shift
all="distributed store e2e slurm gpu"
failed=()
output=$(mktemp)
trap 'rm "$output"' EXIT
sum() { grep -oE "^([0-9]+ [a-z]+, )*[0-9]+ $1" "$output" | grep -oE "[0-9]+ $1" | awk '{n += $1} END {print n + 0}'; }
for mark in "$@"; do
  case $mark in
    unit) chosen="not ($(sed 's/ / or /g' <<<"$all"))" ;;
    distributed | store | e2e | slurm | gpu) chosen=$mark ;;
    *) echo "there is no mark '$mark'; choose from: unit $all" >&2 && exit 2 ;;
  esac
  echo "── tests: $mark"
  began=$SECONDS code=0
  "$bin/python" -m pytest -q -m "$chosen" --durations=5 --color=no 2>&1 | tee -a "$output" || code=$?
  if [ "$code" = 5 ]; then echo "there are no $mark tests yet"; code=0; fi
  [ "$code" = 0 ] || failed+=("$mark")
  echo "── $mark: $((SECONDS - began)) s"
done
[ ${#failed[@]} = 0 ] || echo "failed: ${failed[*]}" >&2
echo "$(sum passed) passed, $(($(sum failed) + $(sum errors?))) failed, $(sum skipped) skipped"
[ ${#failed[@]} = 0 ]
