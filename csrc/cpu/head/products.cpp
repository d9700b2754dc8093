#include "head/products.h"

#include <stdexcept>

#include "head/products_sets.h"

namespace tuna {

void multiply_matrices(const MatrixProduct& product, float* scratch, int threads, InstructionSet set) {
#if TUNA_HAS_X86_SETS
  if (set == InstructionSet::kAvx512Bf16) return avx512_bf16::multiply_matrices(product, scratch, threads);
  if (set == InstructionSet::kAvx512) return avx512::multiply_matrices(product, scratch, threads);
  if (set == InstructionSet::kAvx2) return avx2::multiply_matrices(product, scratch, threads);
#endif
  (void)product, (void)scratch, (void)threads, (void)set;
  throw std::logic_error("products.h: no code for this instruction set");
}

}  // namespace tuna
