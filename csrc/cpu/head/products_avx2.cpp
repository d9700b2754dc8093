// Matrix products for x86-64 with AVX2; chosen at run time by products.cpp.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "head/products_sets.h"

#if TUNA_HAS_X86_SETS
#pragma GCC target("arch=x86-64-v3")
#define TUNA_ISA avx2
#define TUNA_LANES 8
#include "head/products_kernel.h"
#endif
