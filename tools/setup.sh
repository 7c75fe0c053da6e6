# Sourced by ./run and ./test: installs what is missing, configures and builds. Everything it says goes to stderr, so
# that stdout belongs to the program. Needs $root, the source folder.
set -euo pipefail
export LC_ALL=C

say() { printf 'tessera: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Takes the lock named $1 on file descriptor $2 for as long as this process lives or until it closes the descriptor.
# Two that start at once then do their set-up one after the other.
take_lock() {
  mkdir -p "$root/build"
  eval "exec $2>>\"\$root/build/.$1.lock\""
  flock -n "$2" || { say "waiting for another one in this folder"; flock "$2"; }
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Tools count by being there, whoever installed them; libraries by their package.
missing_packages() {
  command -v c++ >/dev/null || echo g++
  command -v cmake >/dev/null || echo cmake
  command -v ninja >/dev/null || echo ninja-build
  command -v python3 >/dev/null || echo python3
  # dpkg-query fails when it knows one of the names not at all: that package is then missing, nothing more.
  { dpkg-query -W -f='${Package} ${db:Status-Status}\n' "$@" 2>/dev/null || true; } | awk -v wanted="$*" '
    $2 == "installed" { have[$1] = 1 }
    END { n = split(wanted, names, " "); for (i = 1; i <= n; ++i) if (!(names[i] in have)) print names[i] }'
}

# Installs those of the named packages that are missing. apt takes back or completes what a broken run left.
need_packages() {
  command -v dpkg-query >/dev/null || { say "no Debian package manager here: trying with what is installed"; return; }
  local missing
  missing=$(missing_packages "$@" | tr '\n' ' ')
  missing=${missing% }
  [ -n "$missing" ] || return 0
  if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
    die "not root and no sudo; please install: apt-get install $missing"
  fi
  say "installing $missing"
  local log="$root/build/install.log"
  install_now() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 \
      install -y --no-install-recommends $missing
  }
  # Package lists may be old or not there at all: then, and only then, fetch them and try again.
  { as_root dpkg --configure -a && install_now; } </dev/null >"$log" 2>&1 ||
    { as_root apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 update && install_now; } \
      </dev/null >>"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; die "could not install: $missing (log: $log)"; }
}

cxx_packages=(libhwy-dev libcli11-dev libfmt-dev nlohmann-json3-dev libpng-dev libgtest-dev libbenchmark-dev)

# Debian's python3 comes without what makes a virtual environment, and without the headers that torch.compile needs.
python_packages() {
  python3 -c 'import ensurepip' 2>/dev/null || echo python3-venv
  python3 -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null || echo python3-dev
}

# build/venv: Python with torch and all that the tests of the package need. Looked at again only when the list, the
# interpreter or the place has changed.
need_venv() {
  local venv="$root/build/venv" list="$root/tests/python/requirements.txt" stamp
  stamp=$(printf '%s\n' "$root"; python3 -VV; command -v python3; cat "$list")
  if [ -x "$venv/bin/python" ] && [ "$stamp" = "$(cat "$venv/.stamp" 2>/dev/null)" ]; then return 0; fi
  say "installing torch and the tests' Python packages into build/venv"
  rm -rf "$venv"
  { python3 -m venv "$venv" && "$venv/bin/python" -m pip install --disable-pip-version-check -r "$list"; } \
    </dev/null >"$root/build/venv.log" 2>&1 ||
    { tail -n 20 "$root/build/venv.log" >&2; die "could not make build/venv (log: $root/build/venv.log)"; }
  printf '%s\n' "$stamp" >"$venv/.stamp"
}

# Whether every -DNAME=VALUE is what the cache of a build folder says already.
cache_has() {
  local cache=$1/CMakeCache.txt option name
  shift
  for option in "$@"; do
    name=${option%%=*}
    name=${name#-D}
    grep -qs "^${name%%:*}:[A-Z]*=" "$cache" &&
      [ "$(sed -n "s/^${name%%:*}:[A-Z]*=//p" "$cache")" = "${option#*=}" ] || return 1
  done
}

# Takes out of the cache of a build folder what it knows of a build/venv whose files are gone, and the operators with
# it: who wants them says so again. False when there is no such thing.
forget_venv() {
  local cache=$1/CMakeCache.txt path known stale=
  known=$(awk -v venv="=$root/build/venv/" 'i = index($0, venv) { print substr($0, i + 1) }' "$cache" | sort -u)
  while read -r path; do
    [ -z "$path" ] || [ -e "${path%%;*}" ] || stale=1
  done <<<"$known"
  [ -n "$stale" ] || return 1
  awk -v venv="$root/build/venv/" '
    /^\/\// { about = about $0 "\n"; next }
    !index($0, venv) && !/^TESSERA_BUILD_TORCH:/ { printf "%s%s\n", about, $0 }
    { about = "" }' "$cache" >"$cache.new"
  mv "$cache.new" "$cache"
}

# configure PRESET [-DOPTION=VALUE...]: when an option is not yet so; afterwards ninja itself sees what has changed,
# except in the presets.
configure() {
  local preset=$1 build="$root/build/$1"
  shift
  if ! grep -qsFx "CMAKE_HOME_DIRECTORY:INTERNAL=$root" "$build/CMakeCache.txt"; then
    rm -rf "$build"  # of a source folder that has moved, if of any
  elif forget_venv "$build"; then
    :
  elif [ "$build/build.ninja" -nt "$root/CMakePresets.json" ] && [ ! -e "$build/.configuring" ] &&
    cache_has "$build" "$@"; then
    return 0
  fi
  say "configuring build/$preset"
  mkdir -p "$build"
  touch "$build/.configuring"  # gone only when all went well: a broken configure starts anew
  cmake -S "$root" --preset "$preset" "$@" >"$build/configure.log" 2>&1 || {
    tail -n 30 "$build/configure.log" >&2
    die "could not configure build/$preset (log: $build/configure.log)"
  }
  rm "$build/.configuring"
}

# build PRESET [TARGET...]: says nothing when nothing is to be done; a counter on a terminal, else one line.
build() {
  local preset=$1 terminal=0
  shift
  if [ -t 2 ]; then terminal=1; fi
  NINJA_STATUS='@%f %t ' ninja -C "$root/build/$preset" -j "$(nproc)" "$@" 2>&1 |
    awk -v preset="$preset" -v terminal=$terminal '
      /^ninja: (Entering directory|no work to do)/ || /Re-checking globbed|Re-running CMake/ || /^-- / { next }
      /^@[0-9]+ [0-9]+ / {
        if (terminal) printf "\r\033[Ktessera: building build/%s %d/%d", preset, substr($1, 2), $2
        else if (!said) printf "tessera: building build/%s (%d steps)\n", preset, $2
        said = 1
        fflush()
        next
      }
      { if (terminal && said) print ""; print; fflush(); said = 0 }
      END { if (terminal && said) printf "\r\033[K" }' >&2
}
