#include "session.h"

#include <tvm/ffi/dtype.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensors.h"

namespace blockffn {
namespace {

constexpr int INPUTS = 6;  // of a step
constexpr DLDataType INT64{kDLInt, 64, 1};

size_t row_bytes(const ffi::Tensor& tensor) {
  return tensor.size(tensor.ndim() - 1) * (tensor.dtype().bits / 8);
}

float widened(float x) { return x; }

struct BFloat16 {
  uint16_t bits;
};
float widened(BFloat16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

struct Float16 {
  uint16_t bits;
};
float widened(Float16 x) {
  uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float sign = x.bits >> 15 ? -1.f : 1.f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.f + fraction, exponent - 25)
                          : std::ldexp(static_cast<float>(fraction), -24));
}

// Index of the largest of n, the first where several are equal; that of the first NaN, if any.
template <typename T>
int64_t argmax(const void* data, int64_t n) {
  auto* values = static_cast<const T*>(data);
  int64_t best = 0;
  float most = widened(values[0]);
  for (int64_t i = 1; i < n && !std::isnan(most); ++i) {
    float value = widened(values[i]);
    if (value > most || std::isnan(value)) best = i, most = value;
  }
  return best;
}

}  // namespace

Session::Session(const Bundle& bundle, int64_t max_length)
    : bundle_(bundle), max_length_(max_length) {
  const Manifest& m = bundle.manifest;
  DLDataType dtype = ffi::StringToDLDataType(m.dtype);
  for (int i = 0; i < INPUTS; ++i) {
    inputs_.push_back(allocate({m.max_tokens}, INT64, bundle.device));
  }
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    for (int64_t dim : {m.key_dim, m.value_dim}) {
      cache_.push_back(allocate({1, m.heads, max_length, dim}, dtype, bundle.device));
    }
  }
}

int64_t Session::prefill(const std::vector<int64_t>& tokens) {
  length_ = 0;
  ffi::Tensor features;
  auto end = tokens.end();
  for (auto first = tokens.begin(); first != end;) {
    auto last = first + std::min<int64_t>(bundle_.manifest.max_tokens, end - first);
    features = trunk(Tree::chain({first, last}));
    length_ += last - first;
    first = last;
  }
  ffi::Tensor row = allocate({1, features.size(1)}, features.dtype(), bundle_.device);
  copy(view(features, row.shape(), (features.size(0) - 1) * row_bytes(features)), row);
  return best(row)[0];
}

std::vector<int64_t> Session::verify(const Tree& tree) { return best(trunk(tree)); }

void Session::commit(const std::vector<int64_t>& path) {
  std::vector<int64_t> sources, slots;
  for (size_t i = 0; i < path.size(); ++i) {
    if (path[i] == static_cast<int64_t>(i)) continue;
    sources.push_back(length_ + path[i]);
    slots.push_back(length_ + i);
  }
  if (!sources.empty()) {
    std::vector<int64_t> rows(sources.size(), 0);
    bundle_.move(input(0, rows), input(1, sources), input(2, slots), cache_);
  }
  length_ += path.size();
}

ffi::Tensor Session::input(size_t index, const std::vector<int64_t>& values) const {
  ffi::Tensor here = allocate({static_cast<int64_t>(values.size())}, INT64, {kDLCPU, 0});
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(here.data_ptr()));
  ffi::Tensor there = view(inputs_[index], here.shape(), 0);
  copy(here, there);
  return there;
}

ffi::Tensor Session::trunk(const Tree& tree) const {
  int64_t count = tree.tokens.size();
  std::vector<int64_t> positions, slots, ancestors;
  for (int64_t i = 0; i < count; ++i) {
    int64_t parent = tree.parents[i];
    positions.push_back(parent < 0 ? length_ : positions[parent] + 1);
    slots.push_back(length_ + i);
    uint64_t seen = parent < 0 ? 0 : ancestors[parent];
    ancestors.push_back(static_cast<int64_t>(seen | uint64_t{1} << i));
  }
  std::vector<int64_t> rows(count, 0), context(count, length_);
  return bundle_
      .trunk(input(0, tree.tokens), input(1, positions), input(2, rows), input(3, context),
             input(4, slots), input(5, ancestors), cache_, bundle_.trunk_weights)
      .cast<ffi::Tensor>();
}

std::vector<int64_t> Session::best(const ffi::Tensor& features) const {
  auto logits = bundle_.head(features, bundle_.head_weights).cast<ffi::Tensor>();
  std::vector<char> data = bytes(logits);
  const std::string& dtype = bundle_.manifest.dtype;
  auto choose = dtype == "float32"    ? argmax<float>
                : dtype == "bfloat16" ? argmax<BFloat16>
                                      : argmax<Float16>;
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < logits.size(0); ++i) {
    tokens.push_back(choose(data.data() + i * row_bytes(logits), logits.size(1)));
  }
  return tokens;
}

}  // namespace blockffn
