#include "bundle.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/runtime/base.h>
#include <tvm/runtime/device_api.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string_view>

#include "machine.h"
#include "sha256.h"
#include "tensors.h"

namespace blockffn {
namespace {

namespace fs = std::filesystem;
namespace json = ffi::json;

constexpr int64_t FORMAT = 2;
constexpr uint64_t ALIGNMENT = 64;
// Most bytes of a manifest, and of the header of the weights; most nested brackets in either.
constexpr uint64_t LARGEST_HEADER = 1 << 24;
constexpr int DEEPEST = 16;
const char* const CODE = "model.so";
const char* const WEIGHTS = "weights.safetensors";

[[noreturn]] void fail(const fs::path& file, const std::string& what) {
  throw BundleError(file.string() + ": " + what);
}

// A regular file in memory, read when it is needed.
class Mapping {
 public:
  explicit Mapping(const fs::path& file) {
    int descriptor = open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (descriptor < 0) fail(file, errno == ENOENT ? "no such file" : std::strerror(errno));
    struct stat status;
    bool regular = fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
    size_ = regular ? status.st_size : 0;
    void* data = size_ ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0) : MAP_FAILED;
    close(descriptor);
    if (!regular) fail(file, "not a regular file");
    if (size_ == 0) fail(file, "empty");
    if (data == MAP_FAILED) fail(file, "cannot be mapped to memory");
    data_ = static_cast<uint8_t*>(data);
  }
  ~Mapping() { munmap(data_, size_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  uint8_t* data_;
  uint64_t size_;
};

// --- JSON ----------------------------------------------------------------------------------------

// A text of brackets alone must not exhaust the parser's stack.
bool too_deep(std::string_view text) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (quoted && c == '\\') {
      ++i;
    } else if (c == '"') {
      quoted = !quoted;
    } else if (!quoted && (c == '{' || c == '[')) {
      if (++depth > DEEPEST) return true;
    } else if (!quoted && (c == '}' || c == ']')) {
      --depth;
    }
  }
  return false;
}

json::Object parse(const fs::path& file, const uint8_t* data, uint64_t size) {
  std::string_view text(reinterpret_cast<const char*>(data), size);
  if (too_deep(text)) fail(file, "not valid JSON: nested too deeply");
  ffi::String error;
  json::Value value = json::Parse(ffi::String(text.data(), text.size()), &error);
  if (!error.empty()) fail(file, "not valid JSON: " + std::string(error));
  auto object = value.as<json::Object>();
  if (!object) fail(file, "not a JSON object");
  return *object;
}

template <typename T>
T get(const fs::path& file, const json::Object& object, const std::string& name) {
  ffi::String key(name);
  if (object.count(key) == 0) fail(file, "field '" + name + "' is missing");
  auto value = object.at(key).try_cast<T>();
  if (!value) fail(file, "field '" + name + "' is not of its type");
  return *value;
}

// --- Manifest ------------------------------------------------------------------------------------

Manifest read_manifest(const fs::path& file) {
  Mapping mapping(file);
  if (mapping.size() > LARGEST_HEADER) fail(file, "too large");
  json::Object object = parse(file, mapping.data(), mapping.size());
  auto format = get<int64_t>(file, object, "format");
  if (format != FORMAT) {
    fail(file, "format " + std::to_string(format) + ", this version reads format " +
                   std::to_string(FORMAT));
  }
  Manifest manifest;
  manifest.target = get<ffi::String>(file, object, "target");
  manifest.architecture = get<ffi::String>(file, object, "architecture");
  manifest.dtype = get<ffi::String>(file, object, "dtype");
  manifest.compute_capability = get<ffi::String>(file, object, "compute_capability");
  manifest.cpu_features = get<ffi::Array<ffi::String>>(file, object, "cpu_features");
  manifest.trunk_weights = get<ffi::Array<ffi::String>>(file, object, "trunk_weights");
  manifest.head_weights = get<ffi::Array<ffi::String>>(file, object, "head_weights");
  manifest.stop_tokens = get<ffi::Array<int64_t>>(file, object, "stop_tokens");
  manifest.versions = get<ffi::Map<ffi::String, ffi::String>>(file, object, "versions");
  manifest.sha256 = get<ffi::Map<ffi::String, ffi::String>>(file, object, "sha256");
  manifest.sizes = get<ffi::Map<ffi::String, int64_t>>(file, object, "sizes");
  const std::pair<const char*, int64_t*> counts[] = {
      {"vocab_size", &manifest.vocab_size}, {"max_length", &manifest.max_length},
      {"max_tokens", &manifest.max_tokens}, {"layers", &manifest.layers},
      {"heads", &manifest.heads},           {"key_dim", &manifest.key_dim},
      {"value_dim", &manifest.value_dim},
  };
  for (auto [name, count] : counts) {
    *count = get<int64_t>(file, object, name);
    int64_t most = count == &manifest.max_tokens ? 64 : INT32_MAX;
    if (*count < 1 || *count > most) fail(file, std::string("field '") + name + "' is out of range");
  }
  const std::set<std::string> dtypes{"float32", "bfloat16", "float16"};
  if (dtypes.count(manifest.dtype) == 0) fail(file, "unknown dtype '" + manifest.dtype + "'");
  for (const char* name : {CODE, WEIGHTS}) {
    if (manifest.sizes.count(name) == 0 || manifest.sha256.count(name) == 0) {
      fail(file, std::string("no size or hash of ") + name);
    }
  }
  return manifest;
}

// "0.27" of "0.27.0.post1".
std::string release(const std::string& version) {
  return version.substr(0, version.find('.', version.find('.') + 1));
}

void check_machine(const fs::path& path, const Manifest& manifest) {
  std::string built = "built for " + manifest.target + " (" + manifest.architecture + ")";
  if (architecture() != manifest.architecture) {
    fail(path, built + ", this machine is " + architecture());
  }
  std::set<std::string> known = cpu_features();
  for (const ffi::String& feature : manifest.cpu_features) {
    if (known.count(feature) == 0) {
      fail(path, built + "; this CPU lacks " + std::string(feature) +
                     ": build the bundle for another target (blockffn compile --target)");
    }
  }
  auto version = manifest.versions.Get("apache-tvm");
  if (!version || release(*version) != release(TVM_VERSION)) {
    fail(path, "built with apache-tvm " + std::string(version.value_or("of unknown version")) +
                   ", this runner has " + TVM_VERSION + "; build the one or the other anew");
  }
}

// The GPU that a bundle was built for.
DLDevice find_gpu(const fs::path& path, const Manifest& manifest) {
  using namespace tvm::runtime;
  std::string built =
      "built for an NVIDIA GPU of compute capability " + manifest.compute_capability;
  if (dlopen("libtvm_runtime_cuda.so", RTLD_LAZY | RTLD_GLOBAL) == nullptr) {
    fail(path, built + "; CUDA cannot be used here: " + dlerror() +
                   ". It needs NVIDIA's driver and the runtime of CUDA 13");
  }
  DLDevice gpu{kDLCUDA, 0};
  ffi::Any exists, capability;
  DeviceAPI::Get(gpu)->GetAttr(gpu, kExist, &exists);
  if (exists.cast<int>() == 0) fail(path, built + "; there is none here");
  DeviceAPI::Get(gpu)->GetAttr(gpu, kComputeVersion, &capability);
  std::string has = capability.cast<ffi::String>();
  if (has != manifest.compute_capability) {
    fail(path, built + "; this one has " + has +
                   ": build the bundle for another target (blockffn compile --target)");
  }
  return gpu;
}

// --- Files ---------------------------------------------------------------------------------------

std::shared_ptr<Mapping> map_file(const fs::path& path, const Manifest& manifest, const char* name,
                                  bool hash) {
  fs::path file = path / name;
  auto mapping = std::make_shared<Mapping>(file);
  auto size = static_cast<uint64_t>(manifest.sizes.at(name));
  if (mapping->size() != size) {
    fail(file, std::to_string(mapping->size()) + " bytes, the manifest says " +
                   std::to_string(size));
  }
  if (hash && sha256(mapping->data(), size) != std::string(manifest.sha256.at(name))) {
    fail(file, "damaged or of another bundle: its SHA-256 is not the manifest's");
  }
  return mapping;
}

// Gives a tensor memory of a mapping, which it keeps.
struct Mapped {
  std::shared_ptr<Mapping> mapping;
  uint64_t offset;

  void AllocData(DLTensor* tensor) { tensor->data = mapping->data() + offset; }
  void FreeData(DLTensor*) {}
};

// Every tensor of a safetensors file but the padding.
std::map<std::string, ffi::Tensor> tensors(const fs::path& file,
                                           const std::shared_ptr<Mapping>& mapping) {
  const std::map<std::string, const char*> dtypes = {
      {"F32", "float32"}, {"BF16", "bfloat16"}, {"F16", "float16"}, {"I8", "int8"}, {"U8", "uint8"}};
  uint64_t length = 0;  // of the header, 8 bytes, little-endian
  if (mapping->size() >= 8) std::memcpy(&length, mapping->data(), 8);
  if (mapping->size() < 8 || length > std::min(LARGEST_HEADER, mapping->size() - 8)) {
    fail(file, "its header is longer than the file");
  }
  uint64_t start = 8 + length, room = mapping->size() - start;
  std::map<std::string, ffi::Tensor> found;
  for (const auto& [key, value] : parse(file, mapping->data() + 8, length)) {
    std::string name = key.cast<ffi::String>();
    if (name == "__metadata__" || name.rfind("padding.", 0) == 0) continue;
    auto entry = value.as<json::Object>();
    if (!entry) fail(file, "its header is wrong at " + name);
    auto code = dtypes.find(get<ffi::String>(file, *entry, "dtype"));
    auto sizes = get<ffi::Array<int64_t>>(file, *entry, "shape");
    auto offsets = get<ffi::Array<int64_t>>(file, *entry, "data_offsets");
    if (code == dtypes.end() || offsets.size() != 2) fail(file, "its header is wrong at " + name);
    DLDataType dtype = ffi::StringToDLDataType(code->second);
    uint64_t begin = offsets[0], end = offsets[1], bytes = dtype.bits / 8;
    bool fits = begin <= end && end <= room && (start + begin) % ALIGNMENT == 0;
    for (int64_t size : sizes) {
      fits = fits && size > 0 && !__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes);
    }
    if (!fits || bytes != end - begin) {
      fail(file, name + " is outside of the file, not aligned, or not of the size of its shape");
    }
    found.emplace(name, ffi::Tensor::FromNDAlloc(Mapped{mapping, start + begin}, ffi::Shape(sizes),
                                                 dtype, {kDLCPU, 0}));
  }
  return found;
}

}  // namespace

Bundle load(const fs::path& path, bool verify) {
  if (!fs::is_directory(path)) {
    fail(path, "no such directory; give a bundle made by blockffn compile");
  }
  Manifest manifest = read_manifest(path / "manifest.json");
  check_machine(path, manifest);
  map_file(path, manifest, CODE, true);
  bool on_gpu = !manifest.compute_capability.empty();
  DLDevice cpu{kDLCPU, 0}, device = on_gpu ? find_gpu(path, manifest) : cpu;
  fs::path weights = path / WEIGHTS;
  auto known = tensors(weights, map_file(path, manifest, WEIGHTS, verify));
  auto take = [&](const ffi::Array<ffi::String>& names) {
    ffi::Array<ffi::Tensor> array;
    for (const ffi::String& name : names) {
      auto tensor = known.find(name);
      if (tensor == known.end()) fail(weights, "missing tensor " + std::string(name));
      ffi::Tensor weight = tensor->second;
      if (on_gpu) {
        weight = allocate(weight.shape(), weight.dtype(), device);
        copy(tensor->second, weight);
      }
      array.push_back(weight);
    }
    return array;
  };
  auto trunk_weights = take(manifest.trunk_weights), head_weights = take(manifest.head_weights);
  fs::path code = fs::absolute(path / CODE);  // a bare name would be looked for elsewhere
  try {
    ffi::Module library = ffi::Module::LoadFromFile(code.string());
    auto machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
    constexpr int pooled = 2;  // the allocator that keeps memory for the next call
    auto initialize = machine->GetFunction("vm_initialization").value();
    int on = device.device_type;
    if (on_gpu) {
      initialize(on, 0, pooled, static_cast<int>(kDLCPU), 0, pooled);
    } else {
      initialize(on, 0, pooled);
    }
    auto function = [&](const char* name) { return machine->GetFunction(name).value(); };
    return {manifest,      function("trunk"), function("head"), function("move"),
            trunk_weights, head_weights,      device};
  } catch (const std::exception& error) {
    fail(code, std::string("TVM cannot load it: ") + error.what());
  }
}

}  // namespace blockffn
