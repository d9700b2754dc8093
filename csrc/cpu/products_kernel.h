// The arithmetic of products.h, compiled once per instruction set (see matmul.h). With TUNA_PAIRS a packed element is a
// pair of bfloat16 numbers that are neighbours along `inner`, an odd last one beside 0.
//
// The sum is cut into parts of kInner elements. For each, a thread packs a panel of the right operand once, in the order
// in which register blocks read it, and multiplies it with one chunk of the left operand after the other.
#pragma once

#include <algorithm>
#include <cstring>

#include "matmul.h"
#include "products.h"

namespace tuna::TUNA_ISA {

constexpr int64_t kBlock = kBlockVectors * kLanes;  // columns of a register block
constexpr int64_t kPanel = 64;                      // columns for which a chunk of the left operand is read once
static_assert(kPanel % kBlock == 0);
constexpr int64_t kRun = 128;  // terms summed in a register: a long sum of short ones has smaller rounding errors
#if defined(TUNA_PAIRS)
constexpr int64_t kUnit = 2;  // numbers in an element
#else
constexpr int64_t kUnit = 1;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
TUNA_INLINE const T* at(const Matrix& m, int64_t line, int64_t place) {
  return static_cast<const T*>(m.data) + line * m.stride + place;
}

#if defined(TUNA_PAIRS)
TUNA_INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }

// Up to 16 numbers as bfloat16, the rest 0.
TUNA_INLINE __m256i load_bfloat16(const float* from, int64_t count) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(count), from));
}
TUNA_INLINE __m256i load_bfloat16(const BFloat16* from, int64_t count) {
  return _mm256_maskz_loadu_epi16(first(count), from);
}

// Up to kLanes elements from neighbouring numbers.
template <typename T>
TUNA_INLINE Vector load_elements(const T* from, int64_t numbers) {
  const __m256i low = load_bfloat16(from, std::min<int64_t>(16, numbers));
  const __m256i high = numbers > 16 ? load_bfloat16(from + 16, std::min<int64_t>(16, numbers - 16)) : __m256i{};
  return (Vector)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// out[j] = the element of low[j] and high[j]; zeros after n.
template <typename T>
TUNA_INLINE void join_lines(float* out, const T* low, const T* high, int64_t n, int64_t width) {
  for (int64_t j = 0; j < width; j += 16) {
    const int64_t count = std::max<int64_t>(0, n - j);
    const __m512i lower = _mm512_cvtepu16_epi32(load_bfloat16(low + j, count));
    const __m512i upper = _mm512_cvtepu16_epi32(load_bfloat16(high ? high + j : low + j, high ? count : 0));
    _mm512_storeu_si512(out + j, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
  }
}
#else
TUNA_INLINE float number(float x) { return x; }
TUNA_INLINE float number(BFloat16 x) { return from_bfloat16(x.bits); }
TUNA_INLINE float number(Float16 x) { return from_float16(x.bits); }

template <typename T>
TUNA_INLINE Vector load_elements(const T* from, int64_t numbers) {
  float x[kLanes] = {};
  if (numbers >= kLanes) {
    for (int j = 0; j < kLanes; ++j) x[j] = number(from[j]);
  } else {
    for (int64_t j = 0; j < numbers; ++j) x[j] = number(from[j]);
  }
  return load(x);
}

template <typename T>
TUNA_INLINE void join_lines(float* out, const T* line, const T*, int64_t n, int64_t width) {
  n = std::min(n, width);
  for (int64_t j = 0; j < n; ++j) out[j] = number(line[j]);
  for (int64_t j = n; j < width; ++j) out[j] = 0.f;
}
#endif

// kLanes vectors become their transpose, by exchanging ever larger parts between them.
template <int kStep>
TUNA_INLINE void exchange(Vector (&r)[kLanes]) {
  typedef int32_t Places __attribute__((vector_size(4 * TUNA_LANES)));
  Places low, high;
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l & kStep ? kLanes + l - kStep : l;
    high[l] = l & kStep ? kLanes + l : l + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vector a = r[i], b = r[i + kStep];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

TUNA_INLINE void transpose(Vector (&r)[kLanes]) {
  exchange<1>(r);
  exchange<2>(r);
  exchange<4>(r);
  if constexpr (kLanes > 8) exchange<8>(r);
}

// Elements [start, start + count) of the sum, `lines` of the operand side by side: out[k * width + line].
struct Part {
  int64_t start, count, numbers;  // numbers: of the whole sum
};

// The source runs along the lines of the packed operand: row k of it holds number k of each.
template <typename T>
TUNA_INLINE void pack_across(float* out, int64_t width, const Matrix& m, const Part& part, int64_t line, int64_t lines) {
  for (int64_t k = 0; k < part.count; ++k) {
    const int64_t place = (part.start + k) * kUnit;
    const T* high = kUnit == 2 && place + 1 < part.numbers ? at<T>(m, place + 1, line) : nullptr;
    join_lines(out + k * width, at<T>(m, place, line), high, lines, width);
  }
}

// The source runs along the sum.
template <typename T>
TUNA_INLINE void pack_along(float* out, int64_t width, const Matrix& m, const Part& part, int64_t line, int64_t lines) {
  for (int64_t j = 0; j < width; j += kLanes) {
    for (int64_t k = 0; k < part.count; k += kLanes) {
      const int64_t place = (part.start + k) * kUnit, count = std::min<int64_t>(kLanes, part.count - k);
      Vector r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const bool is_there = j + i < lines;
        r[i] = is_there ? load_elements(at<T>(m, line + j + i, place), std::min(part.numbers - place, count * kUnit))
                        : broadcast(0.f);
      }
      transpose(r);
      for (int64_t i = 0; i < count; ++i) std::memcpy(out + (k + i) * width + j, &r[i], sizeof(Vector));
    }
  }
}

// [block][k][kBlock]
template <typename T>
static void pack_panel(float* out, const Matrix& m, const Part& part, int64_t column, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kBlock, out += part.count * kBlock) {
    if (m.transposed) {
      pack_along<T>(out, kBlock, m, part, column + j, std::min(kBlock, columns - j));
    } else {
      pack_across<T>(out, kBlock, m, part, column + j, std::min(kBlock, columns - j));
    }
  }
}

static void pack_right(float* out, const Matrix& m, const Part& part, int64_t column, int64_t columns) {
  if (m.element == Element::kBFloat16) return pack_panel<BFloat16>(out, m, part, column, columns);
#if !defined(TUNA_PAIRS)
  if (m.element == Element::kFloat16) return pack_panel<Float16>(out, m, part, column, columns);
  pack_panel<float>(out, m, part, column, columns);
#endif
}

// A left operand as the register block reads it: where entry (row, k) of a part lies.
struct Left {
  const float* data;
  int64_t row, k;
};

// Whether the left operand can be read where it is.
static bool is_direct(const MatrixProduct& p) {
  if (p.left.transposed) return false;
  return kUnit == 1 || (p.left.element == Element::kBFloat16 && p.left.stride % 2 == 0 && p.inner % 2 == 0);
}

// Shared out over the threads that call it. Packed to [chunk][k][kChunk], or, where it runs along the sum, [row][k].
template <typename T>
static void pack_left(float* scratch, const MatrixProduct& p, const Part& part) {
  if (p.left.transposed) {
    constexpr int64_t kLines = 16;  // of a task
    const int64_t chunks = (p.rows + kChunk - 1) / kChunk, tasks = (part.count + kLines - 1) / kLines;
#pragma omp for schedule(static) collapse(2)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t task = 0; task < tasks; ++task) {
        const Part some{part.start + task * kLines, std::min(kLines, part.count - task * kLines), part.numbers};
        float* out = scratch + (chunk * part.count + task * kLines) * kChunk;
        pack_across<T>(out, kChunk, p.left, some, chunk * kChunk, std::min(kChunk, p.rows - chunk * kChunk));
      }
    }
  } else {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t k = 0; k < part.count; k += kLanes) {
        const int64_t place = (part.start + k) * kUnit, count = std::min<int64_t>(kLanes, part.count - k);
        const Vector x = load_elements(at<T>(p.left, row, place), std::min(part.numbers - place, count * kUnit));
        std::memcpy(scratch + row * part.count + k, &x, static_cast<size_t>(count) * sizeof(float));
      }
    }
  }
}

static Left left_of(const MatrixProduct& p, const float* scratch, const Part& part, int64_t row) {
  if (is_direct(p)) {
    const int64_t stride = p.left.stride / kUnit;
    return {static_cast<const float*>(p.left.data) + row * stride + part.start, stride, 1};
  }
  if (p.left.transposed) return {scratch + row * part.count, 1, kChunk};  // row is the first of a chunk
  return {scratch + row * part.count, part.count, 1};
}

// One chunk of rows times one block of a panel.
static void multiply_block(const MatrixProduct& p, const Left& left, const float* right, int64_t row, int64_t column,
                           int64_t inner, bool add) {
  alignas(64) float edge[kChunk * kBlock];
  const int64_t columns = std::min(kBlock, p.columns - column);
  const bool is_edge = columns % kLanes != 0;  // whole vectors would write beyond C
  float* c = p.c + row * p.stride + column;
  Product block{};
  block.c = is_edge ? edge : c;
  block.c_row = is_edge ? kBlock : p.stride;
  block.a = left.data;
  block.a_row = left.row;
  block.a_column = left.k;
  block.b = right;
  block.b_row = kBlock;
  block.rows = std::min(kChunk, p.rows - row);
  block.columns = (columns + kLanes - 1) / kLanes * kLanes;
  for (int64_t k = 0; k < inner || k == 0; k += kRun) {
    block.inner = std::min(kRun, inner - k);
    if (k > 0 || (add && !is_edge)) {
      multiply<true>(block);
    } else {
      multiply<false>(block);
    }
    block.a += kRun * left.k;
    block.b += kRun * kBlock;
  }
  for (int64_t i = 0; is_edge && i < block.rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      float& to = c[i * p.stride + j];
      to = (add ? to : 0.f) + edge[i * kBlock + j];
    }
  }
}

void multiply_matrices(const MatrixProduct& p, float* scratch, int threads) {
  const int64_t units = (p.inner + kUnit - 1) / kUnit;
  const int64_t panels = (p.columns + kPanel - 1) / kPanel, chunks = (p.rows + kChunk - 1) / kChunk;
  // Parts of equal size: all of them long.
  const int64_t parts = std::max<int64_t>(1, (units + kInner - 1) / kInner);
  const int64_t step = ((units + parts - 1) / parts + 15) / 16 * 16;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float panel[kInner * kPanel];
    for (int64_t index = 0; index < parts; ++index) {
      const Part part{index * step, std::min(step, units - index * step), p.inner};
      if (!is_direct(p)) {
        if (p.left.element == Element::kFloat32) pack_left<float>(scratch, p, part);
#if defined(TUNA_PAIRS)
        if (p.left.element == Element::kBFloat16) pack_left<BFloat16>(scratch, p, part);
#endif
      }
      int64_t packed = -1;
#pragma omp for schedule(static) collapse(2)
      for (int64_t column = 0; column < panels; ++column) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          if (packed != column) pack_right(panel, p.right, part, column * kPanel, std::min(kPanel, p.columns - column * kPanel));
          packed = column;
          const Left left = left_of(p, scratch, part, chunk * kChunk);
          const int64_t first = column * kPanel, last = std::min(first + kPanel, p.columns);
          for (int64_t j = first; j < last; j += kBlock) {
            const float* right = panel + (j - first) * part.count;
            multiply_block(p, left, right, chunk * kChunk, j, part.count, p.add || index > 0);
          }
        }
      }
    }
  }
}

}  // namespace tuna::TUNA_ISA
