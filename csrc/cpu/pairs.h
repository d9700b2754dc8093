// Products of bfloat16 matrices with float32 sums, for processors that multiply bfloat16 in hardware (AVX512_BF16): twice
// the speed of float32, and no rounding of the result, which is what a BLAS that returns bfloat16 would do.
//
// Numbers that are neighbours along the summed dimension k are kept as pairs, 32 bits each, an odd last one beside 0.
// Two layouts of a packed operand of m lines and P pairs:
//   lines   [m][P]                   the left operand, where its source runs along k
//   panels  [ceil(m / w)][P][w]      w lines side by side; lines after the last are 0
#pragma once

#include <cstdint>

#include "element.h"

namespace tuna {

constexpr int64_t kLeftPanel = 96;   // lines of a panel of the left operand
constexpr int64_t kRightPanel = 64;  // and of the right one: four vectors

// Whether this processor, as compiled, has the instructions. Call nothing below otherwise.
bool has_pairs();

// A source of bfloat16 or float32 (rounded to nearest even). Strides in elements, inner elements are neighbours.
struct PairSource {
  const void* data;
  Element element;
  int64_t stride;
  const int64_t* index;  // null: row i of the source is row index[i] of `data`
  int64_t rows, columns;
};

// `along`: source [m, k], each row a line. Otherwise source [k, m], each column a line.
void pack_lines(uint32_t* out, const PairSource& along, int threads);
void pack_panels_along(uint32_t* out, const PairSource& along, int threads);  // bfloat16, panels of kRightPanel
void pack_panels_across(uint32_t* out, const PairSource& across, int64_t width, int threads);

// C [rows, columns] = or += left right, row stride `stride`; left in lines or in panels of kLeftPanel, right in panels of
// kRightPanel, both of `pairs` pairs. An entry of C is summed in one order, whatever lies beside it.
struct PairProduct {
  float* c;
  int64_t stride, rows, columns;
  const uint32_t* left;
  bool left_in_panels;
  const uint32_t* right;
  int64_t pairs;
  bool add;
};
void multiply_pairs(const PairProduct& product, int threads);

}  // namespace tuna
