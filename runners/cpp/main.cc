// blockffn-run: continues a text with a bundle.

#include <getopt.h>
#include <tvm/ffi/error.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "bundle.h"
#include "draft.h"
#include "session.h"

namespace {

using namespace blockffn;

const char* const USAGE =
    "Usage: blockffn-run BUNDLE --tokens 1,2,3 [options]\n"
    "\n"
    "Continues a text, token by token the most probable one. Prints the ids of the new tokens;\n"
    "speeds go to the standard error output.\n"
    "\n"
    "A bundle contains native code, which runs with your rights: take it only from whom you trust.\n"
    "\n"
    "  -t, --tokens IDS      ids of the prompt's tokens, with commas between them\n"
    "  -n, --new-tokens N    new tokens at most (default 64); a stop token ends the text before\n"
    "  -s, --speculate       verify drafts of up to 8 tokens at once, from what followed the same\n"
    "                        words before; the result is the same\n"
    "      --threads N       threads (default: one a core)\n"
    "      --verify          check the hash of the weights, too\n"
    "  -h, --help            this text\n";

constexpr int64_t NODES = 8;

struct Options {
  std::string bundle;
  std::vector<int64_t> tokens;
  int64_t new_tokens = 64;
  int64_t threads = 0;  // TVM's choice
  bool speculate = false, verify = false;
};

int64_t number(const std::string& text, const char* option, int64_t least) {
  errno = 0;
  char* end;
  long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0 || value < least) {
    throw std::invalid_argument(std::string(option) + ": '" + text + "' is not an integer >= " +
                                std::to_string(least));
  }
  return value;
}

Options parse(int argc, char** argv) {
  const option known[] = {
      {"tokens", required_argument, nullptr, 't'}, {"new-tokens", required_argument, nullptr, 'n'},
      {"speculate", no_argument, nullptr, 's'},    {"threads", required_argument, nullptr, 'j'},
      {"verify", no_argument, nullptr, 'v'},       {"help", no_argument, nullptr, 'h'},
      {nullptr, 0, nullptr, 0},
  };
  Options options;
  for (int c; (c = getopt_long(argc, argv, "t:n:sh", known, nullptr)) != -1;) {
    if (c == 't') {
      std::string text = optarg;
      for (size_t start = 0, comma = 0; comma != std::string::npos; start = comma + 1) {
        comma = text.find(',', start);
        options.tokens.push_back(number(text.substr(start, comma - start), "--tokens", 0));
      }
    } else if (c == 'n') {
      options.new_tokens = number(optarg, "--new-tokens", 1);
    } else if (c == 's') {
      options.speculate = true;
    } else if (c == 'j') {
      options.threads = number(optarg, "--threads", 1);
    } else if (c == 'v') {
      options.verify = true;
    } else if (c == 'h') {
      std::fputs(USAGE, stdout);
      std::exit(0);
    } else {
      throw std::invalid_argument("see blockffn-run --help");  // getopt has named the option
    }
  }
  if (argc - optind != 1) throw std::invalid_argument("give one bundle; see blockffn-run --help");
  if (options.tokens.empty()) throw std::invalid_argument("give the prompt's ids with --tokens");
  options.bundle = argv[optind];
  return options;
}

class Timer {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

void run(const Options& options) {
  // Before TVM starts its threads.
  if (options.threads) setenv("TVM_NUM_THREADS", std::to_string(options.threads).c_str(), 1);
  Timer loading;
  Bundle bundle = load(options.bundle, options.verify);
  const Manifest& manifest = bundle.manifest;
  std::vector<int64_t> text = options.tokens;
  int64_t prompt = text.size();
  if (prompt > manifest.max_length) {
    throw std::invalid_argument("--tokens: " + std::to_string(prompt) + " tokens, the model takes " +
                                std::to_string(manifest.max_length));
  }
  for (int64_t token : text) {
    if (token >= manifest.vocab_size) {
      throw std::invalid_argument("--tokens: " + std::to_string(token) +
                                  " is outside the vocabulary 0.." +
                                  std::to_string(manifest.vocab_size - 1));
    }
  }
  int64_t end = prompt + std::min(options.new_tokens, manifest.max_length - prompt);
  Session session(bundle, end);
  std::fprintf(stderr, "loading: %.3f s\n", loading.seconds());

  Timer prefilling;
  // Tokens that the model chose and that are not in the text yet.
  std::vector<int64_t> chosen = {session.prefill(text)};
  std::fprintf(stderr, "prompt: %ld tokens, %.1f tokens/s\n", static_cast<long>(prompt),
               prompt / prefilling.seconds());

  Timer decoding;
  int64_t steps = 0;
  const auto& stops = manifest.stop_tokens;
  while (true) {
    bool stopped = false;
    for (int64_t token : chosen) {
      stopped = std::find(stops.begin(), stops.end(), token) != stops.end();
      if (stopped || static_cast<int64_t>(text.size()) == end) break;
      std::printf(static_cast<int64_t>(text.size()) == prompt ? "%ld" : ",%ld",
                  static_cast<long>(token));
      text.push_back(token);
    }
    std::fflush(stdout);
    int64_t left = end - static_cast<int64_t>(text.size());
    if (stopped || left == 0) break;
    // The last new token needs no node of its own.
    int64_t nodes = options.speculate ? std::min({NODES, left, manifest.max_tokens}) : 1;
    Tree tree = draft(text, nodes);
    std::vector<int64_t> best = session.verify(tree), path = {0};
    chosen = {best[0]};
    for (int64_t node = 1; node < static_cast<int64_t>(best.size()); ++node) {
      if (tree.parents[node] == path.back() && tree.tokens[node] == chosen.back()) {
        path.push_back(node);
        chosen.push_back(best[node]);
      }
    }
    session.commit(path);
    ++steps;
  }
  std::printf("\n");
  int64_t made = std::max<int64_t>(static_cast<int64_t>(text.size()) - prompt - 1, 0);
  if (steps > 0) {
    std::fprintf(stderr, "decoding: %ld tokens, %.1f tokens/s, %.2f tokens a step\n",
                 static_cast<long>(made), made / decoding.seconds(),
                 static_cast<double>(made) / steps);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
