// Matrix products with float32 sums, for the tile loop. Differences from a BLAS: the right operand may have 16 bits and
// is converted while it is packed, without a converted copy of a weight tile; and bfloat16 operands may be multiplied
// directly if the processor can (AVX512_BF16), at twice the speed of float32 and without rounding the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/element.h"
#include "common/instruction_sets.h"

namespace tuna {

// Entry (i, j) at i * stride + j, or at j * stride + i if transposed.
struct Matrix {
  const void* data;
  Element element;
  int64_t stride;
  bool transposed;
};

// C [rows, columns] = or += left [rows, inner] right [inner, columns], C's rows `stride` apart. An entry of C is summed
// in a fixed order, independent of the other entries and of the thread.
struct MatrixProduct {
  float* c;
  int64_t stride, rows, columns, inner;
  Matrix left, right;
  bool add;
};

constexpr int64_t kChunk = 96;   // rows of C per task
constexpr int64_t kInner = 512;  // terms summed at a time: a panel of the right operand stays in the L2 cache

// Floats of working memory for a product with these rows and terms.
inline int64_t product_scratch(int64_t rows, int64_t inner) {
  return (rows + kChunk - 1) / kChunk * kChunk * std::min(kInner, (inner + 15) / 16 * 16);
}

// Whether there is code for the set; kGeneric uses a BLAS.
inline bool has_products(InstructionSet set) { return set != InstructionSet::kGeneric; }

// kAvx2 and kAvx512 take a float32 left operand and any right one. kAvx512Bf16 takes a bfloat16 right operand, and a
// left one in bfloat16 or float32, which it rounds to nearest even.
void multiply_matrices(const MatrixProduct& product, float* scratch, int threads, InstructionSet set);

}  // namespace tuna
