// Matrix products for x86-64 with AVX512_BF16; chosen at run time by products.cpp.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "head/products_sets.h"

#if TUNA_HAS_X86_SETS
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside the header, by gcc 12
#include <immintrin.h>
#define TUNA_ISA avx512_bf16
#define TUNA_LANES 16
#define TUNA_PAIRS
#include "head/products_kernel.h"
#endif
