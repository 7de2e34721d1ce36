// Runs CUDA C++ on a CPU, one block after the other: its threads are fibers, which take turns where
// they wait for each other.  Enough of the language for what TVM generates.  Races between two
// waits are not found; threads that wait for each other in vain are.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

using uint = unsigned int;
using ushort = unsigned short;

struct Index {
  int x = 0;
};
inline Index blockIdx, threadIdx;

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK = 1 << 16;

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  jmp_buf place;
  ucontext_t start;
  bool started = false;
  State state = State::ready;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool odd = false;  // which of the two offers is next
  uint32_t offers[2];
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline int current;
inline const std::function<void()>* body;

inline void leave(State state) {
  fibers[current].state = state;
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  (*body)();
  leave(State::done);
}

inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = threadIdx.x = thread;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Lets threads first to last - 1 go on if all that are not done are in one state.
inline bool release(int first, int last, State state) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    if (fibers[i].state != state && fibers[i].state != State::done) return false;
    any = any || fibers[i].state == state;
  }
  for (int i = first; i < last; ++i) {
    if (fibers[i].state == state) fibers[i].state = State::ready;
  }
  return any;
}

inline void run_block(int threads) {
  for (Fiber& fiber : fibers) {
    fiber.started = fiber.odd = false;
    fiber.state = State::ready;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    makecontext(&fiber.start, enter, 0);
  }
  while (true) {
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].state == State::ready) resume(i);
    }
    bool released = release(0, threads, State::at_block);
    for (int first = 0; first < threads; first += WARP) {
      int last = std::min(first + WARP, threads);
      released = release(first, last, State::at_warp) || released;
    }
    if (released) continue;
    for (const Fiber& fiber : fibers) {
      if (fiber.state != State::done) {
        std::fputs("threads wait for each other in vain\n", stderr);
        std::abort();
      }
    }
    return;
  }
}

inline void launch(int blocks, int threads, const std::function<void()>& kernel) {
  body = &kernel;
  if (static_cast<int>(fibers.size()) != threads) fibers = std::vector<Fiber>(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(threads);
}

// Every lane of the warp offers a value; returns what each lane that there is has offered.
inline std::array<uint32_t, WARP> exchange(uint32_t value) {
  Fiber& fiber = fibers[current];
  int which = fiber.odd, first = current / WARP * WARP;
  fiber.odd = !fiber.odd;
  fiber.offers[which] = value;
  leave(State::at_warp);
  std::array<uint32_t, WARP> values{};
  for (int lane = 0; lane < WARP && first + lane < static_cast<int>(fibers.size()); ++lane) {
    values[lane] = fibers[first + lane].offers[which];
  }
  return values;
}

}  // namespace emulator

inline void __syncthreads() { emulator::leave(emulator::State::at_block); }

inline float __shfl_sync(unsigned, float value, int lane, int = 32) {
  return std::bit_cast<float>(emulator::exchange(std::bit_cast<uint32_t>(value))[lane]);
}

inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  return __shfl_sync(mask, value, emulator::current % emulator::WARP ^ distance);
}

inline float __shfl_down_sync(unsigned mask, float value, int distance, int = 32) {
  int lane = emulator::current % emulator::WARP;
  return __shfl_sync(mask, value, lane + distance < emulator::WARP ? lane + distance : lane);
}

inline unsigned __activemask() { return ~0u; }

inline unsigned __ballot_sync(unsigned, int flag) {
  unsigned votes = 0;
  auto flags = emulator::exchange(flag != 0);
  for (int lane = 0; lane < emulator::WARP; ++lane) votes |= flags[lane] << lane;
  return votes;
}

// --- Arithmetic ----------------------------------------------------------------------------------

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(uint64_t value) { return std::popcount(value); }
inline int __ffsll(int64_t value) { return __builtin_ffsll(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
inline int64_t min(int64_t a, int64_t b) { return std::min(a, b); }
inline int64_t max(int64_t a, int64_t b) { return std::max(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

using half = _Float16;
inline half __ushort_as_half(ushort bits) { return std::bit_cast<half>(bits); }
inline float __half2float(half value) { return value; }

struct alignas(16) float4 {
  float x, y, z, w;
};

struct nv_bfloat16 {
  ushort bits;

  nv_bfloat16() = default;
  nv_bfloat16(float value) {  // to nearest, ties to even
    uint wide = std::bit_cast<uint>(value);
    bits = std::isnan(value) ? 0x7FFF : (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
  }
  operator float() const { return std::bit_cast<float>(uint{bits} << 16); }
};
inline nv_bfloat16 __float2bfloat16_rn(float value) { return value; }

struct alignas(16) uint4 {
  uint x, y, z, w;
};
