#include "tiles.h"

#include <limits>

#include "vector_math.h"

namespace tuna {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Each row function is cloned per instruction set; the parallel loops below only call them.

template <bool kHasBias>
TUNA_INLINE float affine(const float* x, const float* bias, float scale, int64_t j) {
  return scale * (kHasBias ? x[j] + bias[j] : x[j]);
}

// z into the row itself; returns its maximum. The reduction clause allows the compiler to keep one a lane.
template <bool kHasBias>
TUNA_INLINE float cap_row_body(float* x, int64_t n, const float* bias, float scale, float cap) {
  float maximum = kLowest;
  const float inverse = 1.f / cap;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) {
    const float z = cap * tanh_of(affine<kHasBias>(x, bias, scale, j) * inverse);
    x[j] = z;
    maximum = z > maximum ? z : maximum;
  }
  return maximum;
}

TUNA_CLONES float cap_row(float* x, int64_t n, const float* bias, float scale, float cap) {
  return bias ? cap_row_body<true>(x, n, bias, scale, cap) : cap_row_body<false>(x, n, bias, scale, cap);
}

template <bool kHasBias>
TUNA_INLINE float max_row_body(const float* x, int64_t n, const float* bias, float scale) {
  float maximum = kLowest;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) {
    const float z = affine<kHasBias>(x, bias, scale, j);
    maximum = z > maximum ? z : maximum;
  }
  return maximum;
}

TUNA_CLONES float max_row(const float* x, int64_t n, const float* bias, float scale) {
  return bias ? max_row_body<true>(x, n, bias, scale) : max_row_body<false>(x, n, bias, scale);
}

template <bool kHasBias>
TUNA_INLINE float sum_row_body(const float* x, int64_t n, const float* bias, float scale, float maximum) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += exp_of(affine<kHasBias>(x, bias, scale, j) - maximum);
  return sum;
}

TUNA_CLONES float sum_row(const float* x, int64_t n, const float* bias, float scale, float maximum) {
  return bias ? sum_row_body<true>(x, n, bias, scale, maximum) : sum_row_body<false>(x, n, bias, scale, maximum);
}

// The same and sum e^(z - m) (z - m) as well; an exponential of 0 counts as 0 even where z is -infinity.
TUNA_CLONES float sum_weighted_row(const float* x, int64_t n, const float* bias, float scale, float maximum,
                                   float* weighted) {
  float sum = 0.f, product = 0.f;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t j = 0; j < n; ++j) {
    const float below = scale * (bias ? x[j] + bias[j] : x[j]) - maximum;
    const float e = exp_of(below);
    sum += e;
    product += e > 0.f || e != e ? e * below : 0.f;
  }
  *weighted = product;
  return sum;
}

// The row becomes e^(z - m) dz/dx; returns the sum of the exponentials. A capped row holds z already.
template <bool kHasBias>
TUNA_INLINE float exponential_row_body(float* x, int64_t n, const float* bias, float scale, float maximum) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const float e = exp_of(affine<kHasBias>(x, bias, scale, j) - maximum);
    sum += e;
    x[j] = e * scale;
  }
  return sum;
}

TUNA_CLONES float exponential_row(float* x, int64_t n, const float* bias, float scale, float maximum) {
  return bias ? exponential_row_body<true>(x, n, bias, scale, maximum)
              : exponential_row_body<false>(x, n, bias, scale, maximum);
}

TUNA_CLONES float capped_exponential_row(float* x, int64_t n, float scale, float cap, float maximum) {
  float sum = 0.f;
  const float inverse = 1.f / cap;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const float e = exp_of(x[j] - maximum);
    const float t = x[j] * inverse;
    sum += e;
    x[j] = e * scale * (1.f - t * t);
  }
  return sum;
}

template <bool kHasBias>
TUNA_INLINE void softmax_gradient_body(float* x, int64_t n, const float* bias, float scale, float lse, float weight) {
  const float factor = scale * weight;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] = factor * exp_of(affine<kHasBias>(x, bias, scale, j) - lse);
}

TUNA_CLONES void softmax_gradient_row(float* x, int64_t n, const float* bias, float scale, float lse, float weight) {
  if (bias) {
    softmax_gradient_body<true>(x, n, bias, scale, lse, weight);
  } else {
    softmax_gradient_body<false>(x, n, bias, scale, lse, weight);
  }
}

// The same with the entropy term.
template <bool kHasBias>
TUNA_INLINE void entropy_gradient_body(float* x, int64_t n, const float* bias, float scale, float lse, float weight,
                                       float entropy_weight, float entropy) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float log_p = affine<kHasBias>(x, bias, scale, j) - lse;
    const float p = exp_of(log_p);
    const float surprise = p > 0.f || p != p ? log_p + entropy : 0.f;  // 0 times infinity is to be 0
    x[j] = p * (weight - entropy_weight * surprise) * scale;
  }
}

TUNA_CLONES void entropy_gradient_row(float* x, int64_t n, const float* bias, float scale, float lse, float weight,
                                      float entropy_weight, float entropy) {
  if (bias) {
    entropy_gradient_body<true>(x, n, bias, scale, lse, weight, entropy_weight, entropy);
  } else {
    entropy_gradient_body<false>(x, n, bias, scale, lse, weight, entropy_weight, entropy);
  }
}

// The same for a row that holds capped logits z (which are finite).
TUNA_CLONES void capped_gradient_row(float* x, int64_t n, float scale, float cap, float lse, float weight,
                                     float entropy_weight, float entropy) {
  const float inverse = 1.f / cap;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float log_p = x[j] - lse;
    const float t = x[j] * inverse;
    x[j] = exp_of(log_p) * (weight - entropy_weight * (log_p + entropy)) * scale * (1.f - t * t);
  }
}

TUNA_CLONES void convert_bfloat16(float* out, const uint16_t* in, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = from_bfloat16(in[j]);
}

TUNA_CLONES void convert_float16(float* out, const uint16_t* in, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = from_float16(in[j]);
}

void softmax_one_row(const Tile& tile, const Transform& transform, const RowSlots& slots, const SoftmaxState& state,
                     int64_t row) {
  float* x = tile.x + row * tile.stride;
  const int64_t n = tile.columns;
  const bool is_capped = transform.cap > 0.f;
  const float top = is_capped ? cap_row(x, n, transform.bias, transform.scale, transform.cap)
                              : max_row(x, n, transform.bias, transform.scale);
  const float scale = is_capped ? 1.f : transform.scale;
  const float* bias = is_capped ? nullptr : transform.bias;
  const float before = state.maximum[row];
  const float maximum = top > before ? top : before;
  for (int64_t s = slots.offsets[row]; s < slots.offsets[row + 1]; ++s) {
    const int64_t column = slots.targets[s] - tile.first_column;
    if (column >= 0 && column < n) state.chosen[s] = scale * (bias ? x[column] + bias[column] : x[column]);
  }
  // Nothing but -infinity so far: leave the sums at 0 rather than make -inf - -inf.
  const float reference = maximum == kLowest ? 0.f : maximum;
  float sum = 0.f, weighted = 0.f;
  if (state.shrink) {
    sum = is_capped ? capped_exponential_row(x, n, transform.scale, transform.cap, reference)
                    : exponential_row(x, n, bias, scale, reference);
  } else if (state.weighted) {
    sum = sum_weighted_row(x, n, bias, scale, reference, &weighted);
  } else {
    sum = sum_row(x, n, bias, scale, reference);
  }
  const bool is_first = before == kLowest;
  const float shrink = is_first ? 0.f : exp_of(before - reference);
  if (state.weighted) {
    const double moved = is_first ? 0. : state.sum[row] * (static_cast<double>(before) - reference);
    state.weighted[row] = (state.weighted[row] + moved) * shrink + weighted;
  }
  state.maximum[row] = maximum;
  state.sum[row] = state.sum[row] * shrink + sum;
  if (state.shrink) state.shrink[row] = shrink;
}

void gradient_one_row(const Tile& tile, const Transform& transform, const RowSlots& slots,
                      const GradientInputs& inputs, bool is_capped, int64_t row) {
  float* x = tile.x + row * tile.stride;
  const int64_t n = tile.columns;
  const float lse = inputs.lse[row], weight = inputs.softmax_weight[row];
  const float entropy_weight = inputs.entropy_weight ? inputs.entropy_weight[row] : 0.f;
  const float entropy = inputs.entropy_weight ? inputs.entropy[row] : 0.f;
  if (transform.cap > 0.f) {
    if (!is_capped) cap_row(x, n, transform.bias, transform.scale, transform.cap);
    capped_gradient_row(x, n, transform.scale, transform.cap, lse, weight, entropy_weight, entropy);
  } else if (inputs.entropy_weight) {
    entropy_gradient_row(x, n, transform.bias, transform.scale, lse, weight, entropy_weight, entropy);
  } else {
    softmax_gradient_row(x, n, transform.bias, transform.scale, lse, weight);
  }
  for (int64_t s = slots.offsets[row]; s < slots.offsets[row + 1]; ++s) {
    const int64_t column = slots.targets[s] - tile.first_column;
    if (column >= 0 && column < n) x[column] += inputs.slot_gradient[s];
  }
}

}  // namespace

void softmax_tile(const Tile& tile, const Transform& transform, const RowSlots& slots, const SoftmaxState& state,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < tile.rows; ++row) softmax_one_row(tile, transform, slots, state, row);
}

void gradient_tile(const Tile& tile, const Transform& transform, const RowSlots& slots, const GradientInputs& inputs,
                   bool is_capped, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < tile.rows; ++row) gradient_one_row(tile, transform, slots, inputs, is_capped, row);
}

void load_rows(float* destination, int64_t destination_stride, const void* source, Element element,
               int64_t source_stride, const int64_t* index, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    float* out = destination + i * destination_stride;
    const int64_t from = (index ? index[i] : i) * source_stride;
    if (element == Element::kFloat32) {
      std::memcpy(out, static_cast<const float*>(source) + from, static_cast<size_t>(columns) * sizeof(float));
    } else if (element == Element::kBFloat16) {
      convert_bfloat16(out, static_cast<const uint16_t*>(source) + from, columns);
    } else {
      convert_float16(out, static_cast<const uint16_t*>(source) + from, columns);
    }
  }
}

void scale_rows(float* x, int64_t stride, const float* factor, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const float by = factor[i];
    if (by == 1.f) continue;
    float* row = x + i * stride;
    for (int64_t j = 0; j < columns; ++j) row[j] *= by;
  }
}

}  // namespace tuna
