#include "tensors.h"

#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <string>

namespace blockffn {
namespace {

ffi::Function runtime(const char* name) {
  return ffi::Function::GetGlobalRequired(std::string("runtime.TVMTensor") + name);
}

}  // namespace

ffi::Tensor allocate(const ffi::Shape& shape, DLDataType dtype, DLDevice device) {
  static const ffi::Function function = runtime("AllocWithScope");
  return function(shape, dtype, device, ffi::Optional<ffi::String>()).cast<ffi::Tensor>();
}

ffi::Tensor view(const ffi::Tensor& tensor, const ffi::Shape& shape, int64_t start) {
  static const ffi::Function function = runtime("CreateView");
  return function(tensor, shape, tensor.dtype(), start).cast<ffi::Tensor>();
}

void copy(const ffi::Tensor& from, const ffi::Tensor& to) {
  static const ffi::Function function = runtime("CopyFromTo");
  function(from, to);
}

std::vector<char> bytes(const ffi::Tensor& tensor) {
  static const ffi::Function function = runtime("CopyToBytes");
  std::vector<char> data(tensor.numel() * (tensor.dtype().bits / 8));
  function(tensor, static_cast<void*>(data.data()), static_cast<int64_t>(data.size()));
  return data;
}

}  // namespace blockffn
