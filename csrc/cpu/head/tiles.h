// What the CPU backend does to one tile of logits between two matrix products. Plain pointers, element strides
// and a thread count; no torch. Sizes are int64, logits float32, statistics float32 unless said otherwise.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace tuna {

// z = softcap(scale * (x + bias)); softcap(x) = cap * tanh(x / cap); cap 0: none; bias null: none (bias of this tile).
//
// Statistics are kept of v, where z = factor * v: with a cap v = z and factor = 1, without one
// v = sign(scale) * (x + bias) and factor = |scale|. A difference of two v is taken before it is multiplied, so that
// large or steep logits lose nothing to the rounding of z, and no fused multiply-add sees z more exactly than its maximum.
struct Transform {
  float scale;  // finite; of a magnitude that float32 holds, or 0
  float cap;
  const float* bias;
};

// A tile [rows, columns] of logits x, row stride `stride`, whose first column is vocabulary entry `first_column`.
struct Tile {
  float* x;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  int64_t first_column;
};

// Which targets each row of the tile must find: slots offsets[r]:offsets[r+1], sorted by row.
struct RowSlots {
  const int64_t* offsets;  // [rows + 1]
  const int64_t* targets;  // [offsets[rows]] vocabulary entries
};

// Running state of the online softmax, one entry a row.
struct SoftmaxState {
  float* maximum;       // [rows] running maximum of v
  double* sum;          // [rows] running sum of e^(z - largest z)
  double* weighted;     // [rows] running sum of e^(z - largest z) (z - largest z); null unless the entropy is wanted
  float* rescale;       // [rows] e^(old largest z - new one); null unless the tile becomes exponentials
  float* target_logit;  // [slots] v of each slot's target, written where the tile holds it
};

// Merge the tile into the state. With a cap the tile is left holding z, else it is left alone; with `rescale` it
// is left holding e^(z - largest z) dz/dx, ready to be multiplied by the weight (the unit gradient of a frozen head).
void softmax_tile(const Tile& tile, const Transform& transform, const RowSlots& slots, const SoftmaxState& state,
                  int threads);

// x becomes dL/dx, where dL/dz_v = p_v (softmax_weight - entropy_weight (log p_v + entropy)) and each slot adds
// slot_gradient at its target. `is_capped`: the tile already holds z (left so by softmax_tile).
struct GradientInputs {
  const float* maximum;          // [rows] of v
  const float* log_sum;          // [rows] log-sum-exp less the largest z
  const float* softmax_weight;   // [rows]
  const float* entropy_weight;   // [rows], null: none
  const float* entropy;          // [rows], null: none
  const float* slot_gradient;    // [slots] dL/dz of the slot's target, the softmax left out
};
void gradient_tile(const Tile& tile, const Transform& transform, const RowSlots& slots, const GradientInputs& inputs,
                   bool is_capped, int threads);

// destination[i, :] = float(source[index[i], :]) (index null: i). Strides in elements; rows are dense.
void load_rows(float* destination, int64_t destination_stride, const void* source, Element element,
               int64_t source_stride, const int64_t* index, int64_t rows, int64_t columns, int threads);

// x[i, :] *= factor[i], skipping rows whose factor is exactly 1.
void scale_rows(float* x, int64_t stride, const float* factor, int64_t rows, int64_t columns, int threads);

}  // namespace tuna
