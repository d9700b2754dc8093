// Working memory of one thread, carved from one allocation by the function that also computes its size.
#pragma once

#include <cstdint>

#include "attention/attention.h"

namespace tuna {

// Query heads of a key head that are computed together: their rows share every load of a key block, and 8 x 32 rows of
// scores still fit into the L2 cache.
constexpr int64_t kHeadsAtOnce = 8;

// Shapes: c rows of a chunk; m = kHeadsAtOnce x kQueryRows folded queries; D and E the padded sizes d and dv.
// "By blocks": each key block of n padded rows is a separate [d, n].
struct Buffers {
  float* keys_t;    // [d, c] by blocks
  float* values;    // [c, E]; forward only
  float* keys;      // [c, D]; backward only
  float* values_t;  // [dv, c] by blocks; backward only
  int32_t* ends;    // [c] one past the last row that sees the key; 0 for padding
  int64_t* depths;  // [c]; with a window only
  float* queries;   // [m, D] scaled
  float* out;       // [m, E] sums of the forward; dO in the backward
  float* scores;    // [m, n]
  float* d_queries;  // [m, D]; backward only
  float* d_scores;   // [m, n]; backward only
  float* top;        // [m] running maximum; lse in the backward
  float* sum;        // [m] running sum; delta in the backward
  float* row_sums;   // [m]; backward only
  float* row;        // [max(D, E)]
};

// Returns the floats taken from `base`; with a null base it only computes the size.
TUNA_INLINE int64_t carve(Buffers& buffers, float* base, const PlanView& plan, const Attention& call, bool backward) {
  int64_t taken = 0;
  const auto take = [&](int64_t floats) {
    float* piece = base ? base + taken : nullptr;
    taken += padded(floats);
    return piece;
  };
  const int64_t c = plan.chunk_rows, m = kHeadsAtOnce * kQueryRows;
  const int64_t size = padded(call.size), value_size = padded(call.value_size);
  buffers.keys_t = take(c * call.size);
  buffers.values = take(backward ? 0 : c * value_size);
  buffers.keys = take(backward ? c * size : 0);
  buffers.values_t = take(backward ? c * call.value_size : 0);
  buffers.ends = reinterpret_cast<int32_t*>(take(c));
  buffers.depths = reinterpret_cast<int64_t*>(take(call.tree.window ? 2 * c : 0));
  buffers.queries = take(m * size);
  buffers.out = take(m * value_size);
  buffers.scores = take(m * kKeyRows);
  buffers.d_queries = take(backward ? m * size : 0);
  buffers.d_scores = take(backward ? m * kKeyRows : 0);
  buffers.top = take(m);
  buffers.sum = take(m);
  buffers.row_sums = take(backward ? m : 0);
  buffers.row = take(size > value_size ? size : value_size);
  return taken;
}

}  // namespace tuna
