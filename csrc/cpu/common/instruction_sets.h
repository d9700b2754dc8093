// Which copy of the code that is compiled once per instruction set runs here.
#pragma once

namespace tuna {

enum class InstructionSet : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best that this processor has and the compiler could make.
InstructionSet best_instruction_set();

}  // namespace tuna
