// Operations of the CPU backend on one tile of logits between two matrix products. Plain pointers, element strides
// and a thread count; no torch. Sizes are int64, logits float32, statistics float32 unless noted.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace tuna {

// z = softcap(scale * (x + bias)); softcap(x) = cap * tanh(x / cap); cap 0: none; bias null: none (bias of this tile).
//
// Statistics are in terms of v, where z = factor * v: with a cap v = z and factor = 1, without one v = sign(scale) * (x
// + bias) and factor = |scale|. Differences of v are taken before multiplying, so that the rounding of z costs no
// accuracy for large or steep logits, and no fused multiply-add sees z more exactly than its maximum.
struct Transform {
  float scale;  // finite; with a normal float32 magnitude, or 0
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

// The targets of each row of the tile: slots offsets[r]:offsets[r+1], sorted by row.
struct RowSlots {
  const int64_t* offsets;  // [rows + 1]
  const int64_t* targets;  // [offsets[rows]] vocabulary entries
};

// Running state of the online softmax, one entry per row.
struct SoftmaxState {
  float* maximum;       // [rows] running maximum of v
  double* sum;          // [rows] running sum of e^(z - largest z)
  double* weighted;     // [rows] running sum of e^(z - largest z) (z - largest z); null unless the entropy is needed
  float* rescale;       // [rows] e^(old largest z - new one); null unless the tile is replaced by exponentials
  float* target_logit;  // [slots] v of each slot's target, written if it is in the tile
};

// Merge the tile into the state. With a cap the tile is overwritten by z, else it is unchanged; with `rescale` it is
// overwritten by e^(z - largest z) dz/dx, to be multiplied by the weight (the unit gradient of a frozen head).
void softmax_tile(const Tile& tile, const Transform& transform, const RowSlots& slots, const SoftmaxState& state,
                  int threads);

// Replaces x by dL/dx, where dL/dz_v = p_v (softmax_weight - entropy_weight (log p_v + entropy)) and each slot adds
// slot_gradient at its target. `is_capped`: the tile already contains z (from softmax_tile).
struct GradientInputs {
  const float* maximum;          // [rows] of v
  const float* log_sum;          // [rows] log-sum-exp minus the largest z
  const float* softmax_weight;   // [rows]
  const float* entropy_weight;   // [rows], null: none
  const float* entropy;          // [rows], null: none
  const float* slot_gradient;    // [slots] dL/dz of the slot's target, without the softmax's part
};
void gradient_tile(const Tile& tile, const Transform& transform, const RowSlots& slots, const GradientInputs& inputs,
                   bool is_capped, int threads);

// destination[i, :] = float(source[index[i], :]) (index null: i). Strides in elements; rows are dense.
void load_rows(float* destination, int64_t destination_stride, const void* source, Element element,
               int64_t source_stride, const int64_t* index, int64_t rows, int64_t columns, int threads);

// x[i, :] *= factor[i], skipping rows whose factor is exactly 1.
void scale_rows(float* x, int64_t stride, const float* factor, int64_t rows, int64_t columns, int threads);

}  // namespace tuna
