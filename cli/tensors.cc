#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "command.h"
#include "options.h"
#include "tessera/error.h"

namespace tessera::cli {
namespace {

constexpr int64_t kChunk = int64_t{1} << 16;  // elements of one piece of parallel work

// body(chunk, begin, end) for all chunks of [0, n).
void parallel_chunks(int64_t n, Executor& executor, const auto& body) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const int threads = executor.num_threads();
  executor.run(threads, [&](int t) {
    for (int64_t c = t; c < chunks; c += threads) body(c, c * kChunk, std::min(n, (c + 1) * kChunk));
  });
}

uint64_t splitmix64(uint64_t& state) {  // Steele, Lea and Flood 2014
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// 2^16 standard normal numbers: a 64-bit random word picks four, so that gigabytes of inputs take seconds.
const std::vector<float>& normal_numbers() {
  static const std::vector<float> numbers = [] {
    std::vector<float> x(1 << 16);
    uint64_t state = 1;
    for (size_t i = 0; i < x.size(); i += 2) {  // Box and Muller 1958
      const double u = (static_cast<double>(splitmix64(state) >> 11) + 1) * 0x1p-53;
      const double angle = 2 * std::numbers::pi * static_cast<double>(splitmix64(state) >> 11) * 0x1p-53;
      const double radius = std::sqrt(-2 * std::log(u));
      x[i] = static_cast<float>(radius * std::cos(angle));
      x[i + 1] = static_cast<float>(radius * std::sin(angle));
    }
    return x;
  }();
  return numbers;
}

void check_tensor(const Tensor& t, const std::string& name) {
  if (t.rank() != 4) {
    fail(name, fmt::format("shape [{}]", fmt::join(t.shape(), ", ")),
         "four dimensions, [B, H, S, D] or, with --layout "
         "bshd, [B, S, H, D]");
  }
  if (!is_floating(t.dtype())) fail(name, std::string(name_of(t.dtype())), "fp32, bf16, fp16, fp64");
}

}  // namespace

void InputFlags::add_to(CLI::App& app) {
  const std::string group = "Input";
  app.add_option("--input", input, "A safetensors file with tensors q, k, v")->type_name("FILE")->group(group);
  app.add_option("--q", q, "Queries as .npy (or --input)")->type_name("FILE")->group(group);
  app.add_option("--k", k, "Keys as .npy")->type_name("FILE")->group(group);
  app.add_option("--v", v, "Values as .npy")->type_name("FILE")->group(group);
  app.add_option("--layout", layout, "Order of the dimensions: bhsd is [B, H, S, D], bshd is [B, S, H, D]")
      ->check(one_of({"bhsd", "bshd"}))
      ->type_name("bhsd|bshd")
      ->capture_default_str()
      ->group(group);
}

std::vector<int64_t> Qkv::out_shape() const {
  std::vector<int64_t> shape = q.shape();
  shape[3] = v.shape()[3];
  return shape;
}

TensorView Qkv::as_bshd(const Tensor& t) const {
  const auto& s = t.shape();
  const bool bhsd = layout == Layout::bhsd;
  return attention_view(t.data(), t.dtype(), layout, s[0], s[bhsd ? 2 : 1], s[bhsd ? 1 : 2], s[3]);
}

MutableTensorView Qkv::as_bshd(Tensor& t) const {
  const auto& s = t.shape();
  const bool bhsd = layout == Layout::bhsd;
  return attention_view(t.data(), t.dtype(), layout, s[0], s[bhsd ? 2 : 1], s[bhsd ? 1 : 2], s[3]);
}

Qkv load_qkv(const InputFlags& flags) {
  const bool npy = !flags.q.empty() || !flags.k.empty() || !flags.v.empty();
  if (flags.input.empty() && !npy) throw UsageError("--input FILE, or --q, --k and --v, is required");
  if (!flags.input.empty() && npy) throw UsageError("--input and --q, --k, --v exclude each other");
  Qkv x;
  x.layout = flags.layout == "bshd" ? Layout::bshd : Layout::bhsd;
  if (npy) {
    if (flags.q.empty() || flags.k.empty() || flags.v.empty()) {
      throw UsageError("--q, --k and --v go together: all three are required");
    }
    x.q = read_npy(flags.q);
    x.k = read_npy(flags.k);
    x.v = read_npy(flags.v);
  } else {
    const std::vector<std::string> names = {"q", "k", "v"};
    auto tensors = read_safetensors(flags.input, names);
    x.q = std::move(tensors.at("q"));
    x.k = std::move(tensors.at("k"));
    x.v = std::move(tensors.at("v"));
  }
  check_tensor(x.q, "q");
  check_tensor(x.k, "k");
  check_tensor(x.v, "v");
  // Heads are few and tokens many; so many more heads than tokens are the other layout, most of the time.
  if (x.heads() > 128 && x.heads() >= 4 * x.seqlen_q()) {
    complain(fmt::format("warning: --layout {} makes [{}] {} heads of {} tokens; where it is {} say --layout {}",
                         flags.layout, fmt::join(x.q.shape(), ", "), x.heads(), x.seqlen_q(),
                         x.layout == Layout::bhsd ? "[B, S, H, D]" : "[B, H, S, D]",
                         x.layout == Layout::bhsd ? "bshd" : "bhsd"));
  }
  return x;
}

Tensor convert(const Tensor& tensor, DType dtype, Executor& executor) {
  if (tensor.dtype() == dtype) return tensor;
  Tensor result(dtype, tensor.shape());
  parallel_chunks(tensor.numel(), executor, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      store_from_double(result.data(), dtype, i, load_as_double(tensor.data(), tensor.dtype(), i));
    }
  });
  return result;
}

Qkv convert(const Qkv& x, DType dtype, Executor& executor) {
  return {convert(x.q, dtype, executor), convert(x.k, dtype, executor), convert(x.v, dtype, executor), x.layout};
}

Tensor random_normal(DType dtype, std::vector<int64_t> shape, uint64_t seed, Executor& executor) {
  Tensor t(dtype, std::move(shape));
  const std::vector<float>& normal = normal_numbers();
  parallel_chunks(t.numel(), executor, [&](int64_t chunk, int64_t begin, int64_t end) {
    uint64_t state = seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(chunk) * 0xd1b54a32d192ed03u;
    uint64_t word = 0;
    for (int64_t i = begin; i < end; ++i) {
      if ((i - begin) % 4 == 0) word = splitmix64(state);
      store_from_double(t.data(), dtype, i, normal[word & 0xffff]);
      word >>= 16;
    }
  });
  return t;
}

Qkv random_qkv(const QkvShape& s, DType dtype, Layout layout, uint64_t seed, Executor& executor) {
  const auto shape = [&](int64_t seqlen, int64_t heads, int64_t dim) {
    return layout == Layout::bhsd ? std::vector<int64_t>{s.batch, heads, seqlen, dim}
                                  : std::vector<int64_t>{s.batch, seqlen, heads, dim};
  };
  Qkv x;
  x.layout = layout;
  x.q = random_normal(dtype, shape(s.seqlen_q, s.heads, s.head_dim), 3 * seed, executor);
  x.k = random_normal(dtype, shape(s.seqlen_k, s.kv_heads, s.head_dim), 3 * seed + 1, executor);
  x.v = random_normal(dtype, shape(s.seqlen_k, s.kv_heads, s.head_dim_v), 3 * seed + 2, executor);
  return x;
}

}  // namespace tessera::cli
