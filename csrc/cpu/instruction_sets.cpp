#include "instruction_sets.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "vector_math.h"

namespace tuna {
namespace {

InstructionSet of_processor() {
#if TUNA_HAS_X86_SETS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    return __builtin_cpu_supports("avx512bf16") ? InstructionSet::kAvx512Bf16 : InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("x86-64-v3")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kGeneric;
}

InstructionSet allowed() {
  const char* name = std::getenv("TUNA_CPU_ISA");
  if (name && std::strcmp(name, "generic") == 0) return InstructionSet::kGeneric;
  if (name && std::strcmp(name, "avx2") == 0) return InstructionSet::kAvx2;
  if (name && std::strcmp(name, "avx512") == 0) return InstructionSet::kAvx512;
  return InstructionSet::kAvx512Bf16;
}

}  // namespace

InstructionSet best_instruction_set() {
  static const InstructionSet best = std::min(of_processor(), allowed());
  return best;
}

}  // namespace tuna
