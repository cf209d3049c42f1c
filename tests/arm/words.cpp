// What vec.h and elements.h do with whole vectors, against the same one by one: all bits of it, NaN
// included. METAPOOL_ISA is any name; which vectors there are is a matter of flags.
#include <cstdio>

#include "../../csrc/cpu/elements.h"

namespace metapool::cpu::METAPOOL_ISA {

int failures = 0;

void expect(bool holds, const char* what, unsigned bits) {
  if (!holds && ++failures <= 10) std::printf("%s: other bits for %#x\n", what, bits);
}

template <typename T>
void check_widening(const char* what) {
  constexpr int kCount = kAtOnce<float>;
  for (unsigned first = 0; first < 0x10000u; first += kCount) {
    T from[kCount];
    float to[kCount];
    for (int i = 0; i < kCount; ++i) from[i] = {static_cast<uint16_t>(first + i)};
    store_raw(to, widen_vector<T, float>(load_raw<T, kCount>(from)));
    for (int i = 0; i < kCount; ++i) {
      expect(bit_cast<uint32_t>(to[i]) == bit_cast<uint32_t>(widen(from[i])), what, first + i);
    }
  }
}

// Every upper half with lower halves around those where rounding changes: of 16 bits, and of 13.
template <typename T>
void check_narrowing(const char* what) {
  constexpr int kCount = kAtOnce<float>;
  constexpr unsigned kLower[] = {0,      1,      0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001,
                                 0x5000, 0x7000, 0x7fff, 0x8000, 0x8001, 0xb000, 0xefff, 0xffff};
  for (const unsigned lower : kLower) {
    for (unsigned first = 0; first < 0x10000u; first += kCount) {
      float from[kCount];
      T to[kCount], expected;
      for (int i = 0; i < kCount; ++i) from[i] = bit_cast<float>((first + i) << 16 | lower);
      store_raw(to, narrow_vector<T, float>(load_raw<float, kCount>(from)));
      for (int i = 0; i < kCount; ++i) {
        narrow(from[i], expected);
        expect(to[i].bits == expected.bits, what, (first + i) << 16 | lower);
      }
    }
  }
}

template <typename Acc>
void check_codes(const char* what) {
  constexpr int kCount = kVectorLanes<Acc>;
  for (int first = -128; first + kCount <= 128; ++first) {
    int8_t codes[kCount], stored[kCount + 1];
    for (int i = 0; i < kCount; ++i) codes[i] = static_cast<int8_t>(first + i);
    const Code<Acc> loaded = load_codes<Acc>(codes);
    stored[kCount] = 77;
    store_codes<Acc>(stored, loaded);
    for (int i = 0; i < kCount; ++i) {
      expect(loaded[i] == codes[i] && stored[i] == codes[i], what,
             static_cast<unsigned>(first + i));
    }
    expect(stored[kCount] == 77, what, static_cast<unsigned>(first));
  }
}

template <typename Acc>
void check_any(const char* what) {
  Mask<Acc> mask{};
  expect(!any<Acc>(mask), what, 0);
  for (int lane = 0; lane < kVectorLanes<Acc>; ++lane) {
    mask[lane] = -1;
    expect(any<Acc>(mask), what, static_cast<unsigned>(lane));
    mask[lane] = 0;
  }
}

// Each lane by its own choice; -0 shows whether nothing is added or zero is.
void check_choices() {
  constexpr int kCount = kVectorLanes<float>;
  for (int chosen = 0; chosen < kCount; ++chosen) {
    Vec<float> left{}, right = left + 1.0f;
    left[chosen] = 2.0f;
    const Choice choice = at_least(left, right);
    const Vec<float> sum = add_where(choice, -Vec<float>{}, right);
    const Vec<float> cleared = clear_where(choice, right);
    const Code<float> code = choose(choice, splat_code<float>(-5), splat_code<float>(9));
    for (int lane = 0; lane < kCount; ++lane) {
      const bool is_chosen = lane == chosen;
      const bool holds = bit_cast<uint32_t>(sum[lane]) == (is_chosen ? 0x3f800000u : 0x80000000u) &&
                         bit_cast<uint32_t>(cleared[lane]) == (is_chosen ? 0u : 0x3f800000u) &&
                         code[lane] == (is_chosen ? -5 : 9);
      expect(holds, "choices", static_cast<unsigned>(lane));
    }
  }
}

}  // namespace metapool::cpu::METAPOOL_ISA

int main() {
  using namespace metapool::cpu::METAPOOL_ISA;
  check_widening<Half>("float16 widened");
  check_widening<BFloat16>("bfloat16 widened");
  check_narrowing<Half>("float16 narrowed");
  check_narrowing<BFloat16>("bfloat16 narrowed");
  check_codes<float>("codes beside floats");
  check_codes<double>("codes beside doubles");
  check_any<float>("any of floats");
  check_any<double>("any of doubles");
  check_choices();
  std::printf("vectors of %d bytes: %d failures\n", kVectorBytes, failures);
  return failures == 0 ? 0 : 1;
}
