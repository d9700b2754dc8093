#include "common/instruction_sets.h"

#include "common/vector_math.h"

namespace tuna {

InstructionSet best_instruction_set() {
#if TUNA_HAS_X86_SETS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    return __builtin_cpu_supports("avx512bf16") ? InstructionSet::kAvx512Bf16 : InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("x86-64-v3")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kGeneric;
}

}  // namespace tuna
