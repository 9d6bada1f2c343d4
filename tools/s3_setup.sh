#!/usr/bin/env bash
# Makes the environment of tools/s3_server.py if it is not there, or was made from another list: bash tools/s3_setup.sh [FOLDER].
# The default folder is .venv-swift beside .venv; PYTHON names the Python that it is made with. No root.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-swift} list=tools/s3_server.txt
log=$folder/install.log
made() { [ -x "$folder/bin/python" ] && cmp -s "$list" "$folder/.installed"; }
install() {
  "$folder/bin/python" -m pip install --no-input --disable-pip-version-check --no-deps -r "$list" &&
    "$folder/bin/python" -c 'import swift.common.wsgi, swift.proxy.server, swift.obj.server'
}
if made; then exit 0; fi
exec 9<"$list"
flock 9 # one of several that ask at once makes it, the others wait
if made; then exit 0; fi
"${PYTHON:-python3}" -c 'import venv, ensurepip' 2>/dev/null || {
  echo "Python's venv is missing. Install it: sudo apt-get install -y python3-venv" >&2
  exit 3
}
"${PYTHON:-python3}" -m venv --clear "$folder"
install >"$log" 2>&1 || {
  echo "OpenStack Swift could not be installed; the end of $log:" >&2
  tail -n 20 "$log" >&2
  exit 3
}
cp "$list" "$folder/.installed"
printf '%(%T)T install      OpenStack Swift in %s: %s s\n' -1 "$folder" "$SECONDS"
