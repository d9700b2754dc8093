// Tree attention for x86-64 with AVX2; chosen at run time by attention.cpp.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention/sets.h"

#if TUNA_HAS_X86_SETS
#pragma GCC target("arch=x86-64-v3")
#define TUNA_ISA avx2
#define TUNA_LANES 8
#include "attention/kernel.h"
#endif
