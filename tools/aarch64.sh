# Sourced by ./test after setup.sh: what an aarch64 build needs on another Debian machine.

aarch64_tools=(g++-aarch64-linux-gnu qemu-user)
aarch64_libraries=(libhwy1 libhwy-dev libfmt9 libfmt-dev libpng16-16 libpng-dev zlib1g zlib1g-dev libgtest-dev
  nlohmann-json3-dev libcli11-dev)

# Debian's aarch64 libraries, unpacked into build/aarch64-sysroot. apt runs with folders of its own, so that the
# machine neither gains a foreign architecture nor needs root for this.
aarch64_sysroot() {
  local sysroot="$root/build/aarch64-sysroot" work="$root/build/aarch64-sysroot.part" package
  [ ! -d "$sysroot" ] || return 0
  say "fetching aarch64 libraries"
  rm -rf "$work"
  mkdir -p "$work"/{apt/lists/partial,apt/cache/archives/partial,root}
  touch "$work/apt/status"
  local apt=(apt-get -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Acquire::Languages=none
    -o Acquire::Retries=3 -o APT::Sandbox::User= -o Dir::State="$work/apt" -o Dir::State::status="$work/apt/status"
    -o Dir::Cache="$work/apt/cache")
  (
    cd "$work/apt"
    # Other people's sources on this machine may have nothing for aarch64: only the download counts.
    "${apt[@]}" update || true
    "${apt[@]}" download "${aarch64_libraries[@]}"
    for package in *.deb; do dpkg-deb -x "$package" "$work/root"; done
  ) >"$root/build/aarch64-sysroot.log" 2>&1 || {
    tail -n 20 "$root/build/aarch64-sysroot.log" >&2
    die "could not fetch the aarch64 libraries (log: $root/build/aarch64-sysroot.log)"
  }
  mv "$work/root" "$sysroot"
  rm -rf "$work"
}
