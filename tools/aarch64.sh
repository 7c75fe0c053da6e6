# Sourced by ./test after setup.sh: what an aarch64 build needs on another Debian machine.

aarch64_tools=(g++-aarch64-linux-gnu qemu-user)
aarch64_libraries=(libhwy1 libhwy-dev libfmt9 libfmt-dev libpng16-16 libpng-dev zlib1g zlib1g-dev libgtest-dev
  nlohmann-json3-dev libcli11-dev)

# Debian's aarch64 libraries, unpacked into build/aarch64-sysroot. apt runs with folders of its own, so that the
# machine neither gains a foreign architecture nor needs root for this. Started by root, apt downloads as its user _apt
# into folders that it gives to that user: they lie where _apt can go, which a home folder need not be.
aarch64_sysroot() {
  local sysroot="$root/build/aarch64-sysroot" log="$root/build/aarch64-sysroot.log" work package
  [ ! -d "$sysroot" ] || return 0
  say "fetching aarch64 libraries"
  work=$(mktemp -d)
  chmod 755 "$work"
  mkdir -p "$work"/{lists/partial,cache/archives/partial,packages} "$sysroot.part"
  if [ "$(id -u)" = 0 ] && id _apt >/dev/null 2>&1; then chown _apt "$work/packages"; fi
  touch "$work/status"
  local apt=(apt-get -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Acquire::Languages=none
    -o Acquire::Retries=3 -o Dir::State="$work" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache")
  (
    cd "$work/packages"
    # Other people's sources on this machine may have nothing for aarch64: only the download counts.
    "${apt[@]}" update || true
    "${apt[@]}" download "${aarch64_libraries[@]}"
    for package in *.deb; do dpkg-deb -x "$package" "$sysroot.part"; done
  ) >"$log" 2>&1 || {
    rm -rf "$work"
    tail -n 20 "$log" >&2
    die "could not fetch the aarch64 libraries (log: $log)"
  }
  rm -rf "$work"
  mv "$sysroot.part" "$sysroot"
}
