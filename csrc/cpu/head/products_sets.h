// The copies of products_kernel.h, one per instruction set.
#pragma once

#include "head/products.h"
#include "common/vector_math.h"

#if TUNA_HAS_X86_SETS
#define TUNA_DECLARE_SET(name)                                                            \
  namespace tuna::name {                                                                  \
  void multiply_matrices(const MatrixProduct& product, float* scratch, int threads);      \
  }
TUNA_DECLARE_SET(avx2)
TUNA_DECLARE_SET(avx512)
TUNA_DECLARE_SET(avx512_bf16)
#undef TUNA_DECLARE_SET
#endif
