// A bundle with a cache for one text.

#pragma once

#include <cstdint>
#include <vector>

#include "bundle.h"
#include "draft.h"

namespace blockffn {

// Decodes greedily.  A token's features do not depend on how many nodes are verified with it.
class Session {
 public:
  // Allocates a cache for `max_length` tokens, at most the bundle's.
  Session(const Bundle& bundle, int64_t max_length);

  // Starts the text anew with these tokens, 1 to max_length of the vocabulary; returns the most
  // probable next one.
  int64_t prefill(const std::vector<int64_t>& tokens);

  // Runs a tree of at most the bundle's max_tokens nodes behind the text; returns the most probable
  // token after each node.
  std::vector<int64_t> verify(const Tree& tree);

  // Appends nodes of the tree verified last, a path from its root, to the text.
  void commit(const std::vector<int64_t>& path);

 private:
  // Integers as an input of a function, in the same memory for every call: a GPU's copy of so
  // little is taken at once, and ordered behind what it still has to do.
  ffi::Tensor input(size_t index, const std::vector<int64_t>& values) const;
  // Features [T, H] of the T nodes of a tree behind the text.
  ffi::Tensor trunk(const Tree& tree) const;
  // The most probable token after each of features [N, H].
  std::vector<int64_t> best(const ffi::Tensor& features) const;

  const Bundle& bundle_;
  std::vector<ffi::Tensor> inputs_;  // [max_tokens] each
  ffi::Array<ffi::Tensor> cache_;  // keys and values of each layer in turn
  int64_t max_length_, length_ = 0;
};

}  // namespace blockffn
