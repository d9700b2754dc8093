// See pairs.h. x86-64 with AVX512_BF16; whoever calls asks has_pairs() first.
#include "pairs.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "vector_math.h"

#if TUNA_HAS_X86_SETS
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside the header, by gcc 12
#include <immintrin.h>
#define TUNA_ISA avx512_pairs
#define TUNA_LANES 16
#define TUNA_PAIRS 1
#include "matmul.h"

namespace tuna {
namespace {

constexpr int64_t kPairsAtOnce = 512;  // of a panel: kept in the second-level cache (128 KiB) while the left one passes

TUNA_INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }

// Up to 16 numbers as bfloat16, the rest 0.
template <typename T>
TUNA_INLINE __m256i load_bfloat16(const T* from, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(count), from));
  } else {
    return _mm256_maskz_loadu_epi16(first(count), from);
  }
}

template <typename T>
TUNA_INLINE const T* row_of(const PairSource& source, int64_t row) {
  return static_cast<const T*>(source.data) + (source.index ? source.index[row] : row) * source.stride;
}

template <typename T>
void lines_of(uint32_t* out, const PairSource& source, int threads) {
  const int64_t pairs = (source.columns + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < source.rows; ++i) {
    const T* from = row_of<T>(source, i);
    uint32_t* to = out + i * pairs;
    for (int64_t k = 0; k < pairs; k += 8) {
      const __m256i numbers = load_bfloat16(from + 2 * k, source.columns - 2 * k);
      _mm256_mask_storeu_epi32(to + k, static_cast<__mmask8>(first(pairs - k)), numbers);
    }
  }
}

template <typename T>
void panels_across(uint32_t* out, const PairSource& source, int64_t width, int threads) {
  const int64_t pairs = (source.rows + 1) / 2, panels = (source.columns + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t k = 0; k < pairs; ++k) {
      const bool has_second = 2 * k + 1 < source.rows;
      const T* low = row_of<T>(source, 2 * k) + panel * width;
      const T* high = has_second ? row_of<T>(source, 2 * k + 1) + panel * width : low;
      uint32_t* to = out + (panel * pairs + k) * width;
      for (int64_t m = 0; m < width; m += 16) {
        const int64_t left = std::max<int64_t>(0, source.columns - panel * width - m);
        const __m512i lower = _mm512_cvtepu16_epi32(load_bfloat16(low + m, left));
        const __m512i upper = _mm512_cvtepu16_epi32(load_bfloat16(high + m, has_second ? left : 0));
        _mm512_storeu_si512(to + m, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
      }
    }
  }
}

// 16 vectors become their transpose, in three steps of exchanging ever larger parts.
TUNA_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 a + b] holds, in its 128-bit part c, column 4 c + b of rows 4 a to 4 a + 3.
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const __m512i even_low = _mm512_shuffle_i32x4(r[b], r[4 + b], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(r[b], r[4 + b], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0xdd);
    t[b] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[4 + b] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[8 + b] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[12 + b] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

const float* as_floats(const uint32_t* pairs) { return reinterpret_cast<const float*>(pairs); }

}  // namespace

bool has_pairs() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
}

void pack_lines(uint32_t* out, const PairSource& along, int threads) {
  if (along.element == Element::kFloat32) return lines_of<float>(out, along, threads);
  lines_of<uint16_t>(out, along, threads);
}

void pack_panels_across(uint32_t* out, const PairSource& across, int64_t width, int threads) {
  if (across.element == Element::kFloat32) return panels_across<float>(out, across, width, threads);
  panels_across<uint16_t>(out, across, width, threads);
}

void pack_panels_along(uint32_t* out, const PairSource& along, int threads) {
  const int64_t pairs = (along.columns + 1) / 2, blocks = (along.rows + 15) / 16;
  const int64_t blocks_of_panel = kRightPanel / 16;
  const int64_t padded = (blocks + blocks_of_panel - 1) / blocks_of_panel * blocks_of_panel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < padded; ++block) {
    uint32_t* to = out + block / blocks_of_panel * pairs * kRightPanel + block % blocks_of_panel * 16;
    for (int64_t k = 0; k < pairs; k += 16) {
      __m512i r[16];
      const int64_t numbers = along.columns - 2 * k;
      const __mmask32 mask = numbers >= 32 ? ~__mmask32{0} : (__mmask32{1} << numbers) - 1;
      for (int i = 0; i < 16; ++i) {
        const int64_t line = block * 16 + i;
        r[i] = line < along.rows ? _mm512_maskz_loadu_epi16(mask, row_of<uint16_t>(along, line) + 2 * k)
                                 : _mm512_setzero_si512();
      }
      transpose(r);
      const int64_t count = std::min<int64_t>(16, pairs - k);
      for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(to + (k + i) * kRightPanel, r[i]);
    }
  }
}

void multiply_pairs(const PairProduct& p, int threads) {
  const int64_t panels = (p.columns + kRightPanel - 1) / kRightPanel;
  const int64_t chunks = (p.rows + kLeftPanel - 1) / kLeftPanel;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float edge[kLeftPanel * kRightPanel];
    for (int64_t k = 0; k < p.pairs || k == 0; k += kPairsAtOnce) {
      const int64_t inner = std::min(kPairsAtOnce, p.pairs - k);
      const bool add = p.add || k > 0;
#pragma omp for schedule(static) collapse(2)
      for (int64_t panel = 0; panel < panels; ++panel) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const int64_t row = chunk * kLeftPanel, column = panel * kRightPanel;
          const int64_t rows = std::min(kLeftPanel, p.rows - row), columns = std::min(kRightPanel, p.columns - column);
          float* c = p.c + row * p.stride + column;
          const bool is_edge = columns % 16 != 0;
          avx512_pairs::Product product{};
          product.c = is_edge ? edge : c;
          product.c_row = is_edge ? kRightPanel : p.stride;
          product.a = as_floats(p.left + row * p.pairs + (p.left_in_panels ? k * kLeftPanel : k));
          product.a_row = p.left_in_panels ? 1 : p.pairs;
          product.a_column = p.left_in_panels ? kLeftPanel : 1;
          product.b = as_floats(p.right + (panel * p.pairs + k) * kRightPanel);
          product.b_row = kRightPanel;
          product.rows = rows;
          product.columns = (columns + 15) / 16 * 16;
          product.inner = inner;
          if (is_edge || !add) {
            avx512_pairs::multiply<false>(product);
          } else {
            avx512_pairs::multiply<true>(product);
          }
          for (int64_t i = 0; is_edge && i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) {
              float& to = c[i * p.stride + j];
              to = (add ? to : 0.f) + edge[i * kRightPanel + j];
            }
          }
        }
      }
    }
  }
}

}  // namespace tuna

#else

namespace tuna {

bool has_pairs() { return false; }
void pack_lines(uint32_t*, const PairSource&, int) { throw std::logic_error("pairs.h: not on this processor"); }
void pack_panels_along(uint32_t*, const PairSource&, int) { throw std::logic_error("pairs.h: not on this processor"); }
void pack_panels_across(uint32_t*, const PairSource&, int64_t, int) {
  throw std::logic_error("pairs.h: not on this processor");
}
void multiply_pairs(const PairProduct&, int) { throw std::logic_error("pairs.h: not on this processor"); }

}  // namespace tuna
#endif
