#!/usr/bin/env bash
# CPUs that lack what this one has, emulated: exactly the kernels that such a CPU can run are offered, they are right,
# and a CPU that can run none of them is told so. AVX-512 is beyond the emulator. A seed without subnormal halves: the
# emulator's conversions of fp16 follow the flags that flush subnormals, those of CPUs do not (VCVTPH2PS ignores DAZ).
#   emulated_cpu_test.sh PROGRAM
set -euo pipefail
program=$1
fail() { printf '%s\n' "$*"; exit 1; }
emulate() { qemu-x86_64 -cpu "$1" "$program" "${@:2}"; }

checks() {  # CPU ISA...
  local kernels
  kernels=$(emulate "$1" check --cases 12 --seed 1 --format csv 2>/dev/null | tail -n +2 | cut -d, -f1 | sort -u | xargs)
  [ "$kernels" = "${*:2}" ] || fail "on $1 ran: $kernels; expected: ${*:2}"
}
checks Westmere sse4
checks Haswell avx2 sse4

status=0
said=$(emulate core2duo bench --seq 256 --heads 1 --repeat 1 2>&1 >/dev/null) || status=$?
[ $status = 1 ] && [[ $said == *isa* ]] || fail "on core2duo: exit status $status, said: $said"
echo "each emulated CPU runs its own kernels"
