// Runs compiled TIR functions inside an ONNX Runtime kernel, on the session's threads and with
// workspace from its allocator.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#include <tvm/ffi/c_api.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>

namespace blockffn {

// Of all memory that compiled functions read or write, in bytes.
constexpr std::size_t kAlignment = 64;

// What the functions called in one ONNX Runtime call need from outside.
class Runtime {
 public:
  explicit Runtime(Ort::KernelContext context);

  // Throws Ort::Exception with the function's own message if it fails.
  void call(TVMFFISafeCallType function, const TVMFFIAny* arguments, std::size_t count);

  struct Free {
    void operator()(void* pointer) const;
  };
  using Buffer = std::unique_ptr<void, Free>;

  // Aligned memory of the session; throws std::bad_alloc.
  Buffer allocate(std::size_t bytes);

  // body(task) for every task, on the session's threads.
  void parallel(void (*body)(void* data, std::size_t task), std::size_t tasks, void* data);

  // Keeps the first message; any thread may call it.
  void fail(std::string message);

 private:
  struct Release {
    void operator()(OrtAllocator* allocator) const { Ort::GetApi().ReleaseAllocator(allocator); }
  };

  Ort::KernelContext context_;
  std::unique_ptr<OrtAllocator, Release> allocator_;
  std::mutex mutex_;
  std::string error_;
};

}  // namespace blockffn
