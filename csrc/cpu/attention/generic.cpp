// Tree attention for any processor: vectors of four floats (SSE, Neon, or as the compiler lowers them).
#include "attention/sets.h"

#define TUNA_ISA generic
#define TUNA_LANES 4
#include "attention/kernel.h"
