// Tensors on any device, made and copied by TVM's runtime.

#pragma once

#include <tvm/ffi/container/tensor.h>

#include <cstdint>
#include <vector>

namespace blockffn {

namespace ffi = tvm::ffi;

ffi::Tensor allocate(const ffi::Shape& shape, DLDataType dtype, DLDevice device);

// Part of the memory of a tensor, from a byte on.
ffi::Tensor view(const ffi::Tensor& tensor, const ffi::Shape& shape, int64_t start);

// Copies to a tensor of the same size, on the same device or to or from the CPU.  What a GPU has to
// do for it may be done later.
void copy(const ffi::Tensor& from, const ffi::Tensor& to);

// The elements, when they are there.
std::vector<char> bytes(const ffi::Tensor& tensor);

}  // namespace blockffn
