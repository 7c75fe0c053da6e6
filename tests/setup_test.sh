#!/usr/bin/env bash
# tools/setup.sh on machines that this one is not: package tools are stubs that say what they were asked for.
#   setup_test.sh SOURCE_DIR
set -euo pipefail
source_dir=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
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

# Neither root nor sudo: says what to install. (A PATH of stubs and of what the script itself calls.)
stub id <<<'echo 1000'
for tool in bash awk tr grep mkdir; do ln -s "$(command -v $tool)" "$scratch/bin/$tool"; done
said=$(PATH="$scratch/bin" bash -c 'root=$1; . "$2/tools/setup.sh"; need_packages new-c' _ "$scratch" "$source_dir" 2>&1) &&
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

echo "set-up asks for what is missing and for nothing else"
