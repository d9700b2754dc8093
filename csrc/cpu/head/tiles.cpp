#include "head/tiles.h"

#include <limits>
#include <vector>

#include "common/vector_math.h"

namespace tuna {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 128;  // columns summed in float32, a few per lane, before adding to float64

// The row functions are cloned per instruction set; the parallel loops below only call them.

// A row's logits are z = slope * (u - origin) + constant, u = x + bias, from which all sums and gradients are computed.
struct Line {
  const float* x;
  const float* bias;
  int64_t n;
  float slope;   // signed
  float origin;  // u of the largest z
};

template <bool kHasBias>
TUNA_INLINE float shifted(const float* x, const float* bias, int64_t j) {
  return kHasBias ? x[j] + bias[j] : x[j];
}

template <bool kHasBias>
TUNA_INLINE float below_largest(Line line, int64_t j) {
  return line.slope * (shifted<kHasBias>(line.x, line.bias, j) - line.origin);
}

TUNA_INLINE int64_t end_of_block(int64_t start, int64_t n) { return start + kBlock < n ? start + kBlock : n; }

// dz/dx from the capped z; `inverse` = 1 / cap.
TUNA_INLINE float slope_of_capped(float z, float scale, float inverse) {
  const float t = z * inverse;
  return scale * (1.f - t * t);
}

// Replaces the row by z; returns its maximum. The reduction clause lets the compiler keep one maximum per lane.
template <bool kHasBias>
TUNA_INLINE float cap_row_body(float* x, int64_t n, const float* bias, float scale, float cap) {
  float maximum = kLowest;
  const float inverse = 1.f / cap;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) {
    const float z = cap * tanh_of(scale * shifted<kHasBias>(x, bias, j) * inverse);
    x[j] = z;
    maximum = z > maximum ? z : maximum;
  }
  return maximum;
}

TUNA_CLONES float cap_row(float* x, int64_t n, const float* bias, float scale, float cap) {
  return bias ? cap_row_body<true>(x, n, bias, scale, cap) : cap_row_body<false>(x, n, bias, scale, cap);
}

template <bool kHasBias>
TUNA_INLINE float max_row_body(const float* x, int64_t n, const float* bias, float sign) {
  float maximum = kLowest;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) {
    const float v = sign * shifted<kHasBias>(x, bias, j);
    maximum = v > maximum ? v : maximum;
  }
  return maximum;
}

TUNA_CLONES float max_row(const float* x, int64_t n, const float* bias, float sign) {
  return bias ? max_row_body<true>(x, n, bias, sign) : max_row_body<false>(x, n, bias, sign);
}

template <bool kHasBias>
TUNA_INLINE double sum_row_body(Line line) {
  double total = 0.;
  for (int64_t start = 0; start < line.n; start += kBlock) {
    const int64_t stop = end_of_block(start, line.n);
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = start; j < stop; ++j) sum += exp_of(below_largest<kHasBias>(line, j));
    total += sum;
  }
  return total;
}

TUNA_CLONES double sum_row(const Line& line) {
  return line.bias ? sum_row_body<true>(line) : sum_row_body<false>(line);
}

// As above, also the sum of e^(z - m) (z - m); an exponential of 0 counts as 0 even if z is -infinity.
template <bool kHasBias>
TUNA_INLINE double sum_weighted_row_body(Line line, double* weighted) {
  double total = 0., total_product = 0.;
  for (int64_t start = 0; start < line.n; start += kBlock) {
    const int64_t stop = end_of_block(start, line.n);
    float sum = 0.f, product = 0.f;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t j = start; j < stop; ++j) {
      const float below = below_largest<kHasBias>(line, j);
      const float e = exp_of(below);
      sum += e;
      product += e > 0.f || e != e ? e * below : 0.f;
    }
    total += sum;
    total_product += product;
  }
  *weighted = total_product;
  return total;
}

TUNA_CLONES double sum_weighted_row(const Line& line, double* weighted) {
  return line.bias ? sum_weighted_row_body<true>(line, weighted) : sum_weighted_row_body<false>(line, weighted);
}

// Replaces the row by e^(z - m) dz/dx; returns the sum of the exponentials.
template <bool kHasBias>
TUNA_INLINE double exponential_row_body(float* x, Line line) {
  double total = 0.;
  for (int64_t start = 0; start < line.n; start += kBlock) {
    const int64_t stop = end_of_block(start, line.n);
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = start; j < stop; ++j) {
      const float e = exp_of(below_largest<kHasBias>(line, j));
      sum += e;
      x[j] = e * line.slope;
    }
    total += sum;
  }
  return total;
}

TUNA_CLONES double exponential_row(float* x, const Line& line) {
  return line.bias ? exponential_row_body<true>(x, line) : exponential_row_body<false>(x, line);
}

TUNA_CLONES double capped_exponential_row(float* x, int64_t n, float scale, float cap, float maximum) {
  double total = 0.;
  const float inverse = 1.f / cap;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t stop = end_of_block(start, n);
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = start; j < stop; ++j) {
      const float e = exp_of(x[j] - maximum);
      sum += e;
      x[j] = e * slope_of_capped(x[j], scale, inverse);
    }
    total += sum;
  }
  return total;
}

template <bool kHasBias>
TUNA_INLINE void softmax_gradient_body(float* x, Line line, float log_sum, float weight) {
  const float factor = line.slope * weight;
#pragma omp simd
  for (int64_t j = 0; j < line.n; ++j) x[j] = factor * exp_of(below_largest<kHasBias>(line, j) - log_sum);
}

TUNA_CLONES void softmax_gradient_row(float* x, const Line& line, float log_sum, float weight) {
  if (line.bias) {
    softmax_gradient_body<true>(x, line, log_sum, weight);
  } else {
    softmax_gradient_body<false>(x, line, log_sum, weight);
  }
}

// As above, with the entropy term.
template <bool kHasBias>
TUNA_INLINE void entropy_gradient_body(float* x, Line line, float log_sum, float weight, float entropy_weight,
                                       float entropy) {
#pragma omp simd
  for (int64_t j = 0; j < line.n; ++j) {
    const float log_p = below_largest<kHasBias>(line, j) - log_sum;
    const float p = exp_of(log_p);
    const float surprise = p > 0.f || p != p ? log_p + entropy : 0.f;  // 0 times infinity counts as 0
    x[j] = p * (weight - entropy_weight * surprise) * line.slope;
  }
}

TUNA_CLONES void entropy_gradient_row(float* x, const Line& line, float log_sum, float weight, float entropy_weight,
                                      float entropy) {
  if (line.bias) {
    entropy_gradient_body<true>(x, line, log_sum, weight, entropy_weight, entropy);
  } else {
    entropy_gradient_body<false>(x, line, log_sum, weight, entropy_weight, entropy);
  }
}

// As above, for a row of capped logits z (which are finite).
TUNA_CLONES void capped_gradient_row(float* x, int64_t n, float scale, float cap, float maximum, float log_sum,
                                     float weight, float entropy_weight, float entropy) {
  const float inverse = 1.f / cap;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float log_p = x[j] - maximum - log_sum;
    const float d = exp_of(log_p) * (weight - entropy_weight * (log_p + entropy));
    x[j] = d * slope_of_capped(x[j], scale, inverse);
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
  const float sign = is_capped || transform.scale >= 0.f ? 1.f : -1.f;
  const float slope = is_capped ? 1.f : transform.scale;
  const float* bias = is_capped ? nullptr : transform.bias;
  const float top = is_capped ? cap_row(x, n, transform.bias, transform.scale, transform.cap)
                              : max_row(x, n, bias, sign);
  const float before = state.maximum[row];
  const float maximum = top > before ? top : before;
  for (int64_t s = slots.offsets[row]; s < slots.offsets[row + 1]; ++s) {
    const int64_t column = slots.targets[s] - tile.first_column;
    if (column >= 0 && column < n) state.target_logit[s] = sign * (bias ? x[column] + bias[column] : x[column]);
  }
  // Only -infinity so far: leave the sums at 0 instead of computing -inf - -inf.
  const float reference = maximum == kLowest ? 0.f : maximum;
  const Line line{x, bias, n, slope, sign * reference};
  double sum = 0., weighted = 0.;
  if (state.rescale) {
    sum = is_capped ? capped_exponential_row(x, n, transform.scale, transform.cap, reference)
                    : exponential_row(x, line);
  } else if (state.weighted) {
    sum = sum_weighted_row(line, &weighted);
  } else {
    sum = sum_row(line);
  }
  const bool is_first = before == kLowest;
  const float fall = is_first ? kLowest : sign * slope * (before - reference);  // of the old largest z
  const float rescale = exp_of(fall);
  if (state.weighted) {
    const double moved = rescale > 0.f ? state.sum[row] * fall : 0.;
    state.weighted[row] = (state.weighted[row] + moved) * rescale + weighted;
  }
  state.maximum[row] = maximum;
  state.sum[row] = state.sum[row] * rescale + sum;
  if (state.rescale) state.rescale[row] = rescale;
}

void gradient_one_row(const Tile& tile, const Transform& transform, const RowSlots& slots,
                      const GradientInputs& inputs, bool is_capped, int64_t row) {
  float* x = tile.x + row * tile.stride;
  const int64_t n = tile.columns, first = slots.offsets[row], last = slots.offsets[row + 1];
  const float scale = transform.scale, cap = transform.cap;
  const float maximum = inputs.maximum[row], log_sum = inputs.log_sum[row], weight = inputs.softmax_weight[row];
  const float entropy_weight = inputs.entropy_weight ? inputs.entropy_weight[row] : 0.f;
  const float entropy = inputs.entropy_weight ? inputs.entropy[row] : 0.f;
  const auto column_of = [&](int64_t slot) {
    const int64_t column = slots.targets[slot] - tile.first_column;
    return column >= 0 && column < n ? column : -1;
  };
  if (cap > 0.f) {
    if (!is_capped) cap_row(x, n, transform.bias, scale, cap);
    static thread_local std::vector<float> slopes;  // dz/dx of the slots' targets, by the same code as for their row
    slopes.assign(static_cast<size_t>(last - first), 0.f);
    for (int64_t s = first; s < last; ++s) {
      if (column_of(s) >= 0) slopes[static_cast<size_t>(s - first)] = slope_of_capped(x[column_of(s)], scale, 1.f / cap);
    }
    capped_gradient_row(x, n, scale, cap, maximum, log_sum, weight, entropy_weight, entropy);
    for (int64_t s = first; s < last; ++s) {
      if (column_of(s) >= 0) x[column_of(s)] += inputs.slot_gradient[s] * slopes[static_cast<size_t>(s - first)];
    }
    return;
  }
  const Line line{x, transform.bias, n, scale, scale >= 0.f ? maximum : -maximum};
  if (inputs.entropy_weight) {
    entropy_gradient_row(x, line, log_sum, weight, entropy_weight, entropy);
  } else {
    softmax_gradient_row(x, line, log_sum, weight);
  }
  for (int64_t s = first; s < last; ++s) {
    if (column_of(s) >= 0) x[column_of(s)] += inputs.slot_gradient[s] * scale;
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
