// Loading of bundles; their format and calling convention: blockffn_compile/aot/bundle.py.
//
// A bundle contains native code, which loading it executes.  The checks catch damage and mistakes:
// they cannot tell whether the code is harmless.

#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace blockffn {

namespace ffi = tvm::ffi;

// A bundle cannot be used; the message names the file and what is wrong with it.
class BundleError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What the runner needs of manifest.json, by the names that it has there.
struct Manifest {
  std::string target, architecture, dtype;
  std::string compute_capability;  // empty for the CPU
  int64_t vocab_size, max_length, max_tokens, layers, heads, key_dim, value_dim;
  ffi::Array<ffi::String> cpu_features, trunk_weights, head_weights;
  ffi::Array<int64_t> stop_tokens;
  ffi::Map<ffi::String, ffi::String> versions, sha256;
  ffi::Map<ffi::String, int64_t> sizes;
};

struct Bundle {
  Manifest manifest;
  ffi::Function trunk, head, move;
  ffi::Array<ffi::Tensor> trunk_weights, head_weights;
  DLDevice device;  // where all tensors are
};

// Checks a bundle and loads it.  Nothing of it runs before the manifest, the machine and the hash of
// the code were checked.  Weights are mapped to memory, or copied to the GPU; with `verify` they are
// hashed as well.
// Throws BundleError.
Bundle load(const std::filesystem::path& path, bool verify);

}  // namespace blockffn
