// The element types of tensors, exact conversion to float32 and correct rounding from it.
#pragma once

#include <cstdint>

#include "common/vector_math.h"

namespace tuna {

enum class Element : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

TUNA_INLINE float from_bfloat16(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

// Shift exponent and mantissa into place and rescale by 2^112: correct for subnormals too; infinity and NaN separately.
TUNA_INLINE float from_float16(uint16_t bits) {
  const float rescale = bits_to_float(0x77800000u);  // 2^112
  const uint32_t magnitude = (static_cast<uint32_t>(bits) & 0x7fffu) << 13;
  const uint32_t sign = (static_cast<uint32_t>(bits) & 0x8000u) << 16;
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * rescale);
  const uint32_t special = magnitude | 0x7f800000u;
  return bits_to_float(sign | (magnitude >= 0x0f800000u ? special : finite));
}

// To nearest, ties to even: adds half a unit, minus one if the last bit kept is 0; NaN stays NaN.
TUNA_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}

// As above. Below 2^-14 the spacing is that of the subnormals, 2^-24: adding 0.5, where float32 has that spacing,
// rounds.
TUNA_INLINE uint16_t to_float16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;        // NaN, else infinity
  return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite));  // 65520 and up
}

}  // namespace tuna
