// C += A B for blocks that stay in the cache: float32 sums, registers blocked by hand.
//
// Included by one translation unit per instruction set (attention/*.cpp, head/products_*.cpp), which sets TUNA_ISA, a
// separate namespace so that the linker never mixes them, and TUNA_LANES, the floats of a vector register. A register
// block must know that width; compiler clones of one function (vector_math.h) all see the same one. With TUNA_PAIRS an
// "element" of A and B is a pair of bfloat16 numbers adjacent along `inner`, in the place of a float.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/vector_math.h"

namespace tuna::TUNA_ISA {

constexpr int kLanes = TUNA_LANES;

#if defined(__GNUC__)
typedef float Vector __attribute__((vector_size(4 * TUNA_LANES)));
#else
struct Vector {
  float x[TUNA_LANES];
  Vector& operator+=(const Vector& other) {
    for (int i = 0; i < kLanes; ++i) x[i] += other.x[i];
    return *this;
  }
  friend Vector operator*(Vector a, const Vector& b) {
    for (int i = 0; i < kLanes; ++i) a.x[i] *= b.x[i];
    return a;
  }
};
#endif

TUNA_INLINE Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

TUNA_INLINE Vector broadcast(float value) {
#if defined(__GNUC__)
  return value - Vector{};
#else
  Vector v;
  for (float& x : v.x) x = value;
  return v;
#endif
}

#if defined(TUNA_PAIRS)
TUNA_INLINE Vector broadcast_element(const float* from) {
  int32_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Vector)_mm512_set1_epi32(bits);
}

// Two products per element: exact in float32, added one after the other.
TUNA_INLINE Vector multiply_add(Vector sum, Vector left, Vector right) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
#else
TUNA_INLINE Vector broadcast_element(const float* from) { return broadcast(*from); }

TUNA_INLINE Vector multiply_add(Vector sum, Vector left, Vector right) {
  sum += left * right;
  return sum;
}
#endif

// A [rows, inner] at a + i * row + k * column; B [inner, columns] and C [rows, columns] with unit stride along columns,
// whose number is a multiple of a vector.
struct Product {
  float* c;
  int64_t c_row;
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  int64_t b_row;
  int64_t rows, columns, inner;
};

// Accumulators of a block fill the registers: 6 x 4 vectors of 32 (AVX-512, Arm), 6 x 2 of 16.
#if defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = TUNA_LANES >= 16 ? 32 : 16;
#endif
constexpr int kBlockRows = 6;
constexpr int kBlockVectors = kVectorRegisters >= 32 ? 4 : 2;

template <int kRows, int kVectors, bool kAdd>
TUNA_INLINE void multiply_block(const Product& p, int64_t row, int64_t column) {
  Vector sum[kRows][kVectors];
  float* c = p.c + row * p.c_row + column;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = broadcast(0.f);
  }
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + column;
  for (int64_t k = 0; k < p.inner; ++k, a += p.a_column, b += p.b_row) {
    Vector right[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector left = broadcast_element(a + i * p.a_row);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * p.c_row + j * kLanes;
      if (kAdd) sum[i][j] += load(to);
      std::memcpy(to, &sum[i][j], sizeof(Vector));
    }
  }
}

template <int kVectors, bool kAdd>
TUNA_INLINE void multiply_panel(const Product& p, int64_t column) {
  int64_t row = 0;
  for (; row + kBlockRows <= p.rows; row += kBlockRows) multiply_block<kBlockRows, kVectors, kAdd>(p, row, column);
  for (; row + 2 <= p.rows; row += 2) multiply_block<2, kVectors, kAdd>(p, row, column);
  if (row < p.rows) multiply_block<1, kVectors, kAdd>(p, row, column);
}

// C = A B, or C += A B. An entry of A B is summed over `inner` in order, whatever block it is in, and then
// added to C: a long sum of short ones has smaller rounding errors.
template <bool kAdd>
void multiply(const Product& p) {
  int64_t vectors = p.columns / kLanes, column = 0;
  while (vectors > 0) {
    // Two panels of 3 instead of 4 and 2, or of 3 and 2 instead of 4 and 1.
    const int64_t panels = (vectors + kBlockVectors - 1) / kBlockVectors;
    const int64_t width = (vectors + panels - 1) / panels;
    if constexpr (kBlockVectors > 2) {
      if (width == 4) multiply_panel<4, kAdd>(p, column);
      if (width == 3) multiply_panel<3, kAdd>(p, column);
    }
    if (width == 2) multiply_panel<2, kAdd>(p, column);
    if (width == 1) multiply_panel<1, kAdd>(p, column);
    vectors -= width;
    column += width * kLanes;
  }
}

}  // namespace tuna::TUNA_ISA
