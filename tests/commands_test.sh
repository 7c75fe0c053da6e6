#!/usr/bin/env bash
# ./run as people call it, in a tree that is built: from another folder, through a symlink, twice at once, in a pipe.
#   commands_test.sh SOURCE_DIR VERSION
set -euo pipefail
source_dir=$1 version=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
fail() { printf '%s\n' "$*"; exit 1; }

ln -s "$source_dir/run" "$scratch/a link"
cd "$scratch"
"./a link" --version >out 2>err
grep -qF "$version" out || fail "--version printed: $(cat out)"
[ ! -s err ] || fail "nothing was to be done, yet ./run said: $(cat err)"

# The caller's folder and the program's exit status are kept.
"./a link" pattern --pattern local_window --seq 1024 --density 0.5 --block 128 --output p.json >/dev/null
[ -s p.json ] || fail "--output p.json is not in the folder of the caller"
status=0
"./a link" no-such-command >/dev/null 2>&1 || status=$?
[ $status = 2 ] || fail "exit status $status for a usage error"

pids=()
for i in 1 2 3; do
  "./a link" --version >"out$i" 2>/dev/null &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || fail "one of three at once failed"; done
cmp out out1 && cmp out out2 && cmp out out3

status=0
"$source_dir/test" no-such-stage >out 2>err || status=$?
[ $status = 2 ] && [ ! -s out ] || fail "./test no-such-stage: status $status, stdout: $(cat out)"
echo "./run runs"
