// The instruction sets for which code is compiled; the one to run is chosen at run time.
#pragma once

namespace tuna {

enum class InstructionSet : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best one supported by this processor and the compiler.
InstructionSet best_instruction_set();

}  // namespace tuna
