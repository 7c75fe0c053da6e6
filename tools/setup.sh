# Sourced by ./run and ./test: installs what is missing, configures and builds. Everything it says goes to stderr, so
# that stdout belongs to the program. Needs $root, the source folder.
set -euo pipefail
export LC_ALL=C

say() { printf 'tessera: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Whether nothing can be built here: the folders of the build cannot be written to, or not be made.
read_only() {
  local folder
  for folder in "$root/build" "$root/build/release"; do
    [ ! -e "$folder" ] || [ -w "$folder" ] || return 0
  done
  [ ! -e "$root/build" ] && [ ! -w "$root" ]
}

# Runs the program where nothing can be built, if it is what the sources say.
run_as_built() {
  local program="$root/build/release/cli/tessera" built="$root/build/release/.built" changed
  [ -x "$program" ] || die "$root cannot be written to, and nothing is built there"
  [ -e "$built" ] || built=$program
  changed=$(cd "$root" && find CMakeLists.txt cmake include src cli -type f -newer "$built" -print -quit)
  [ -z "$changed" ] || die "$root cannot be written to, and $changed is newer than what is built there"
  exec "$program" "$@"
}

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

# What is needed of Debian: for the program, and for its tests; benchmarks are built by ./test release only.
program_packages=(g++ cmake ninja-build libhwy-dev libcli11-dev libfmt-dev nlohmann-json3-dev libpng-dev)
test_packages=(python3 libgtest-dev)
bench_packages=(libbenchmark-dev)

# Those of the named packages that are missing. Tools count by being there, whoever installed them; libraries by their
# package.
missing_packages() {
  local package tool libraries=()
  for package in "$@"; do
    case $package in
      g++) tool=c++ ;;
      ninja-build) tool=ninja ;;
      cmake | python3) tool=$package ;;
      *) libraries+=("$package"); continue ;;
    esac
    command -v $tool >/dev/null || echo "$package"
  done
  [ ${#libraries[@]} -gt 0 ] || return 0
  # dpkg-query fails when it knows one of the names not at all: that package is then missing, nothing more.
  { dpkg-query -W -f='${Package} ${db:Status-Status}\n' "${libraries[@]}" 2>/dev/null || true; } |
    awk -v wanted="${libraries[*]}" '
    $2 == "installed" { have[$1] = 1 }
    END { n = split(wanted, names, " "); for (i = 1; i <= n; ++i) if (!(names[i] in have)) print names[i] }'
}

# Installs those of the named packages that are missing. apt itself downloads as its user _apt and is root for unpacking
# only. What others left half installed stays theirs: apt then says what to run, and so does this.
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
  install_now </dev/null >"$log" 2>&1 ||
    { as_root apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 update && install_now; } \
      </dev/null >>"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; die "could not install: $missing (log: $log)"; }
}

# Debian's python3 comes without what makes a virtual environment, and without the headers that torch.compile needs.
venv_packages() {
  echo python3
  python3 -c 'import ensurepip' 2>/dev/null || echo python3-venv
}
torch_packages() {
  python3 -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null || echo python3-dev
}

# python_environment NAME WHAT FUNCTION FILE...: the virtual environment build/NAME, where FUNCTION, given its python,
# installs WHAT the files list. Looked at again only when a file, the interpreter or the place has changed.
python_environment() {
  local name=$1 what=$2 fill=$3 environment="$root/build/$1" stamp
  shift 3
  stamp=$(printf '%s\n' "$root"; python3 -VV; command -v python3; cat "$@")
  if [ -x "$environment/bin/python" ] && [ "$stamp" = "$(cat "$environment/.stamp" 2>/dev/null)" ]; then return 0; fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$(python3 -V) is too old: 3.11 or later"
  say "installing $what into build/$name"
  rm -rf "$environment"
  { python3 -m venv "$environment" && "$fill" "$environment/bin/python"; } </dev/null >"$root/build/$name.log" 2>&1 ||
    { tail -n 20 "$root/build/$name.log" >&2; die "could not make build/$name (log: $root/build/$name.log)"; }
  printf '%s\n' "$stamp" >"$environment/.stamp"
}

# What a lock lists is all that is installed, and only files whose hashes it has.
install_locked() {  # PYTHON LOCK [OPTION...]
  local python=$1 lock=$2
  shift 2
  "$python" -m pip install --disable-pip-version-check --require-hashes --no-deps "$@" -r "$lock"
}

# build/venv: Python with torch and all that the tests of the package need; beside it, in build/venv/oldest, the oldest
# releases that the integrations support, for tests/python/test_integrations_versions.py.
need_venv() {
  local lists="$root/tests/python"
  fill_venv() {
    install_locked "$1" "$lists/requirements.lock" &&
      "$1" -m pip install --disable-pip-version-check "$(grep '^torch==' "$lists/requirements.in")" &&
      "$1" -m pip check --disable-pip-version-check &&
      install_locked "$1" "$lists/oldest.lock" --target "$root/build/venv/oldest"
  }
  python_environment venv "torch and the tests' Python packages" fill_venv "$lists"/{requirements.in,*.lock}
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

# What ./run asks of build/release, which it shares with ./test: no tests and no benchmarks, unless that is how it is
# configured and their libraries are still there. So none of the two configures anew what the other has left.
program_options() {
  local cache="$root/build/release/CMakeCache.txt" part library folder
  for part in TESTS:GTest BENCH:benchmark; do
    library=${part#*:} part=TESSERA_BUILD_${part%:*}
    folder=$(sed -n "s/^${library}_DIR:PATH=//p" "$cache" 2>/dev/null) || true
    if [ -n "$folder" ] && [ -d "$folder" ] && grep -q "^$part:[A-Z]*=ON$" "$cache"; then
      echo "-D$part=ON"
    else
      echo "-D$part=OFF"
    fi
  done
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
  local version
  version=$(cmake --version | sed -n '1s/[^0-9]*//p')
  printf '%s\n' 3.25 "$version" | sort -CV || die "cmake $version is too old: 3.25 or later"
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
  touch "$root/build/$preset/.building"
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
  mv "$root/build/$preset/.building" "$root/build/$preset/.built"  # as old as the sources that were read
}
