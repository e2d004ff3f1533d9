// LoRA products with AVX-512 bf16, for `_lora_cpu.cpp`: see `_lora.h` for what a class like this one promises.
//
// Shrink: 8 ranks by up to 3 rows at once, along contiguous memory. Expand: 16 outputs by 8 ranks of B are transposed
// in registers into pairs of ranks, then every row of the block costs 4 instructions per 16 outputs.

#pragma once

#include <immintrin.h>

#include "_lora.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")

namespace {
namespace avx512 {

inline __m512bh pairs(__m512i v) { return (__m512bh)v; }

// Sums of 8 vectors, in order.
inline __m256 reduce8(const __m512* v) {
  __m256 h[8];
  for (int i = 0; i < 8; ++i)
    h[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  const __m256 p = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
  const __m256 q = _mm256_hadd_ps(_mm256_hadd_ps(h[4], h[5]), _mm256_hadd_ps(h[6], h[7]));
  const __m128 lower = _mm_add_ps(_mm256_castps256_ps128(p), _mm256_extractf128_ps(p, 1));
  const __m128 upper = _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1));
  return _mm256_set_m128(upper, lower);
}

template <int ROWS>
void shrink_rows(const bf16* a, int64_t in, const bf16* const* x, bf16* const* low, __m256 scale) {
  __m512 sums[ROWS][kRankTile];
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < kRankTile; ++j) sums[r][j] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 32 <= in; k += 32) {
    __m512bh xs[ROWS];
    for (int r = 0; r < ROWS; ++r) xs[r] = pairs(_mm512_loadu_si512(x[r] + k));
#pragma GCC unroll 8
    for (int j = 0; j < kRankTile; ++j) {
      const __m512bh weights = pairs(_mm512_loadu_si512(a + j * in + k));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], xs[r], weights);
    }
  }
  if (k < in) {
    const __mmask32 rest = (__mmask32)((1ull << (in - k)) - 1);
    for (int j = 0; j < kRankTile; ++j) {
      const __m512bh weights = pairs(_mm512_maskz_loadu_epi16(rest, a + j * in + k));
      for (int r = 0; r < ROWS; ++r)
        sums[r][j] = _mm512_dpbf16_ps(sums[r][j], pairs(_mm512_maskz_loadu_epi16(rest, x[r] + k)), weights);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const __m128bh rounded = _mm256_cvtneps_pbh(_mm256_mul_ps(reduce8(sums[r]), scale));
    _mm_storeu_si128((__m128i*)low[r], (__m128i)rounded);
  }
}

void shrink(const bf16* a, const bf16*, int64_t in, const bf16* const* x, bf16* const* low, int rows, float scale) {
  const __m256 scales = _mm256_set1_ps(scale);
  int r = 0;
  for (; r + 3 <= rows; r += 3) shrink_rows<3>(a, in, x + r, low + r, scales);
  if (r + 2 == rows) shrink_rows<2>(a, in, x + r, low + r, scales);
  if (r + 1 == rows) shrink_rows<1>(a, in, x + r, low + r, scales);
}

// 8 ranks of up to 16 outputs as four vectors, one per pair of ranks; lane i holds output i.
inline void load_b(const bf16* b, int64_t rank, int count, __m512bh* out) {
  __m512i v[4];
  if (rank == kRankTile && count == 16) {
    for (int j = 0; j < 4; ++j) v[j] = _mm512_loadu_si512(b + j * 32);
  } else {
    for (int j = 0; j < 4; ++j) {
      alignas(64) bf16 four[32] = {};
      for (int i = 0; i < 4 && 4 * j + i < count; ++i) std::memcpy(four + 8 * i, b + (4 * j + i) * rank, 16);
      v[j] = _mm512_load_si512(four);
    }
  }
  const __m512i ab0 = _mm512_unpacklo_epi32(v[0], v[1]), ab1 = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i cd0 = _mm512_unpacklo_epi32(v[2], v[3]), cd1 = _mm512_unpackhi_epi32(v[2], v[3]);
  // Lane L of vector j held output 4j + L; after the transpose it is at 4L + j.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  out[0] = pairs(_mm512_permutexvar_epi32(order, _mm512_unpacklo_epi64(ab0, cd0)));
  out[1] = pairs(_mm512_permutexvar_epi32(order, _mm512_unpackhi_epi64(ab0, cd0)));
  out[2] = pairs(_mm512_permutexvar_epi32(order, _mm512_unpacklo_epi64(ab1, cd1)));
  out[3] = pairs(_mm512_permutexvar_epi32(order, _mm512_unpackhi_epi64(ab1, cd1)));
}

inline __m512 widened(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

template <int ROWS>
void expand_rows(const bf16* b, int64_t rank, int64_t outs, bf16* const* y, const bf16* const* low) {
  const int64_t tiles = rank / kRankTile;
  for (int64_t o = 0; o < outs; o += 16) {
    const int count = static_cast<int>(std::min<int64_t>(16, outs - o));
    const __mmask16 mask = (__mmask16)((1u << count) - 1);
    __m512 sums[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sums[r] = widened(_mm256_maskz_loadu_epi16(mask, y[r] + o));
    for (int64_t tile = 0; tile < tiles; ++tile) {
      __m512bh weights[4];
      load_b(b + o * rank + tile * kRankTile, rank, count, weights);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          int32_t pair;
          std::memcpy(&pair, low[r] + tile * kRankTile + 2 * p, sizeof pair);
          sums[r] = _mm512_dpbf16_ps(sums[r], pairs(_mm512_set1_epi32(pair)), weights[p]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      _mm256_mask_storeu_epi16(y[r] + o, mask, (__m256i)_mm512_cvtneps_pbh(sums[r]));
  }
}

void expand(const bf16* b, int64_t rank, int64_t outs, bf16* const* y, const bf16* const* low, int rows) {
  int r = 0;
  if (rows == 8) expand_rows<8>(b, rank, outs, y, low), r = 8;
  if (rows & 4) expand_rows<4>(b, rank, outs, y + r, low + r), r += 4;
  if (rows & 2) expand_rows<2>(b, rank, outs, y + r, low + r), r += 2;
  if (rows & 1) expand_rows<1>(b, rank, outs, y + r, low + r);
}

}  // namespace avx512
}  // namespace

#pragma GCC pop_options

namespace {

struct Avx512Bf16 {
  using Low = bf16;
  static constexpr auto shrink = avx512::shrink;
  static constexpr auto expand = avx512::expand;

  static bool runs() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
  }
};

}  // namespace
