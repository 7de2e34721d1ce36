#include "draft.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace blockffn {
namespace {

// Most tokens looked up; places that one draft looks at, and how far it reads on from each.
constexpr int64_t MAX_NGRAM = 6, OCCURRENCES = 8, REACH = 16;
// The count of what was never seen.
constexpr double ESCAPE = 4;

// Indices of the tokens after the latest of the longest matches, and how many tokens match there.
std::vector<std::pair<int64_t, int64_t>> places(const std::vector<int64_t>& text) {
  int64_t end = text.size();
  std::vector<std::pair<int64_t, int64_t>> found;  // of one size each, latest first
  for (int64_t place = end - 1; place > 0; --place) {
    int64_t matched = 0;
    while (matched < std::min(MAX_NGRAM, place) &&
           text[place - 1 - matched] == text[end - 1 - matched]) {
      ++matched;
    }
    if (matched > 0) found.emplace_back(place, matched);
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const auto& a, const auto& b) { return a.second > b.second; });
  found.resize(std::min<size_t>(found.size(), OCCURRENCES));
  return found;
}

}  // namespace

Tree Tree::chain(const std::vector<int64_t>& tokens) {
  Tree tree{tokens, std::vector<int64_t>(tokens.size())};
  std::iota(tree.parents.begin(), tree.parents.end(), -1);
  return tree;
}

Tree draft(const std::vector<int64_t>& text, int64_t nodes) {
  Tree all = Tree::chain({text.back()});
  std::vector<double> counts = {0}, log_probs = {0};
  int64_t reach = std::min(REACH, nodes - 1);
  for (auto [place, matched] : places(text)) {
    double weight = static_cast<double>(matched * matched);
    counts[0] += weight;
    int64_t node = 0, last = std::min<int64_t>(place + reach, text.size());
    for (int64_t i = place; i < last; ++i) {
      int64_t child = 1, count = all.tokens.size();
      while (child < count && (all.parents[child] != node || all.tokens[child] != text[i])) ++child;
      if (child == count) {
        all.tokens.push_back(text[i]);
        all.parents.push_back(node);
        counts.push_back(0);
      }
      counts[child] += weight;
      node = child;
    }
  }
  for (size_t node = 1; node < counts.size(); ++node) {
    int64_t parent = all.parents[node];
    log_probs.push_back(log_probs[parent] + std::log(counts[node] / (counts[parent] + ESCAPE)));
  }

  // The best nodes are a tree: probability falls along a path.
  std::vector<int64_t> best(counts.size());
  std::iota(best.begin(), best.end(), 0);
  std::stable_sort(best.begin(), best.end(),
                   [&](int64_t a, int64_t b) { return log_probs[a] > log_probs[b]; });
  best.resize(std::min<size_t>(best.size(), nodes));
  std::sort(best.begin(), best.end());
  Tree tree;
  std::vector<int64_t> index(counts.size());
  for (int64_t node : best) {
    index[node] = tree.tokens.size();
    tree.tokens.push_back(all.tokens[node]);
    tree.parents.push_back(node == 0 ? -1 : index[all.parents[node]]);
  }
  return tree;
}

}  // namespace blockffn
