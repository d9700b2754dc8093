// The copies of kernel.h, one per instruction set.
#pragma once

#include "attention/attention.h"
#include "common/vector_math.h"

// As TUNA_CLONES (vector_math.h), but in separate files, since a register block must know its width.
#define TUNA_DECLARE_SET(name)                                                                          \
  namespace name {                                                                                      \
  void forward(const PlanView& plan, const Attention& call, float* workspace, int threads);             \
  void backward(const PlanView& plan, const Attention& call, const AttentionGradients& gradients,       \
                float* workspace, int threads);                                                         \
  }

namespace tuna {
TUNA_DECLARE_SET(generic)
#if TUNA_HAS_X86_SETS
TUNA_DECLARE_SET(avx2)
TUNA_DECLARE_SET(avx512)
#endif
}  // namespace tuna
