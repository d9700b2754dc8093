// Tree attention for x86-64 with AVX512; chosen at run time by attention.cpp.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention/sets.h"

#if TUNA_HAS_X86_SETS
#pragma GCC target("arch=x86-64-v4")
#define TUNA_ISA avx512
#define TUNA_LANES 16
#include "attention/kernel.h"
#endif
