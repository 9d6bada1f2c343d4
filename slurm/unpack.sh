# Unpacks an environment onto a node's own disk: bash unpack.sh ARCHIVE FOLDER; nothing is done where the same lies there already.
# A job whose profile names environment_archive runs it once on each of its nodes, before the ranks start.
set -euo pipefail
archive=$1 folder=${2%/}
stamp=$folder/.pixart-archive # what was unpacked there: size, time and name of the archive; also says that the folder is ours
fail() {
  echo "pixart-ds unpack: $(hostname -s): $1" >&2
  exit 3
}

case $folder in
/*/*) ;;
*) fail "environment_folder is '$2': it must be a whole path, not at the top of the disk; is \$TMPDIR set on this cluster?" ;;
esac
what=$(stat -Lc '%s %Y %n' "$archive" 2>/dev/null) || fail "environment_archive $archive is not there; all nodes must see it"
mkdir -p "$(dirname "$folder")" || fail "$(dirname "$folder") cannot be made: name another environment_folder"
exec 9>"$folder.lock"
flock -w 1800 9 || fail "another job has unpacked into $folder for half an hour: look for it, and end it"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$what" ]; then
  began=$SECONDS
  [ -f "$stamp" ] || [ ! -e "$folder" ] || fail "$folder is there, and was not unpacked by a job: name another environment_folder"
  new=$folder.pixart-new
  rm -rf "$new" # of an attempt that was killed; the lock says that nobody writes there
  mkdir "$new"
  tar --no-same-owner -xf "$archive" -C "$new" || fail "$archive could not be unpacked: see above; a .tar.zst needs the program zstd"
  [ -e "$new/bin/python" ] || [ -L "$new/bin/python" ] ||
    fail "$archive holds no bin/python at its top: make it with tar -C ENVIRONMENT -cf $archive ."
  : >"$new/.pixart-archive" # ours, and not ready yet
  rm -rf "$folder"
  mv "$new" "$folder"
  if [ -x "$folder/bin/conda-unpack" ]; then "$folder/bin/python" "$folder/bin/conda-unpack" || fail "conda-unpack failed"; fi
  echo "$what" >"$stamp.new"
  mv "$stamp.new" "$stamp"
  echo "$(hostname -s): $archive is unpacked into $folder: $((SECONDS - began)) s"
fi
"$folder/bin/python" -c 'import sys' || fail "$folder/bin/python does not run here. An environment that was moved works if it was packed \
with conda-pack or venv-pack, if it is a venv whose base python is on every node, or if it was made at this very path"
