#include "convert.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "result_memory.h"

namespace tessera::ops {

namespace {

std::string text_of(const at::Tensor& t) {
  std::string text = std::string(c10::toString(t.scalar_type())) + " [";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "] on " + t.device().str();
}

DType dtype_of(const char* name, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default:
      fail(name, std::string("dtype ") + c10::toString(t.scalar_type()), "float32, bfloat16, float16 or float64");
  }
}

template <class T>
std::vector<T> vector_of(const at::Tensor& t) {
  const T* data = t.const_data_ptr<T>();
  return std::vector<T>(data, data + t.numel());
}

}  // namespace

void check_device(const char* name, const at::Tensor& t) {
  if (!t.defined()) fail(name, "no tensor", "a strided tensor on cpu");
  if (t.is_nested()) fail(name, "a nested tensor", "a strided tensor (varlen takes packed sequences)");
  if (t.is_quantized()) fail(name, "a quantized tensor", "float32, bfloat16, float16 or float64");
  if (!t.device().is_cpu()) fail(name, "a tensor on " + t.device().str(), "a tensor on cpu");
  if (t.layout() != at::kStrided) fail(name, "a sparse tensor", "a strided tensor");
}

at::Tensor integers(const char* name, const at::Tensor& t, at::ScalarType wanted) {
  check_device(name, t);
  if (t.scalar_type() != at::kInt && t.scalar_type() != at::kLong) fail(name, text_of(t), "int32 or int64");
  constexpr int64_t kMost = int64_t{1} << 36;  // an expanded view may be longer than any memory
  if (t.numel() > kMost) fail(name, text_of(t), "at most 2^36 numbers");
  if (wanted == at::kInt && t.scalar_type() == at::kLong && t.numel() > 0) {
    constexpr int64_t low = std::numeric_limits<int32_t>::min(), high = std::numeric_limits<int32_t>::max();
    const auto [least, most] = t.aminmax();
    for (const int64_t x : {least.item<int64_t>(), most.item<int64_t>()}) {
      if (x < low || x > high) fail(name, std::to_string(x), "numbers of 32 bits");
    }
  }
  return t.to(wanted).contiguous();
}

TensorView view_of(const char* name, const at::Tensor& t) {
  if (!t.defined()) return {};
  check_device(name, t);
  if (t.dim() < 1 || t.dim() > TensorView::kMaxRank) {
    fail(name, std::to_string(t.dim()) + " dimensions", "1 to " + std::to_string(TensorView::kMaxRank));
  }
  TensorView v;
  v.data = t.const_data_ptr();
  v.dtype = dtype_of(name, t);
  v.rank = static_cast<int>(t.dim());
  for (int i = 0; i < v.rank; ++i) {
    v.sizes[i] = t.size(i);
    v.strides[i] = t.stride(i);
  }
  return v;
}

TensorView view_of(const char* name, const MaybeTensor& t) { return t.has_value() ? view_of(name, *t) : TensorView{}; }

MutableTensorView output_view(const char* name, const at::Tensor& t) {
  const TensorView v = view_of(name, t);
  return {{const_cast<void*>(v.data), v.dtype, v.rank, v.sizes, v.strides}};
}

int narrow(int64_t n) { return static_cast<int>(std::clamp<int64_t>(n, -1, 1 << 20)); }

std::vector<int64_t> shape_numbers(const PatternShape& s) {
  const int64_t flags = (s.causal ? 1 : 0) | (s.q_offset ? 2 : 0);
  return {s.seqlen_q, s.seqlen_k, s.block_q, s.block_k, s.heads, s.batches, flags, s.q_offset.value_or(0), s.q_skip};
}

PatternShape shape_of(const char* name, at::IntArrayRef n) {
  if (n.size() != kShapeNumbers) {
    fail(name, std::to_string(n.size()) + " numbers",
         "9: seqlen_q, seqlen_k, block_q, block_k, heads, batches, flags (1: causal, 2: q_offset given), q_offset, "
         "q_skip");
  }
  if (n[6] < 0 || n[6] > 3) fail(name, "flags " + std::to_string(n[6]), "0..3 (1: causal, 2: q_offset given)");
  PatternShape shape{n[0], n[1], narrow(n[2]), narrow(n[3]), n[4], n[5]};
  shape.causal = (n[6] & 1) != 0;
  if (n[6] & 2) shape.q_offset = n[7];
  shape.q_skip = narrow(n[8]);
  return shape;
}

namespace {

// What the storage of indptr holds beside its numbers.
struct Carrier {
  BlockPattern pattern;
  std::vector<int32_t> indptr;

  static void destroy(void* carrier) { delete static_cast<Carrier*>(carrier); }
  static const Carrier* of(const at::Tensor& indptr) {
    if (!indptr.defined() || !indptr.has_storage()) return nullptr;
    const c10::DataPtr& memory = indptr.storage().data_ptr();
    return memory.get_deleter() == &destroy ? static_cast<const Carrier*>(memory.get_context()) : nullptr;
  }
};

template <class T, class Tensor>
bool holds(const MaybeTensor& t, const T* numbers, int64_t count) {
  if (!t.has_value()) return count == 0;
  return t->scalar_type() == c10::CppTypeToScalarType<Tensor>::value && t->numel() == count && t->is_contiguous() &&
         std::equal(numbers, numbers + count, t->const_data_ptr<Tensor>());
}

bool says(const PatternTensors& t, const BlockPattern& pattern) {
  const BlockPatternView v = pattern.view();
  const int64_t entries = pattern.num_blocks(), bitmaps = pattern.num_bitmaps();
  return t.shape == shape_numbers(v.shape) && holds<int64_t, int32_t>(t.indptr, v.indptr, v.shape.total_rows() + 1) &&
         holds<int32_t, int32_t>(t.indices, v.indices, entries) &&
         holds<int32_t, int32_t>(t.bitmap_index, v.bitmap_index, bitmaps ? entries : 0) &&
         holds<int64_t, int64_t>(t.bitmaps, reinterpret_cast<const int64_t*>(v.bitmaps),
                                 bitmaps * v.shape.block_q * v.shape.bitmap_words());
}

}  // namespace

PatternTensors tensors_of(const BlockPattern& pattern) {
  const c10::InferenceMode outside(false);  // a pattern made in inference mode serves training later on
  const BlockPatternView v = pattern.view();
  const PatternShape& s = v.shape;
  const int64_t rows = s.total_rows(), entries = pattern.num_blocks(), count = pattern.num_bitmaps();
  // int32 where it suffices: 2^31 blocks are beyond any pattern that is worth making.
  TORCH_CHECK_VALUE(entries < (int64_t{1} << 31), "pattern: ", entries, " kept blocks; allowed: below 2^31");
  PatternTensors t;
  auto carrier = std::make_unique<Carrier>(Carrier{pattern, {v.indptr, v.indptr + rows + 1}});
  int32_t* indptr = carrier->indptr.data();
  t.indptr =
      at::for_blob(indptr, {rows + 1}).context(carrier.release(), &Carrier::destroy).options(at::kInt).make_tensor();
  t.indices = at::empty({entries}, at::kInt);
  std::copy_n(v.indices, entries, t.indices.mutable_data_ptr<int32_t>());
  if (count) {
    t.bitmap_index = at::empty({entries}, at::kInt);
    t.bitmaps = at::empty({count, s.block_q, s.bitmap_words()}, at::kLong);
    std::copy_n(v.bitmap_index, entries, t.bitmap_index->mutable_data_ptr<int32_t>());
    std::copy_n(v.bitmaps, t.bitmaps->numel(), reinterpret_cast<uint64_t*>(t.bitmaps->mutable_data_ptr<int64_t>()));
  }
  t.shape = shape_numbers(s);
  return t;
}

BlockPattern pattern_of(const PatternTensors& p) {
  if (const Carrier* carrier = Carrier::of(p.indptr)) {
    if (says(p, carrier->pattern)) return carrier->pattern;
  }
  const PatternShape shape = shape_of("pattern_shape", p.shape);
  std::vector<int32_t> bitmap_index;
  std::vector<uint64_t> bitmaps;
  if (p.bitmap_index.has_value() != p.bitmaps.has_value()) {
    fail("bitmaps", p.bitmaps ? "bitmaps without bitmap_index" : "bitmap_index without bitmaps", "both or none");
  }
  if (p.bitmap_index.has_value()) {
    bitmap_index = vector_of<int32_t>(integers("bitmap_index", *p.bitmap_index, at::kInt));
    const at::Tensor words = integers("bitmaps", *p.bitmaps, at::kLong);
    const auto* data = reinterpret_cast<const uint64_t*>(words.const_data_ptr<int64_t>());
    bitmaps.assign(data, data + words.numel());
  }
  return BlockPattern::from_csr(shape, vector_of<int64_t>(integers("indptr", p.indptr, at::kLong)),
                                vector_of<int32_t>(integers("indices", p.indices, at::kInt)), std::move(bitmap_index),
                                std::move(bitmaps));
}

Options::Options(const OptionArguments& a, int64_t batch) {
  options_.scale = a.scale;
  options_.causal = a.causal;
  options_.window_left = a.window_left;
  options_.window_right = a.window_right;
  options_.q_offset = a.q_offset;
  options_.k_offset = a.k_offset;
  if (a.key_lengths.has_value()) {
    if (a.key_lengths->dim() != 1) fail("key_lengths", text_of(*a.key_lengths), "[B] int32 or int64");
    key_lengths_ = vector_of<int64_t>(integers("key_lengths", *a.key_lengths, at::kLong));
    // To the core, none of them means all keys.
    if (key_lengths_.empty() && batch > 0) fail("key_lengths", "0 numbers", c10::str("one a batch, B = ", batch));
    options_.key_lengths = key_lengths_;
  }
  options_.align_to_key_lengths = a.align_to_key_lengths;
  options_.softcap = a.softcap;
  options_.alibi_slopes = view_of("alibi_slopes", a.alibi_slopes);
  options_.block_bias = view_of("block_bias", a.block_bias);
  options_.attn_bias = view_of("attn_bias", a.attn_bias);
  options_.sinks = view_of("sinks", a.sinks);
  options_.dropout.p = a.dropout_p;
  if (a.dropout_p > 0) {
    if (!a.rng.has_value() || a.rng->numel() != 2) {
      fail("rng", a.rng.has_value() ? text_of(*a.rng) : "nothing", "int64 [2]: seed and offset of the dropout");
    }
    const at::Tensor rng = integers("rng", *a.rng, at::kLong);
    options_.dropout.seed = static_cast<uint64_t>(rng.const_data_ptr<int64_t>()[0]);
    options_.dropout.offset = static_cast<uint64_t>(rng.const_data_ptr<int64_t>()[1]);
  }
}

void check_result(const char* name, at::IntArrayRef sizes, at::ScalarType dtype) {
  constexpr double kMostBytes = 0x1p42;
  double bytes = static_cast<double>(c10::elementSize(dtype));
  for (const int64_t n : sizes) bytes *= static_cast<double>(n);
  if (bytes > kMostBytes) fail(name, c10::str("a result of ", sizes), "one of at most 2^42 bytes");
}

at::Tensor empty_like_layout(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype) {
  const auto options = like.options().dtype(dtype);
  check_result("out", sizes, dtype);
  if (like.dim() == 4 && like.stride(2) > like.stride(1)) {  // [B, H, S, D] in memory
    return empty_result({sizes[0], sizes[2], sizes[1], sizes[3]}, options).transpose(1, 2);
  }
  return empty_result(sizes, options);
}

}  // namespace tessera::ops
