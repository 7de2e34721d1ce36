// Runs TVM's parallel regions on the OpenMP pool that PyTorch already has.
//
// Two pools on the same cores slow each other down: the workers of one spin for work while the
// other computes.  The OpenMP symbols come from the libgomp that PyTorch has loaded, so nothing
// is linked here.  The TVM types are those of tvm/runtime/c_backend_api.h.
#include <atomic>
#include <cstdint>

extern "C" {

struct ParallelGroupEnv {
  void* sync_handle;
  std::int32_t num_task;
};

using ParallelLambda = int (*)(int task_id, ParallelGroupEnv* env, void* closure);

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_max_threads();
int omp_get_num_threads();
int omp_get_thread_num();
}

namespace {

struct Region {
  ParallelLambda lambda;
  void* closure;
  std::int32_t tasks;
  std::atomic<int> status;
};

void run(void* data) {
  auto* region = static_cast<Region*>(data);
  // OpenMP may give fewer threads than there are tasks.
  for (int task = omp_get_thread_num(); task < region->tasks; task += omp_get_num_threads()) {
    ParallelGroupEnv env{nullptr, region->tasks};
    if (int status = region->lambda(task, &env, region->closure)) region->status = status;
  }
}

}  // namespace

extern "C" int blockffn_parallel_launch(ParallelLambda lambda, void* closure, int num_task) {
  Region region{lambda, closure, num_task ? num_task : omp_get_max_threads(), {0}};
  GOMP_parallel(run, &region, region.tasks, 0);
  return region.status;
}
