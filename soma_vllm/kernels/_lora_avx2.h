// LoRA products with AVX2 and FMA, for `_lora_cpu.cpp`: see `_lora.h` for what a class like this one promises.
//
// bf16 is the upper half of a float32, so widening is a shift. Shrink: 16 neighbours of a row are taken apart into the
// 8 at even places and the 8 at odd ones, weights alike, which costs two cheap instructions and no shuffle; 4 ranks by
// up to 3 rows at once. Expand: 32 outputs of B are transposed in registers, widened, and kept in a buffer that stays in
// the first cache; then 32 outputs by up to 3 rows at once, whose sums are rounded once.

#pragma once

#include <immintrin.h>

#include "_lora.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace {
namespace avx2 {

constexpr int kLanes = 8;
constexpr int kOutTile = 32;

inline __m256i load(const bf16* v) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v)); }

inline __m256 even(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }

inline __m256 odd(__m256i v) { return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000)))); }

// To the nearest bf16, ties to even, still in the upper half. A NaN stays one: its lower half is 0, as all values are
// sums of products of widened bf16, so that the addition cannot carry into the sign.
inline __m256i rounded(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
}

// Sums of 4 vectors, in order.
inline __m128 reduce4(const __m256* v) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

// 16 products of ROWS rows by RANKS ranks, added to `sums`. Weights are `stride` apart.
template <int ROWS, int RANKS>
inline __attribute__((always_inline)) void multiply16(const bf16* a, int64_t stride, const bf16* const* x,
                                                      __m256 (*sums)[RANKS]) {
  __m256 halves[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) halves[r] = even(load(x[r]));
#pragma GCC unroll 8
  for (int j = 0; j < RANKS; ++j) {
    const __m256 weights = even(load(a + j * stride));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) sums[r][j] = _mm256_fmadd_ps(halves[r], weights, sums[r][j]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) halves[r] = odd(load(x[r]));
#pragma GCC unroll 8
  for (int j = 0; j < RANKS; ++j) {
    const __m256 weights = odd(load(a + j * stride));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) sums[r][j] = _mm256_fmadd_ps(halves[r], weights, sums[r][j]);
  }
}

// RANKS ranks of ROWS rows. With one row, memory decides: what lies behind the tile is fetched meanwhile, since the
// next slot's is there.
template <int ROWS, int RANKS>
void shrink_rows(const bf16* a, int64_t in, const bf16* const* x, float* const* low, int first, float scale) {
  __m256 sums[ROWS][RANKS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < RANKS; ++j) sums[r][j] = _mm256_setzero_ps();
  const bf16* xs[ROWS];
  int64_t k = 0;
  for (; k + 16 <= in; k += 16) {
    for (int r = 0; r < ROWS; ++r) xs[r] = x[r] + k;
    multiply16<ROWS, RANKS>(a + k, in, xs, sums);
    if (ROWS == 1) {
#pragma GCC unroll 4
      for (int line = 0; line < 4; ++line) _mm_prefetch(a + RANKS * (in + k) + 32 * line, _MM_HINT_T0);
    }
  }
  if (k < in) {
    alignas(32) bf16 rest_a[RANKS][16] = {}, rest_x[ROWS][16] = {};
    for (int j = 0; j < RANKS; ++j) std::memcpy(rest_a[j], a + j * in + k, (in - k) * sizeof(bf16));
    for (int r = 0; r < ROWS; ++r) std::memcpy(rest_x[r], x[r] + k, (in - k) * sizeof(bf16)), xs[r] = rest_x[r];
    multiply16<ROWS, RANKS>(rest_a[0], 16, xs, sums);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < RANKS; j += 4) {
      const __m256 four = _mm256_castps128_ps256(_mm_mul_ps(reduce4(sums[r] + j), _mm_set1_ps(scale)));
      _mm_storeu_ps(low[r] + first + j, _mm256_castps256_ps128(odd(rounded(four))));
    }
}

void shrink(const bf16* a, int64_t in, const bf16* const* x, float* const* low, int rows, float scale) {
  int r = 0;
  for (; r + 2 <= rows; r += r + 3 <= rows ? 3 : 2)
    for (int first = 0; first < kRankTile; first += 4) {
      if (r + 3 <= rows)
        shrink_rows<3, 4>(a + first * in, in, x + r, low + r, first, scale);
      else
        shrink_rows<2, 4>(a + first * in, in, x + r, low + r, first, scale);
    }
  if (r + 1 == rows) shrink_rows<1, 8>(a, in, x + r, low + r, 0, scale);
}

// 8 ranks of 8 outputs, transposed and widened: to[j * kOutTile + i] is rank j of output i.
inline void transpose8(const bf16* b, int64_t rank, float* to) {
  __m256i v[4];  // outputs i and i + 4
  for (int i = 0; i < 4; ++i)
    v[i] = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i * rank))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + (i + 4) * rank)), 1);
  const __m256i ab0 = _mm256_unpacklo_epi32(v[0], v[1]), ab1 = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i cd0 = _mm256_unpacklo_epi32(v[2], v[3]), cd1 = _mm256_unpackhi_epi32(v[2], v[3]);
  const __m256i pairs[4] = {_mm256_unpacklo_epi64(ab0, cd0), _mm256_unpackhi_epi64(ab0, cd0),
                            _mm256_unpacklo_epi64(ab1, cd1), _mm256_unpackhi_epi64(ab1, cd1)};
  for (int p = 0; p < 4; ++p) {
    _mm256_store_ps(to + 2 * p * kOutTile, even(pairs[p]));
    _mm256_store_ps(to + (2 * p + 1) * kOutTile, odd(pairs[p]));
  }
}

// packed[j][i] = B[i][j] for 32 outputs; those past `outs` are 0.
void pack(const bf16* b, int64_t rank, int outs, float* packed) {
  for (int i = 0; i < kOutTile; i += kLanes)
    for (int64_t j = 0; j < rank; j += kRankTile) {
      const bf16* tile = b + i * rank + j;
      _mm_prefetch(tile + 1024, _MM_HINT_T0);
      if (i + kLanes <= outs) {
        transpose8(tile, rank, packed + j * kOutTile + i);
      } else {
        bf16 rest[kLanes][kRankTile] = {};
        for (int o = i; o < outs; ++o) std::memcpy(rest[o - i], b + o * rank + j, sizeof rest[0]);
        transpose8(rest[0], kRankTile, packed + j * kOutTile + i);
      }
    }
}

// 32 outputs of ROWS rows.
template <int ROWS>
inline void expand_rows(const float* packed, int64_t rank, bf16* const* y, const float* const* low) {
  constexpr int kVectors = kOutTile / kLanes;
  __m256 sums[ROWS][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = even(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(y[r] + v * kLanes))));
  for (int64_t j = 0; j < rank; ++j) {
    __m256 lows[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) lows[r] = _mm256_broadcast_ss(low[r] + j);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __m256 weights = _mm256_load_ps(packed + j * kOutTile + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[r][v] = _mm256_fmadd_ps(lows[r], weights, sums[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2) {
      const __m256i first = _mm256_srli_epi32(rounded(sums[r][v]), 16);
      const __m256i second = _mm256_srli_epi32(rounded(sums[r][v + 1]), 16);
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0b11011000);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y[r] + v * kLanes), both);
    }
}

void expand_tile(const float* packed, int64_t rank, bf16* const* y, const float* const* low, int rows) {
  int r = 0;
  for (; r + 3 <= rows; r += 3) expand_rows<3>(packed, rank, y + r, low + r);
  if (r + 2 == rows) expand_rows<2>(packed, rank, y + r, low + r);
  if (r + 1 == rows) expand_rows<1>(packed, rank, y + r, low + r);
}

void expand(const bf16* b, int64_t rank, int64_t outs, bf16* const* y, const float* const* low, int rows) {
  alignas(32) float packed[kMostRanks * kOutTile];
  bf16* tile[kMostBlockRows];
  int64_t o = 0;
  for (; o + kOutTile <= outs; o += kOutTile) {
    pack(b + o * rank, rank, kOutTile, packed);
    for (int r = 0; r < rows; ++r) tile[r] = y[r] + o;
    expand_tile(packed, rank, tile, low, rows);
  }
  if (o == outs) return;
  bf16 rest[kMostBlockRows][kOutTile] = {};
  const size_t bytes = (outs - o) * sizeof(bf16);
  pack(b + o * rank, rank, static_cast<int>(outs - o), packed);
  for (int r = 0; r < rows; ++r) std::memcpy(rest[r], y[r] + o, bytes), tile[r] = rest[r];
  expand_tile(packed, rank, tile, low, rows);
  for (int r = 0; r < rows; ++r) std::memcpy(y[r] + o, rest[r], bytes);
}

}  // namespace avx2
}  // namespace

#pragma GCC pop_options

namespace {

struct Avx2 {
  using Low = float;
  static constexpr int kBlockRows = 12;
  static constexpr auto shrink = avx2::shrink;
  static constexpr auto expand = avx2::expand;

  static bool runs() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
};

}  // namespace
