// Weights as panels (see schedules/packing.py): [E, ceil(N/P), K, P], outputs side by side, padded
// with zeros.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "runtime.h"

namespace blockffn {

struct Panels {
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };

  std::int64_t shape[4];
  std::unique_ptr<void, Free> data;
};

// Memory for weights: on pages of 2 MB where the system grants them, because streaming
// through pages of 4 kB waits for translations.
inline std::unique_ptr<void, Panels::Free> allocate_weights(std::size_t bytes) {
  constexpr std::size_t kHuge = std::size_t{1} << 21;
  const std::size_t alignment = bytes < kHuge ? kAlignment : kHuge;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  std::unique_ptr<void, Panels::Free> memory(std::aligned_alloc(alignment, bytes));
  if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == kHuge) madvise(memory.get(), bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

namespace detail {

// source(n, k) of one expert after the other, n < outputs, k < depth.
template <typename T, typename Source>
Panels pack(std::int64_t experts, std::int64_t outputs, std::int64_t depth, std::int64_t width,
            Source source) {
  const std::int64_t count = (outputs + width - 1) / width;
  Panels panels{{experts, count, depth, width}, nullptr};
  const std::size_t bytes = experts * count * depth * width * sizeof(T);
  panels.data = allocate_weights(bytes);
  auto* out = static_cast<T*>(panels.data.get());
  // Squares of a cache line: one side or the other of a transposition strides.
  constexpr std::int64_t kSquare = kAlignment / sizeof(T);
  for (std::int64_t e = 0; e < experts; ++e) {
    for (std::int64_t panel = 0; panel < count; ++panel, out += depth * width) {
      for (std::int64_t k0 = 0; k0 < depth; k0 += kSquare) {
        const std::int64_t k1 = std::min(depth, k0 + kSquare);
        for (std::int64_t p = 0; p < width; ++p) {
          const std::int64_t n = panel * width + p;
          for (std::int64_t k = k0; k < k1; ++k) {
            out[k * width + p] = n < outputs ? source(e, n, k) : T{};
          }
        }
      }
    }
  }
  return panels;
}

}  // namespace detail

// From weight [E, S, H]: a panel's outputs are S, summed over H (``up``), or H, summed over S.
template <typename T>
Panels pack(const void* weight, std::int64_t experts, std::int64_t size, std::int64_t hidden,
            std::int64_t width, bool up) {
  const auto* w = static_cast<const T*>(weight);
  if (up) {
    return detail::pack<T>(experts, size, hidden, width, [=](auto e, auto n, auto k) {
      return w[(e * size + n) * hidden + k];
    });
  }
  return detail::pack<T>(experts, hidden, size, width, [=](auto e, auto n, auto k) {
    return w[(e * size + k) * hidden + n];
  });
}

}  // namespace blockffn
