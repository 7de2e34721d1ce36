// Draft trees, and drafting without weights: blockffn_compile/speculative/ngram.py in C++.

#pragma once

#include <cstdint>
#include <vector>

namespace blockffn {

// Guesses at how a text goes on.  Node 0 is the root: the text's last token, not yet in the cache.
struct Tree {
  std::vector<int64_t> tokens;
  std::vector<int64_t> parents;  // each before its children; -1 for the root

  // One path.
  static Tree chain(const std::vector<int64_t>& tokens);
};

// What followed the text's last tokens earlier in it, the most probable tree of at most `nodes`.
// The text ends in the root.
Tree draft(const std::vector<int64_t>& text, int64_t nodes);

}  // namespace blockffn
