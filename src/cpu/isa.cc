// Names of instruction sets, and which of them this build has and this CPU can run.
#include <algorithm>
#include <array>
#include <chrono>
#include <vector>

#include "cpu/isa.h"
#include "hwy/targets.h"
#include "tessera/error.h"

namespace tessera {

namespace {

struct IsaEntry {
  Isa isa;
  std::string_view name;
  cpu::KernelTable kernels;  // empty where this build has no such target
  bool (*usable)();          // on this CPU, where compiled
};

template <int64_t kTarget>
bool highway_knows() {
  return (hwy::SupportedTargets() & kTarget) != 0;
}

// Highway's AVX3 plus one CPUID bit.
bool has_bf16_dot() {
#if HWY_ARCH_X86
  return highway_knows<HWY_AVX3>() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

std::array<IsaEntry, 5> make_entries() {
  using namespace cpu;
  const auto forward = tables_of_targets<ForwardKernels>();
  const auto decode = tables_of_targets<DecodeKernels>();
  const auto backward = tables_of_targets<BackwardKernels>();
  const auto peak = tables_of_targets<PeakKernels>();
  const auto of = [&](auto member) {
    return KernelTable{member(forward), member(decode), member(backward), member(peak)};
  };
  const KernelTable bf16{table_avx512_bf16<ForwardKernels>(), table_avx512_bf16<DecodeKernels>(),
                         table_avx512_bf16<BackwardKernels>(), table_avx512_bf16<PeakKernels>()};
  return {{
      {Isa::neon, "neon", of([](const auto& t) { return t.neon; }), highway_knows<HWY_NEON>},
      {Isa::sse4, "sse4", of([](const auto& t) { return t.sse4; }), highway_knows<HWY_SSE4>},
      {Isa::avx2, "avx2", of([](const auto& t) { return t.avx2; }), highway_knows<HWY_AVX2>},
      {Isa::avx512, "avx512", of([](const auto& t) { return t.avx512; }), highway_knows<HWY_AVX3>},
      {Isa::avx512_bf16, "avx512_bf16", bf16, has_bf16_dot},
  }};
}

// All that Tessera knows, worst first.
const std::array<IsaEntry, 5>& entries() {
  static const std::array<IsaEntry, 5> all = make_entries();
  return all;
}

struct IsaLists {
  std::vector<Isa> compiled, usable;

  IsaLists() {
    for (const IsaEntry& e : entries()) {
      if (e.kernels.forward == nullptr) continue;
      compiled.push_back(e.isa);
      if (e.usable()) usable.push_back(e.isa);
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
  for (const IsaEntry& e : entries()) {
    if (e.isa == isa) return e.name;
  }
  return "?";
}

Isa isa_of(std::string_view name) {
  if (name == "auto") return Isa::automatic;
  std::string allowed = "auto";
  for (const IsaEntry& e : entries()) {
    if (e.name == name) return e.isa;
    allowed.append(", ").append(e.name);
  }
  fail("isa", name, allowed);
}

std::span<const Isa> compiled_isas() { return lists().compiled; }
std::span<const Isa> usable_isas() { return lists().usable; }

Isa automatic_isa(bool decode) {
  return cpu::resolve_isa(Isa::automatic, decode ? cpu::Bound::memory : cpu::Bound::compute);
}

namespace cpu {

namespace {

// Whether the native dot has fewer flops than the FMA: half as many on Sapphire and Emerald Rapids, twice as many on
// Zen 4 and 5. .03 ms, once a process: the best of five turns, as other work on the core comes and goes (on Emerald
// Rapids the ratio was .50 in the median of 40,300 trials, .945 in the worst).
bool dot_is_slow() {
  static const bool slow = [] {
    const PeakKernels& kernels = *kernels_of(Isa::avx512_bf16).peak;
    const auto rate = [](double (*burn)(int64_t)) {
      const auto start = std::chrono::steady_clock::now();
      const double flops = burn(500);
      return flops / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    double fma = 0, dot = 0;
    for (int i = 0; i < 5; ++i) {
      fma = std::max(fma, rate(kernels.fma_burn));
      dot = std::max(dot, rate(kernels.bf16_burn));
    }
    return dot < fma;
  }();
  return slow;
}

}  // namespace

Isa automatic_of(std::span<const Isa> usable, Bound bound, bool dot_is_slow) {
  const bool convert = usable.back() == Isa::avx512_bf16 && bound == Bound::compute && dot_is_slow;
  return convert ? Isa::avx512 : usable.back();
}

Isa resolve_isa(Isa isa, Bound bound) {
  const auto usable = usable_isas();
  if (usable.empty()) throw Error("isa", "isa: this CPU has none of the instruction sets that Tessera was built for");
  if (isa == Isa::automatic) {
    const bool asked = usable.back() == Isa::avx512_bf16 && bound == Bound::compute;
    return automatic_of(usable, bound, asked && dot_is_slow());
  }
  if (std::find(usable.begin(), usable.end(), isa) == usable.end()) {
    std::string allowed = "auto";
    for (Isa u : usable) allowed.append(", ").append(name_of(u));
    fail("isa", name_of(isa), allowed + " on this CPU");
  }
  return isa;
}

const KernelTable& kernels_of(Isa isa) {
  for (const IsaEntry& e : entries()) {
    if (e.isa == isa) return e.kernels;
  }
  throw Error("isa", "isa: not an instruction set");
}

}  // namespace cpu
}  // namespace tessera
