// Calls a kernel of a library with bfloat16 tensors: kernel LIBRARY NAME (SHAPE FILE)...
// A shape is sizes with commas between them.  The last file is written, the others are read.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

struct Aligned {
  void AllocData(DLTensor* tensor) {
    size_t bytes = 2;
    for (int i = 0; i < tensor->ndim; ++i) bytes *= tensor->shape[i];
    tensor->data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

int main(int argc, char** argv) {
  std::vector<ffi::Any> arguments;
  std::vector<ffi::AnyView> views;
  ffi::Tensor last;
  for (int i = 3; i + 1 < argc; i += 2) {
    std::vector<int64_t> sizes;
    std::istringstream shape(argv[i]);
    for (std::string size; std::getline(shape, size, ',');) sizes.push_back(std::stoll(size));
    last = ffi::Tensor::FromNDAlloc(Aligned{}, ffi::Shape(sizes), {kDLBfloat, 16, 1}, {kDLCPU, 0});
    if (i + 2 < argc) {
      std::ifstream(argv[i + 1], std::ios::binary)
          .read(static_cast<char*>(last.data_ptr()), 2 * last.numel());
    }
    arguments.emplace_back(last);
  }
  for (const ffi::Any& argument : arguments) views.emplace_back(argument);
  auto kernel = ffi::Module::LoadFromFile(argv[1])->GetFunction(argv[2]).value();
  ffi::Any result;
  kernel.CallPacked(views.data(), static_cast<int>(views.size()), &result);
  std::ofstream(argv[argc - 1], std::ios::binary)
      .write(static_cast<const char*>(last.data_ptr()), 2 * last.numel());
}
