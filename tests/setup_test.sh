#!/usr/bin/env bash
# tools/setup.sh on machines that this one is not: package tools are stubs that say what they were asked for.
#   setup_test.sh SOURCE_DIR
set -euo pipefail
source_dir=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
chmod 755 "$scratch"
mkdir "$scratch/bin"

stub() {  # NAME <script
  { echo '#!/usr/bin/env bash'; cat; } >"$scratch/bin/$1"
  chmod +x "$scratch/bin/$1"
}
# Runs need_packages in an empty source folder; leaves stderr in $said and the status in $status.
need() {
  rm -rf "$scratch/root" "$scratch/asked"
  mkdir -p "$scratch/root/build"
  touch "$scratch/asked"
  status=0
  said=$(PATH="$scratch/bin:$PATH" SCRATCH="$scratch" bash -c \
    'root=$1/root; . "$2/tools/setup.sh"; shift 2; need_packages "$@"; echo "went on" >&2' \
    _ "$scratch" "$source_dir" "$@" 2>&1 >/dev/null) || status=$?
}
expect() {  # WHAT GOT PATTERN
  [[ $2 == $3 ]] || { printf '%s: got\n%s\nexpected\n%s\n' "$1" "$2" "$3"; exit 1; }
}

for tool in c++ cmake ninja python3; do stub $tool </dev/null; done
stub id <<<'echo 0'
stub dpkg </dev/null
stub dpkg-query <<'SCRIPT'
shift 2
for name in "$@"; do
  case $name in
    have-*) echo "$name installed" ;;
    gone-*) echo "$name config-files" ;;
    *) status=1 ;;
  esac
done
exit ${status:-0}
SCRIPT

# Nothing missing: nothing said, nothing asked for.
stub apt-get <<<'echo "$*" >>"$SCRATCH/asked"'
need have-a have-b
expect status "$status" 0
expect said "$said" "went on"
expect asked "$(cat "$scratch/asked")" ""

# Missing, removed and never heard of: one line, one call, no fetching of lists.
need have-a gone-b new-c
expect status "$status" 0
expect said "$said" $'tessera: installing gone-b new-c\nwent on'
expect asked "$(cat "$scratch/asked")" "* install -y --no-install-recommends gone-b new-c"

# Lists too old: fetched, then tried again.
stub apt-get <<'SCRIPT'
echo "$*" >>"$SCRATCH/asked"
case $* in *update) touch "$SCRATCH/root/fetched" ;; *) [ -e "$SCRATCH/root/fetched" ] ;; esac
SCRIPT
need new-c
expect status "$status" 0
expect asked "$(cat "$scratch/asked")" $'*install*new-c\n*update\n*install*new-c'

# Not to be had: the reason is shown and nothing goes on.
stub apt-get <<<'echo "E: no such thing"; exit 100'
need new-c
expect status "$status" 1
expect said "$said" $'tessera: installing new-c\n*E: no such thing*could not install: new-c*'

# A package manager that others left in the middle of something: what it says is shown, and theirs stays as it is.
stub apt-get <<<'echo "E: dpkg was interrupted, you must manually run dpkg --configure -a"; exit 100'
stub dpkg <<<'echo "dpkg $*" >>"$SCRATCH/asked"'
need new-c
expect status "$status" 1
expect said "$said" $'*you must manually run dpkg --configure -a*could not install: new-c*'
expect asked "$(cat "$scratch/asked")" ""

# Tools count by being there: nothing is asked for but the libraries, and of those what the program needs.
stub apt-get <<<'echo "$*" >>"$SCRATCH/asked"'
need g++ cmake ninja-build python3
expect asked "$(cat "$scratch/asked")" ""
status=0
said=$(PATH="$scratch/bin:$PATH" SCRATCH="$scratch" bash -c 'root=$1/root; . "$2/tools/setup.sh"
  need_packages "${program_packages[@]}"' _ "$scratch" "$source_dir" 2>&1) || status=$?
expect status "$status" 0
expect said "$said" "tessera: installing libhwy-dev libcli11-dev libfmt-dev nlohmann-json3-dev libpng-dev"

# A user with sudo: apt alone runs as root.
stub id <<<'echo 1000'
stub sudo <<'SCRIPT'
echo "sudo $*" >>"$SCRATCH/asked"
"$@"
SCRIPT
need new-c
expect status "$status" 0
expect asked "$(cat "$scratch/asked")" $'sudo env *apt-get *install*new-c\n*install*new-c'
rm "$scratch/bin/sudo"

# Neither root nor sudo: says what to install. (A PATH of stubs and of what the script itself calls.)
stub id <<<'echo 1000'
for tool in bash awk tr grep mkdir; do ln -s "$(command -v $tool)" "$scratch/bin/$tool"; done
said=$(PATH="$scratch/bin" bash -c 'root=$1; . "$2/tools/setup.sh"; need_packages new-c' \
  _ "$scratch" "$source_dir" 2>&1) &&
  { echo "went on without new-c"; exit 1; }
expect said "$said" "tessera: not root and no sudo; please install: apt-get install new-c"

# A virtual environment that is gone leaves the cache of a build folder, comments included, and the operators with it;
# what else is remembered stays. One that is there is left alone.
tree=$scratch/tree
mkdir -p "$tree/build/venv/torch"
printf '%s\n' '//where' "Torch_DIR:PATH=$tree/build/venv/torch" '' 'TESSERA_BUILD_TORCH:BOOL=ON' '//warnings' \
  'TESSERA_WERROR:BOOL=ON' >"$tree/CMakeCache.txt"
forget() { bash -c 'root=$1; . "$2/tools/setup.sh"; forget_venv "$1"' _ "$tree" "$source_dir"; }
cp "$tree/CMakeCache.txt" "$scratch/before"
! forget || { echo "forgot a virtual environment that is there"; exit 1; }
cmp "$scratch/before" "$tree/CMakeCache.txt"
rm -r "$tree/build/venv"
forget || { echo "did not forget a virtual environment that is gone"; exit 1; }
expect cache "$(cat "$tree/CMakeCache.txt")" $'\n//warnings\nTESSERA_WERROR:BOOL=ON'

# ./run asks of build/release no tests and no benchmarks; what ./test asked for stays as long as its libraries do. So
# neither configures anew what the other has left.
options() {
  bash -c 'root=$1; . "$2/tools/setup.sh"; program_options
    cache_has "$1/build/release" $(program_options) && echo same' _ "$tree" "$source_dir" | tr '\n' ' '
}
mkdir -p "$tree/build/release" "$tree/gtest" "$tree/benchmark"
expect "options of a fresh tree" "$(options)" "-DTESSERA_BUILD_TESTS=OFF -DTESSERA_BUILD_BENCH=OFF "
cache=$tree/build/release/CMakeCache.txt
printf '%s\n' "TESSERA_BUILD_TESTS:BOOL=OFF" "TESSERA_BUILD_BENCH:BOOL=OFF" >"$cache"
expect "options after ./run" "$(options)" "-DTESSERA_BUILD_TESTS=OFF -DTESSERA_BUILD_BENCH=OFF same "
printf '%s\n' "TESSERA_BUILD_TESTS:BOOL=ON" "TESSERA_BUILD_BENCH:BOOL=ON" "GTest_DIR:PATH=$tree/gtest" \
  "benchmark_DIR:PATH=$tree/benchmark" >"$cache"
expect "options after ./test" "$(options)" "-DTESSERA_BUILD_TESTS=ON -DTESSERA_BUILD_BENCH=ON same "
rmdir "$tree/gtest"
expect "options without GTest" "$(options)" "-DTESSERA_BUILD_TESTS=OFF -DTESSERA_BUILD_BENCH=ON "

# A CMake or a Python that is too old is named in one line.
stub cmake <<<'echo "cmake version 3.18.4"'
status=0
said=$(PATH="$scratch/bin:$PATH" bash -c 'root=$1; . "$2/tools/setup.sh"; configure asan' \
  _ "$tree" "$source_dir" 2>&1) || status=$?
expect "old cmake" "$status $said" "1 tessera: cmake 3.18.4 is too old: 3.25 or later"
stub python3 <<<'case $1 in -V) echo Python 3.9.2 ;; -c) exit 1 ;; esac'
status=0
said=$(PATH="$scratch/bin:$PATH" bash -c 'root=$1; . "$2/tools/setup.sh"; python_environment venv x true /dev/null' \
  _ "$tree" "$source_dir" 2>&1) || status=$?
expect "old python" "$status $said" "1 tessera: Python 3.9.2 is too old: 3.11 or later"

# An environment is made once, and again when a list changes; a broken one is not taken for good.
stub python3 <<'SCRIPT'
case $1 in -m) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;; esac
SCRIPT
environment() {  # COMMAND: what fills it
  PATH="$scratch/bin:$PATH" bash -c 'root=$1; . "$2/tools/setup.sh"; fill() { '"$1"'; }
    python_environment small "a thing" fill "$1/list"' _ "$tree" "$source_dir" 2>&1
}
echo a==1 >"$tree/list"
! environment false >"$scratch/said" || { echo "an environment that cannot be filled passed"; exit 1; }
expect "broken environment" "$(cat "$scratch/said")" $'tessera: installing a thing into build/small\n*could not make*'
expect "first environment" "$(environment 'true')" "tessera: installing a thing into build/small"
expect "same list" "$(environment 'true')" ""
echo a==2 >"$tree/list"
expect "other list" "$(environment 'true')" "tessera: installing a thing into build/small"

# Only what a lock lists, with its hashes.
expect "locked" "$(bash -c 'root=$1; . "$2/tools/setup.sh"; install_locked echo some.lock --target there' _ "$tree" \
  "$source_dir")" "-m pip install * --require-hashes --no-deps --target there -r some.lock"
for lock in tests/python/requirements tests/python/oldest tools/style; do
  awk '/^[^ ]/ { bad = bad || names++ && !hashes || $0 !~ /^[a-z0-9.-]+==[^ ]+ \\$/; hashes = 0; next }
    { bad = bad || $1 !~ /^--hash=sha256:[0-9a-f]+$/ || length($1) != 78; hashes++ } END { exit bad || !hashes }' \
    "$source_dir/$lock.lock" || { echo "$lock.lock has something without a version or a hash"; exit 1; }
done
! grep -n '^torch==' "$source_dir"/*/*.lock "$source_dir"/*/*/*.lock || { echo "torch has no hash"; exit 1; }

# apt downloads other machines' libraries as its own user: nothing turns that off, and it can go where they land.
stub id <<<'echo 0'
stub chown <<<'echo "chown $*" >>"$SCRATCH/asked"'
stub apt-get <<'SCRIPT'
echo "$*" >>"$SCRATCH/asked"
stat -c '%a' .. >>"$SCRATCH/asked"
case $* in *download*) touch some.deb ;; esac
SCRIPT
stub dpkg-deb <<<'touch "$3/unpacked"'
: >"$scratch/asked"
PATH="$scratch/bin:$PATH" SCRATCH="$scratch" bash -c 'root=$1; . "$2/tools/setup.sh"; . "$2/tools/aarch64.sh"
  aarch64_sysroot' _ "$tree" "$source_dir" 2>/dev/null
[ -e "$tree/build/aarch64-sysroot/unpacked" ] || { echo "no aarch64 libraries"; exit 1; }
expect "download" "$(cat "$scratch/asked")" $'chown _apt */packages\n*update\n755\n*download*\n755'
! grep -q Sandbox "$scratch/asked" || { echo "apt was told to download as root"; exit 1; }

# A folder that cannot be written to: what is built there runs; what is not, or is older than its sources, is said in one
# line. Root can write anywhere, so this is somebody else.
as_other() {
  if [ "$(command id -u)" = 0 ]; then setpriv --reuid 65534 --regid 65534 --clear-groups "$@"; else "$@"; fi
}
fixed=$scratch/fixed
mkdir -p "$fixed"/{cmake,include,src,cli}
cp -r "$source_dir/run" "$source_dir/test" "$source_dir/tools" "$fixed"
touch "$fixed/CMakeLists.txt" "$fixed/src/a.cc"
chmod -R a+rX,a-w "$fixed"
refused() {  # COMMAND PATTERN
  status=0
  said=$(as_other "$fixed/$1" 2>&1) || status=$?
  expect "$1 in a folder that cannot be written to" "$status $said" "1 tessera: $fixed cannot be written to, and $2"
}
refused run "nothing is built there"
refused test "tests are built there"
chmod -R u+w "$fixed"
mkdir -p "$fixed/build/release/cli"
printf '#!/bin/sh\necho "ran $*"\n' >"$fixed/build/release/cli/tessera"
chmod 755 "$fixed/build/release/cli/tessera"
touch "$fixed/build/release/.built"
chmod -R a-w "$fixed"
expect "./run of what is built" "$(as_other "$fixed/run" info --seed 3)" "ran info --seed 3"
expect "./run of what is built, nothing said" "$(as_other "$fixed/run")" "ran demo"
chmod u+w "$fixed/src/a.cc"
touch -d '1 minute' "$fixed/src/a.cc"
chmod -R a-w "$fixed"
refused run "src/a.cc is newer than what is built there"
chmod -R u+w "$fixed"

echo "set-up asks for what is missing and for nothing else"
