# Sourced by ./test and tools/format after setup.sh: the tools of one format, and what they are asked.

# build/style: clang-format and ruff, small and quick to make.
need_style() {
  fill_style() { install_locked "$1" "$root/tools/style.lock"; }
  python_environment style "clang-format and ruff" fill_style "$root/tools/style.lock"
}

# clang_format OPTION...: over all C++ here.
clang_format() {
  find "$root"/{bench,cli,examples,include,src,tests,torch} \( -name '*.cc' -o -name '*.h' \) -print0 |
    xargs -0 -n 16 -P "$(nproc)" "$root/build/style/bin/clang-format" "$@"
}

ruff() {
  (cd "$root" && build/style/bin/ruff "$@")
}

# Says all that is not as it should be; false when there is something.
check_style() {
  local good=0
  clang_format --dry-run --Werror || good=1
  ruff format --no-cache --quiet --diff || good=1
  ruff check --no-cache --quiet || good=1
  [ $good = 0 ] || { say "style: see above; tools/format puts the layout right"; return 1; }
  local version
  version=$("$root/build/style/bin/clang-format" --version | sed 's/.*version \([0-9.]*\).*/\1/')
  say "style: as clang-format $version and $(ruff --version) want it"
}

format() {
  clang_format -i
  ruff check --no-cache --quiet --fix --select I
  ruff format --no-cache --quiet
}
