// Names of instruction sets, and which of them this build has and this CPU can run.
#include <algorithm>
#include <array>

#include "cpu/isa.h"
#include "hwy/targets.h"
#include "tessera/error.h"

namespace tessera {

namespace {

struct IsaEntry {
  Isa isa;
  std::string_view name;
  const cpu::KernelTable* (*table)();
  int64_t hwy_target;
};

// Worst first. avx512_bf16 is Highway's AVX3 plus one CPUID bit.
constexpr std::array<IsaEntry, 5> kIsas{{
    {Isa::neon, "neon", cpu::kernels_neon, HWY_NEON},
    {Isa::sse4, "sse4", cpu::kernels_sse4, HWY_SSE4},
    {Isa::avx2, "avx2", cpu::kernels_avx2, HWY_AVX2},
    {Isa::avx512, "avx512", cpu::kernels_avx512, HWY_AVX3},
    {Isa::avx512_bf16, "avx512_bf16", cpu::kernels_avx512_bf16, HWY_AVX3},
}};

bool cpu_has_bf16_dot() {
#if HWY_ARCH_X86
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

struct IsaLists {
  std::array<Isa, kIsas.size()> compiled{}, usable{};
  size_t num_compiled = 0, num_usable = 0;

  IsaLists() {
    const int64_t supported = hwy::SupportedTargets();
    for (const IsaEntry& e : kIsas) {
      if (e.table() == nullptr) continue;
      compiled[num_compiled++] = e.isa;
      if ((supported & e.hwy_target) == 0) continue;
      if (e.isa == Isa::avx512_bf16 && !cpu_has_bf16_dot()) continue;
      usable[num_usable++] = e.isa;
    }
  }
};

const IsaLists& lists() {
  static const IsaLists l;
  return l;
}

}  // namespace

std::string_view name_of(Isa isa) {
  if (isa == Isa::automatic) return "auto";
  for (const IsaEntry& e : kIsas) {
    if (e.isa == isa) return e.name;
  }
  return "?";
}

Isa isa_of(std::string_view name) {
  if (name == "auto") return Isa::automatic;
  std::string allowed = "auto";
  for (const IsaEntry& e : kIsas) {
    if (e.name == name) return e.isa;
    allowed.append(", ").append(e.name);
  }
  fail("isa", name, allowed);
}

std::span<const Isa> compiled_isas() { return {lists().compiled.data(), lists().num_compiled}; }
std::span<const Isa> usable_isas() { return {lists().usable.data(), lists().num_usable}; }

namespace cpu {

Isa resolve_isa(Isa isa) {
  const auto usable = usable_isas();
  if (usable.empty()) throw Error("isa", "isa: this CPU has none of the instruction sets that Tessera was built for");
  if (isa == Isa::automatic) return usable.back();
  if (std::find(usable.begin(), usable.end(), isa) == usable.end()) {
    std::string allowed = "auto";
    for (Isa u : usable) allowed.append(", ").append(name_of(u));
    fail("isa", name_of(isa), allowed + " on this CPU");
  }
  return isa;
}

const KernelTable& kernels_of(Isa isa) {
  for (const IsaEntry& e : kIsas) {
    if (e.isa == isa) return *e.table();
  }
  throw Error("isa", "isa: not an instruction set");
}

}  // namespace cpu
}  // namespace tessera
