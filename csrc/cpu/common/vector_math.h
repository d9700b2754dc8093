// exp and tanh as straight-line code that the compiler vectorizes at any width, so that one source works for
// plain x86-64, AVX2 and AVX-512 (as compiler clones) and other processors.
#pragma once

#include <cstdint>
#include <cstring>

// Whether one library can contain code for several x86 instruction sets, chosen at run time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TUNA_HAS_X86_SETS 1
#else
#define TUNA_HAS_X86_SETS 0
#endif

#if TUNA_HAS_X86_SETS
// The compiler makes one copy per instruction set and the loader picks the best one for the processor.
#define TUNA_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TUNA_CLONES
#endif
#define TUNA_INLINE static inline __attribute__((always_inline))
#define TUNA_INLINE_MEMBER inline __attribute__((always_inline))

namespace tuna {

TUNA_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

TUNA_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// e^x for x <= 88.7. Relative error below 1.2e-7 with and without fused multiply-add (tested against float64); below
// -87.3 the result is 0, and NaN stays NaN. x = n ln2 + r with |r| <= ln2/2; ln2 is split in two so that n ln2 is
// exact; e^r = 1 + r + r^2 q(r), with the q of degree 4 that minimizes the largest relative error of e^r: 3e-9, against
// 1.6e-7 for the terms of the series.
TUNA_INLINE float exp_of(float x) {
  const float lowest = -87.33654f;
  const float clamped = x > lowest ? x : lowest;
  const float shifter = 12582912.f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float shifted = clamped * 1.44269504f + shifter;
  const float n = shifted - shifter;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.3814532e-3f;
  p = p * r + 8.368745e-3f;
  p = p * r + 4.1668393e-2f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r;
  p = p + 1.f;
  const float two_to_n = bits_to_float((float_to_bits(shifted) - float_to_bits(shifter) + 127u) << 23);
  const float result = x < lowest ? 0.f : p * two_to_n;
  return x == x ? result : x;
}

// tanh: an odd polynomial near 0, where 1 - 2/(e^2x + 1) would cancel; that formula elsewhere.
TUNA_INLINE float tanh_of(float x) {
  const float magnitude = x < 0.f ? -x : x;
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near_zero = x + x * square * p;
  const float capped = magnitude < 20.f ? magnitude : 20.f;
  const float far = 1.f - 2.f / (exp_of(2.f * capped) + 1.f);
  const float signed_far = x < 0.f ? -far : far;
  const float result = magnitude < 0.625f ? near_zero : signed_far;
  return x == x ? result : x;
}

}  // namespace tuna
