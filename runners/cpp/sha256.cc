#include "sha256.h"

#include <cmath>
#include <cstring>

namespace blockffn {
namespace {

uint32_t rotated(uint32_t x, int n) { return x >> n | x << (32 - n); }

// First 32 bits of the fractional parts of the cube roots (section 4.2.2) and square roots
// (section 5.3.3) of the first primes.  A double's 53 bits hold the 3 + 32 that count.
struct Constants {
  uint32_t round[64], initial[8];

  Constants() {
    int count = 0;
    for (int n = 2; count < 64; ++n) {
      bool prime = true;
      for (int divisor = 2; divisor * divisor <= n; ++divisor) prime = prime && n % divisor != 0;
      if (!prime) continue;
      if (count < 8) initial[count] = fraction(std::sqrt(static_cast<double>(n)));
      round[count++] = fraction(std::cbrt(static_cast<double>(n)));
    }
  }

  static uint32_t fraction(double x) {
    return static_cast<uint32_t>(std::floor((x - std::floor(x)) * 4294967296.0));
  }
};

const Constants& constants() {
  static const Constants values;
  return values;
}

void compress(uint32_t* state, const uint8_t* block) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) {
    const uint8_t* b = block + 4 * i;
    w[i] = uint32_t{b[0]} << 24 | uint32_t{b[1]} << 16 | uint32_t{b[2]} << 8 | b[3];
  }
  for (int i = 16; i < 64; ++i) {
    uint32_t x = w[i - 15], y = w[i - 2];
    w[i] = w[i - 16] + (rotated(x, 7) ^ rotated(x, 18) ^ x >> 3) + w[i - 7] +
           (rotated(y, 17) ^ rotated(y, 19) ^ y >> 10);
  }
  uint32_t s[8];
  std::memcpy(s, state, sizeof s);
  for (int i = 0; i < 64; ++i) {
    uint32_t a = s[0], e = s[4];
    uint32_t t1 = s[7] + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) +
                  ((e & s[5]) ^ (~e & s[6])) + constants().round[i] + w[i];
    uint32_t t2 = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) +
                  ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
    std::memmove(s + 1, s, 7 * sizeof *s);
    s[4] += t1;
    s[0] = t1 + t2;
  }
  for (int i = 0; i < 8; ++i) state[i] += s[i];
}

}  // namespace

std::string sha256(const uint8_t* data, size_t size) {
  uint32_t state[8];
  std::memcpy(state, constants().initial, sizeof state);
  size_t whole = size / 64 * 64, rest = size - whole;
  for (size_t i = 0; i < whole; i += 64) compress(state, data + i);

  // The rest, a one bit, zeros, and the number of bits in the last 8 bytes.
  uint8_t tail[128] = {};
  if (rest != 0) std::memcpy(tail, data + whole, rest);
  tail[rest] = 0x80;
  size_t length = rest < 56 ? 64 : 128;
  for (int i = 0; i < 8; ++i) tail[length - 1 - i] = uint64_t{size} * 8 >> 8 * i;
  for (size_t i = 0; i < length; i += 64) compress(state, tail + i);

  std::string text;
  for (uint32_t word : state) {
    for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
  }
  return text;
}

}  // namespace blockffn
