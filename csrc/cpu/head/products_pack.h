// Packing for products_kernel.h: lines of an operand are interleaved, out[k * width + line], as the elements that
// products_kernel.h multiplies: float32 numbers, converted if they have 16 bits, or, with TUNA_PAIRS, pairs of bfloat16
// numbers adjacent along the sum, an odd last one paired with 0.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/matmul.h"
#include "head/products.h"

namespace tuna::TUNA_ISA {

#if defined(TUNA_PAIRS)
constexpr int64_t kUnit = 2;  // numbers in an element
#else
constexpr int64_t kUnit = 1;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
TUNA_INLINE const T* at(const Matrix& m, int64_t line, int64_t place) {
  return static_cast<const T*>(m.data) + line * m.stride + place;
}

#if defined(TUNA_PAIRS)
TUNA_INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }

// Up to 16 numbers as bfloat16, padded with 0.
TUNA_INLINE __m256i load_bfloat16(const float* from, int64_t count) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(count), from));
}
TUNA_INLINE __m256i load_bfloat16(const BFloat16* from, int64_t count) {
  return _mm256_maskz_loadu_epi16(first(count), from);
}

// Up to kLanes elements from adjacent numbers.
template <typename T>
TUNA_INLINE Vector load_elements(const T* from, int64_t numbers) {
  const __m256i low = load_bfloat16(from, std::min<int64_t>(16, numbers));
  const __m256i high = numbers > 16 ? load_bfloat16(from + 16, std::min<int64_t>(16, numbers - 16)) : __m256i{};
  return (Vector)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// out[j] = the element of low[j] and high[j]; zeros after n.
template <typename T>
TUNA_INLINE void join_lines(float* out, const T* low, const T* high, int64_t n, int64_t width) {
  for (int64_t j = 0; j < width; j += 16) {
    const int64_t count = std::max<int64_t>(0, n - j);
    const __m512i lower = _mm512_cvtepu16_epi32(load_bfloat16(low + j, count));
    const __m512i upper = _mm512_cvtepu16_epi32(load_bfloat16(high ? high + j : low + j, high ? count : 0));
    _mm512_storeu_si512(out + j, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
  }
}
#else
TUNA_INLINE float number(float x) { return x; }
TUNA_INLINE float number(BFloat16 x) { return from_bfloat16(x.bits); }
TUNA_INLINE float number(Float16 x) { return from_float16(x.bits); }

template <typename T>
TUNA_INLINE Vector load_elements(const T* from, int64_t numbers) {
  float x[kLanes] = {};
  if (numbers >= kLanes) {
    for (int j = 0; j < kLanes; ++j) x[j] = number(from[j]);
  } else {
    for (int64_t j = 0; j < numbers; ++j) x[j] = number(from[j]);
  }
  return load(x);
}

template <typename T>
TUNA_INLINE void join_lines(float* out, const T* line, const T*, int64_t n, int64_t width) {
  n = std::min(n, width);
  for (int64_t j = 0; j < n; ++j) out[j] = number(line[j]);
  for (int64_t j = n; j < width; ++j) out[j] = 0.f;
}
#endif

// Transposes kLanes vectors by exchanging parts of increasing size between them.
template <int kStep>
TUNA_INLINE void exchange(Vector (&r)[kLanes]) {
  typedef int32_t Places __attribute__((vector_size(4 * TUNA_LANES)));
  Places low, high;
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l & kStep ? kLanes + l - kStep : l;
    high[l] = l & kStep ? kLanes + l : l + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vector a = r[i], b = r[i + kStep];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

TUNA_INLINE void transpose(Vector (&r)[kLanes]) {
  exchange<1>(r);
  exchange<2>(r);
  exchange<4>(r);
  if constexpr (kLanes > 8) exchange<8>(r);
}

// A part of a sum: elements start to start + count. The whole sum has `numbers` numbers.
struct Part {
  int64_t start, count, numbers;
};

// Row k of the source contains number k of each line. Lines after the last are 0.
template <typename T>
TUNA_INLINE void pack_across(float* out, int64_t width, const Matrix& m, const Part& part, int64_t line, int64_t lines) {
  for (int64_t k = 0; k < part.count; ++k) {
    const int64_t place = (part.start + k) * kUnit;
    const T* high = kUnit == 2 && place + 1 < part.numbers ? at<T>(m, place + 1, line) : nullptr;
    join_lines(out + k * width, at<T>(m, place, line), high, lines, width);
  }
}

// Row `line` of the source contains the numbers of that line.
template <typename T>
TUNA_INLINE void pack_along(float* out, int64_t width, const Matrix& m, const Part& part, int64_t line, int64_t lines) {
  for (int64_t j = 0; j < width; j += kLanes) {
    for (int64_t k = 0; k < part.count; k += kLanes) {
      const int64_t place = (part.start + k) * kUnit, count = std::min<int64_t>(kLanes, part.count - k);
      Vector r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const bool is_there = j + i < lines;
        r[i] = is_there ? load_elements(at<T>(m, line + j + i, place), std::min(part.numbers - place, count * kUnit))
                        : broadcast(0.f);
      }
      transpose(r);
      for (int64_t i = 0; i < count; ++i) std::memcpy(out + (k + i) * width + j, &r[i], sizeof(Vector));
    }
  }
}

}  // namespace tuna::TUNA_ISA
