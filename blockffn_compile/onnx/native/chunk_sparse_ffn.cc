// com.blockffn::ChunkSparseFFN for ONNX Runtime.
//
// Inputs x [T, H], scores [T, E], up [E, S, H], down [E, S, H] and optionally gate [E, S, H], all
// of one type; output y [T, H]; attribute act.  The weights are constants and packed when a session
// is created.  Whatever is wrong with a model or its inputs becomes an OrtStatus.
#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "panels.h"
#include "runtime.h"

// The kernels of schedules/tir/cpu.py, compiled for any shape and activation.
#define BLOCKFFN_KERNELS(type)                                      \
  int __tvm_ffi_chunk_sparse_ffn_##type(                            \
      void*, const TVMFFIAny*, std::int32_t count, TVMFFIAny*);     \
  int __tvm_ffi_chunk_sparse_ffn_##type##_gated(                    \
      void*, const TVMFFIAny*, std::int32_t count, TVMFFIAny*)
extern "C" {
BLOCKFFN_KERNELS(float32);
BLOCKFFN_KERNELS(float16);
BLOCKFFN_KERNELS(bfloat16);
}

namespace blockffn {
namespace {

// What the kernels were compiled with; the build defines it.
constexpr std::int64_t kPanel = BLOCKFFN_PANEL;
constexpr std::array kActivations{BLOCKFFN_ACTIVATIONS};

// A kernel reads the weights once for all tokens of a call, so the more the better, but each of
// them takes a row of workspace for every expert.
constexpr std::int64_t kMostTokens = 256;
constexpr std::int64_t kWorkspaceBytes = std::int64_t{1} << 28;

constexpr std::array kInputs{"x", "scores", "up", "down", "gate"};
enum Input : std::size_t { kX, kScores, kUp, kDown, kGate };

struct Type {
  ONNXTensorElementDataType onnx;
  DLDataType tvm;
  TVMFFISafeCallType plain, gated;

  std::size_t bytes() const { return tvm.bits / 8; }
};

#define BLOCKFFN_TYPE(onnx, code, bits, name)                           \
  Type {                                                                \
    ONNX_TENSOR_ELEMENT_DATA_TYPE_##onnx, {code, bits, 1},              \
        __tvm_ffi_chunk_sparse_ffn_##name,                              \
        __tvm_ffi_chunk_sparse_ffn_##name##_gated                       \
  }
const std::array kTypes{
    BLOCKFFN_TYPE(FLOAT, kDLFloat, 32, float32),
    BLOCKFFN_TYPE(FLOAT16, kDLFloat, 16, float16),
    BLOCKFFN_TYPE(BFLOAT16, kDLBfloat, 16, bfloat16),
};

std::string text(const std::vector<std::int64_t>& shape) {
  std::string result = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    result += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return result + "]";
}

// The status of what body throws.
template <typename Body>
OrtStatusPtr guarded(Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::Status(error).release();
  } catch (const std::exception& error) {
    return Ort::Status(error).release();
  }
}

class Kernel {
 public:
  Kernel(Ort::ConstKernelInfo info, const Type& type)
      : type_(type), label_("ChunkSparseFFN node '" + info.GetNodeName() + "': ") {
    std::string act;
    try {
      act = info.GetAttribute<std::string>("act");
    } catch (const Ort::Exception&) {
      fail("it needs the attribute act, a string");
    }
    const auto found = std::find(kActivations.begin(), kActivations.end(), act);
    if (found == kActivations.end()) {
      std::string names;
      for (const char* name : kActivations) names += (names.empty() ? "" : ", ") + std::string(name);
      fail("act is '" + act + "' and must be one of " + names);
    }
    act_ = found - kActivations.begin();

    const void* up = weight(info, kUp);
    const void* down = weight(info, kDown);
    const bool gated = info.GetInputCount() > kGate && !info.GetInputName(kGate).empty();
    const void* gate = gated ? weight(info, kGate) : nullptr;
    up_ = pack(up, kUp);
    down_ = pack(down, kDown);
    if (gated) gate_ = pack(gate, kGate);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) const noexcept {
    return guarded([&] { compute(Ort::KernelContext(context)); });
  }

 private:
  [[noreturn]] void fail(const std::string& message) const {
    throw Ort::Exception(label_ + message, ORT_INVALID_ARGUMENT);
  }

  // Data of a constant [E, S, H]; up comes first and determines the lengths.
  const void* weight(Ort::ConstKernelInfo info, Input input) {
    const std::string name = kInputs[input];
    int constant = 0;
    const auto value = info.GetTensorConstantInput(input, &constant);
    if (!constant) fail(name + " must be a constant initializer");
    const auto shape = value.GetTensorTypeAndShapeInfo().GetShape();
    if (shape.size() != 3 || *std::min_element(shape.begin(), shape.end()) < 1) {
      fail(name + " must be [experts, size, hidden], all at least 1, and is " + text(shape));
    }
    if (input == kUp) {
      experts_ = shape[0], size_ = shape[1], hidden_ = shape[2];
      check_size();
    } else if (shape != std::vector{experts_, size_, hidden_}) {
      fail(name + " is " + text(shape) + " where up is " + text({experts_, size_, hidden_}));
    }
    return value.GetTensorRawData();
  }

  void check_size() {
    // The kernels index with 32 bits; padding adds less than a panel.
    const double experts = experts_, size = size_ + kPanel, hidden = hidden_ + kPanel;
    if (experts * size * hidden > INT32_MAX) {
      fail("weights of " + text({experts_, size_, hidden_}) + " are too large for the kernels");
    }
    const double row = sizeof(float) * std::max(2 * experts * size, hidden);
    tokens_ = std::clamp<std::int64_t>(kWorkspaceBytes / row, 1, kMostTokens);
  }

  Panels pack(const void* weight, Input input) const {
    auto pack = type_.bytes() == 4 ? blockffn::pack<std::uint32_t> : blockffn::pack<std::uint16_t>;
    return pack(weight, experts_, size_, hidden_, kPanel, input != kDown);
  }

  // T of an input [T, width].
  std::int64_t tokens(Ort::ConstValue value, Input input, std::int64_t width) const {
    const auto shape = value.GetTensorTypeAndShapeInfo().GetShape();
    if (shape.size() != 2 || shape[1] != width) {
      fail(std::string(kInputs[input]) + " must be [tokens, " + std::to_string(width) + "] and is " +
           text(shape));
    }
    return shape[0];
  }

  void compute(Ort::KernelContext context) const {
    const auto x = context.GetInput(kX), scores = context.GetInput(kScores);
    const std::int64_t count = tokens(x, kX, hidden_);
    if (std::int64_t other = tokens(scores, kScores, experts_); other != count) {
      fail("x has " + std::to_string(count) + " tokens and scores " + std::to_string(other));
    }
    auto y = context.GetOutput(0, {count, hidden_});
    const auto* x_data = static_cast<const char*>(x.GetTensorRawData());
    const auto* scores_data = static_cast<const char*>(scores.GetTensorRawData());
    auto* y_data = static_cast<char*>(y.GetTensorMutableRawData());
    Runtime runtime(context);
    for (std::int64_t first = 0; first < count; first += tokens_) {
      chunk(runtime, std::min(count - first, tokens_),
            x_data + first * hidden_ * type_.bytes(),
            scores_data + first * experts_ * type_.bytes(),
            y_data + first * hidden_ * type_.bytes());
    }
  }

  // At most tokens_ tokens, from and to memory of any alignment.
  void chunk(Runtime& runtime, std::int64_t count, const void* x, const void* scores,
             void* y) const {
    const std::size_t bytes = count * hidden_ * type_.bytes();
    const auto misaligned = [](const void* data) {
      return reinterpret_cast<std::uintptr_t>(data) % kAlignment != 0;
    };
    Runtime::Buffer x_copy, scores_copy, result;
    const auto aligned = [&](const void* data, std::size_t bytes, Runtime::Buffer& copy) {
      if (!misaligned(data)) return data;
      copy = runtime.allocate(bytes);
      return static_cast<const void*>(std::memcpy(copy.get(), data, bytes));
    };
    if (misaligned(y)) result = runtime.allocate(bytes);

    std::int64_t hidden_shape[]{count, hidden_}, scores_shape[]{count, experts_};
    std::array<DLTensor, 6> tensors;
    std::array<TVMFFIAny, 7> arguments{};
    std::size_t used = 0;
    const auto add = [&](const void* data, int ndim, const std::int64_t* shape) {
      tensors[used] = {const_cast<void*>(data), {kDLCPU, 0}, ndim, type_.tvm,
                       const_cast<std::int64_t*>(shape), nullptr, 0};
      arguments[used].type_index = kTVMFFIDLTensorPtr;
      arguments[used].v_ptr = &tensors[used];
      ++used;
    };
    add(aligned(x, bytes, x_copy), 2, hidden_shape);
    add(aligned(scores, count * experts_ * type_.bytes(), scores_copy), 2, scores_shape);
    add(up_.data.get(), 4, up_.shape);
    if (gate_.data) add(gate_.data.get(), 4, gate_.shape);
    add(down_.data.get(), 4, down_.shape);
    add(result ? result.get() : y, 2, hidden_shape);
    arguments[used].type_index = kTVMFFIInt;
    arguments[used].v_int64 = act_;
    runtime.call(gate_.data ? type_.gated : type_.plain, arguments.data(), used + 1);
    if (result) std::memcpy(y, result.get(), bytes);
  }

  const Type& type_;
  const std::string label_;  // begins every message
  std::int64_t act_, experts_, size_, hidden_;
  std::int64_t tokens_;  // most in one call
  Panels up_, down_, gate_;
};

class ChunkSparseFFN : public Ort::CustomOpBase<ChunkSparseFFN, Kernel, /*WithStatus=*/true> {
 public:
  explicit ChunkSparseFFN(const Type& type) : type_(type) {}

  const char* GetName() const { return "ChunkSparseFFN"; }
  std::size_t GetInputTypeCount() const { return kInputs.size(); }
  std::size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(std::size_t) const { return type_.onnx; }
  ONNXTensorElementDataType GetOutputType(std::size_t) const { return type_.onnx; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(std::size_t index) const {
    return index == kGate ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new Kernel(Ort::ConstKernelInfo(info), type_); });
  }

 private:
  const Type& type_;
};

// Never destroyed: sessions may outlive the static objects of this library.
OrtCustomOpDomain* domain() {
  static OrtCustomOpDomain* const domain = [] {
    Ort::CustomOpDomain domain("com.blockffn");
    for (const Type& type : kTypes) domain.Add(new ChunkSparseFFN(type));
    return domain.release();
  }();
  return domain;
}

}  // namespace
}  // namespace blockffn

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* const api = base->GetApi(ORT_API_VERSION);
  if (!api) {
    const std::string message = "the BlockFFN library needs ONNX Runtime 1." +
                                std::to_string(ORT_API_VERSION) + " or newer; this is " +
                                base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_FAIL, message.c_str());
  }
  static const bool ready = (Ort::InitApi(api), true);
  static_cast<void>(ready);
  return blockffn::guarded([&] {
    // ONNX Runtime refuses a domain that comes twice.
    constexpr const char* kRegistered = "com.blockffn.registered";
    int registered = 0;
    Ort::ThrowOnError(api->HasSessionConfigEntry(options, kRegistered, &registered));
    if (registered) return;
    Ort::ThrowOnError(api->AddCustomOpDomain(options, blockffn::domain()));
    Ort::ThrowOnError(api->AddSessionConfigEntry(options, kRegistered, "1"));
  });
}
