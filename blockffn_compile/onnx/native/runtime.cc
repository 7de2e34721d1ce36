#include "runtime.h"

#include <tvm/runtime/c_backend_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

namespace blockffn {
namespace {

// Of the function that this thread works for.
thread_local Runtime* current = nullptr;

class Scope {
 public:
  explicit Scope(Runtime* runtime) : outer_(current) { current = runtime; }
  ~Scope() { current = outer_; }

 private:
  Runtime* const outer_;
};

// Threads take tasks one by one: with several for each, a slow thread does fewer.
const int kTasks = 8 * static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));

// Lies before each block.
struct Header {
  OrtAllocator* allocator;
  void* allocated;
};

const Ort::MemoryInfo& cpu_memory() {
  // Never destroyed: sessions may outlive the static objects of this library.
  static const auto* info =
      new Ort::MemoryInfo(Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault));
  return *info;
}

}  // namespace

Runtime::Runtime(Ort::KernelContext context)
    : context_(context), allocator_(context.GetAllocator(*cpu_memory())) {}

void Runtime::call(TVMFFISafeCallType function, const TVMFFIAny* arguments, std::size_t count) {
  Scope scope(this);
  TVMFFIAny result{};
  if (function(nullptr, arguments, static_cast<std::int32_t>(count), &result)) {
    throw Ort::Exception(error_.empty() ? "the kernel failed" : std::move(error_), ORT_FAIL);
  }
}

Runtime::Buffer Runtime::allocate(std::size_t bytes) {
  OrtAllocator* allocator = allocator_.get();
  void* allocated = nullptr;
  try {
    allocated = allocator->Alloc(allocator, bytes + 2 * kAlignment);
  } catch (...) {  // an arena throws where malloc returns null
  }
  if (!allocated) throw std::bad_alloc();
  static_assert(sizeof(Header) <= kAlignment);
  const auto blocks = reinterpret_cast<std::uintptr_t>(allocated) / kAlignment + 2;
  auto* pointer = reinterpret_cast<void*>(blocks * kAlignment);
  static_cast<Header*>(pointer)[-1] = {allocator, allocated};
  return Buffer(pointer);
}

void Runtime::Free::operator()(void* pointer) const {
  const Header header = static_cast<Header*>(pointer)[-1];
  header.allocator->Free(header.allocator, header.allocated);
}

void Runtime::parallel(void (*body)(void* data, std::size_t task), std::size_t tasks, void* data) {
  context_.ParallelFor(body, tasks, 0, data);
}

void Runtime::fail(std::string message) {
  std::lock_guard lock(mutex_);
  if (error_.empty()) error_ = std::move(message);
}

namespace {

// What generated code calls; the contracts are in tvm/runtime/c_backend_api.h and tvm/ffi/c_api.h.

struct Region {
  FTVMParallelLambda body;
  void* closure;
  int tasks;
  Runtime* runtime;
  std::atomic<int> status;
};

void run_task(void* data, std::size_t task) {
  auto* region = static_cast<Region*>(data);
  Scope scope(region->runtime);
  TVMParallelGroupEnv group{nullptr, region->tasks};
  if (int status = region->body(static_cast<int>(task), &group, region->closure)) {
    region->status = status;
  }
}

int launch(FTVMParallelLambda body, void* closure, int tasks) {
  Region region{body, closure, tasks ? tasks : kTasks, current, {0}};
  try {
    current->parallel(run_task, region.tasks, &region);
  } catch (const std::exception& error) {
    current->fail(error.what());
    return -1;
  }
  return region.status;
}

void* allocate(int, int, std::uint64_t bytes, int, int) {
  try {
    return current->allocate(bytes).release();
  } catch (const std::bad_alloc&) {
    current->fail("no memory for " + std::to_string(bytes) + " bytes of workspace");
    return nullptr;
  }
}

int release(int, int, void* pointer) {
  Runtime::Free()(pointer);
  return 0;
}

}  // namespace
}  // namespace blockffn

extern "C" {
// Pointers that object files of generated code define weakly, as null.
decltype(&TVMBackendParallelLaunch) __TVMBackendParallelLaunch = blockffn::launch;
decltype(&TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = blockffn::allocate;
decltype(&TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = blockffn::release;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, std::int32_t count) {
  std::string message = std::string(kind) + ": ";
  for (std::int32_t i = 0; i < count; ++i) message += parts[i] ? parts[i] : "";
  blockffn::current->fail(std::move(message));
}
}
