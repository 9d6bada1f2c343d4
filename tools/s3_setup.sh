#!/usr/bin/env bash
# Makes the environment of tools/s3_server.py if it is not there, or was made from another list: bash tools/s3_setup.sh [FOLDER].
# The default folder is .venv-swift beside .venv; PYTHON names the Python that it is made with. No root.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-swift} list=tools/s3_server.txt
cmp -s "$list" "$folder/.installed" && exit 0
mkdir -p "$folder"
exec 9>"$folder/.lock"
flock 9 # one of several that ask at once makes it, the others wait
cmp -s "$list" "$folder/.installed" && exit 0
log=$folder/install.log
{
  "${PYTHON:-python3}" -m venv "$folder"
  "$folder/bin/python" -m pip install --no-input --disable-pip-version-check --no-deps -r "$list"
  "$folder/bin/python" -c 'import swift.common.wsgi, swift.proxy.server, swift.obj.server'
} >"$log" 2>&1 || {
  echo "the environment of the S3 server could not be made; the end of $log:" >&2
  tail -n 20 "$log" >&2
  exit 3
}
cp "$list" "$folder/.installed"
printf '%(%T)T install      OpenStack Swift in %s: %s s\n' -1 "$folder" "$SECONDS"
