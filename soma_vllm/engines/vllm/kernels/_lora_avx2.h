// LoRA products with AVX2 and FMA, for `_lora_cpu.cpp`: see `_lora.h` for what a class like this one promises.
//
// bf16 is the upper half of a float32, so widening is a shift. 16 neighbours are always taken apart into the 8 at even
// places and the 8 at odd ones, and put together in the same way: two cheap instructions, no shuffle.
// Shrink: up to 4 rows at once, by as many ranks as make 8 sums, along contiguous memory. Expand: 16 outputs of B are
// transposed in registers, widened and kept in a buffer that stays in the first cache, for up to 4 rows at once.
// With a row for each slot, memory decides: A's next tile and B's next outputs are fetched meanwhile.

#pragma once

#include <immintrin.h>

#include "_lora.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace {
namespace avx2 {

constexpr int kLanes = 8;
constexpr int kOutTile = 16;
constexpr int kLine = 32;           // bf16 of one line of the caches
constexpr int64_t kBAhead = 2048;  // how far B is fetched ahead

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

// Sums of 8 vectors, in order.
inline __m256 reduce8(const __m256* v) {
  const __m256 p = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 q = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31));
}

// 16 products of ROWS rows by RANKS ranks, added to sums[r * RANKS + j]. Weights are `stride` apart.
template <int ROWS, int RANKS>
inline void multiply16(const bf16* a, int64_t stride, const bf16* const* x, __m256* sums) {
  __m256 halves[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) halves[r] = even(load(x[r]));
#pragma GCC unroll 8
  for (int j = 0; j < RANKS; ++j) {
    const __m256 weights = even(load(a + j * stride));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) sums[r * RANKS + j] = _mm256_fmadd_ps(halves[r], weights, sums[r * RANKS + j]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) halves[r] = odd(load(x[r]));
#pragma GCC unroll 8
  for (int j = 0; j < RANKS; ++j) {
    const __m256 weights = odd(load(a + j * stride));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) sums[r * RANKS + j] = _mm256_fmadd_ps(halves[r], weights, sums[r * RANKS + j]);
  }
}

// RANKS ranks of ROWS rows: low[r][0:RANKS]. As many values of `next` are fetched.
template <int ROWS, int RANKS>
inline void shrink_ranks(const bf16* a, const bf16* next, int64_t in, const bf16* const* x, float* const* low,
                         int first, float scale) {
  static_assert(ROWS * RANKS <= 8);
  __m256 sums[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sums[i] = _mm256_setzero_ps();
  const bf16* xs[ROWS];
  int64_t k = 0;
  for (; k + 16 <= in; k += 16) {
    for (int r = 0; r < ROWS; ++r) xs[r] = x[r] + k;
    multiply16<ROWS, RANKS>(a + k, in, xs, sums);
#pragma GCC unroll 4
    for (int line = 0; line < RANKS / 2; ++line) _mm_prefetch(next + RANKS * k + line * kLine, _MM_HINT_T0);
  }
  if (k < in) {
    alignas(32) bf16 rest_a[RANKS][16] = {}, rest_x[ROWS][16] = {};
    for (int j = 0; j < RANKS; ++j) std::memcpy(rest_a[j], a + j * in + k, (in - k) * sizeof(bf16));
    for (int r = 0; r < ROWS; ++r) std::memcpy(rest_x[r], x[r] + k, (in - k) * sizeof(bf16)), xs[r] = rest_x[r];
    multiply16<ROWS, RANKS>(rest_a[0], 16, xs, sums);
  }
  alignas(32) float values[8];
  _mm256_store_ps(values, odd(rounded(_mm256_mul_ps(reduce8(sums), _mm256_set1_ps(scale)))));
  for (int r = 0; r < ROWS; ++r) std::memcpy(low[r] + first, values + r * RANKS, RANKS * sizeof(float));
}

// 8 ranks of ROWS rows.
template <int ROWS>
void shrink_rows(const bf16* a, const bf16* next, int64_t in, const bf16* const* x, float* const* low, float scale) {
  constexpr int kRanks = ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;
  for (int first = 0; first < kRankTile; first += kRanks)
    shrink_ranks<ROWS, kRanks>(a + first * in, next + first * in, in, x, low, first, scale);
}

void shrink(const bf16* a, const bf16* next, int64_t in, const bf16* const* x, float* const* low, int rows,
            float scale) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) shrink_rows<4>(a, next, in, x + r, low + r, scale);
  if (rows - r == 3) shrink_rows<3>(a, next, in, x + r, low + r, scale);
  if (rows - r == 2) shrink_rows<2>(a, next, in, x + r, low + r, scale);
  if (rows - r == 1) shrink_rows<1>(a, next, in, x + r, low + r, scale);
}

// 8 ranks of 8 outputs, transposed and widened: to[j * kOutTile + i] is rank j of output i, which are `stride` apart.
inline void transpose8(const bf16* b, int64_t stride, float* to) {
  const auto of = [b, stride](int output) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + output * stride));
  };
  __m256i v[4];  // outputs i and i + 4
  for (int i = 0; i < 4; ++i) v[i] = _mm256_set_m128i(of(i + 4), of(i));
  const __m256i ab0 = _mm256_unpacklo_epi32(v[0], v[1]), ab1 = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i cd0 = _mm256_unpacklo_epi32(v[2], v[3]), cd1 = _mm256_unpackhi_epi32(v[2], v[3]);
  const __m256i pairs[4] = {_mm256_unpacklo_epi64(ab0, cd0), _mm256_unpackhi_epi64(ab0, cd0),
                            _mm256_unpacklo_epi64(ab1, cd1), _mm256_unpackhi_epi64(ab1, cd1)};
  for (int p = 0; p < 4; ++p) {
    _mm256_store_ps(to + 2 * p * kOutTile, even(pairs[p]));
    _mm256_store_ps(to + (2 * p + 1) * kOutTile, odd(pairs[p]));
  }
}

// 16 outputs of B, the 8 at even places before the 8 at odd ones: packed[j] are their weights of rank j.
inline void pack(const bf16* b, int64_t rank, float* packed) {
  for (int64_t j = 0; j < rank; j += kRankTile) {
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) _mm_prefetch(b + kBAhead + j * kOutTile + line * kLine, _MM_HINT_T0);
    transpose8(b + j, 2 * rank, packed + j * kOutTile);
    transpose8(b + rank + j, 2 * rank, packed + j * kOutTile + kLanes);
  }
}

// 16 outputs of ROWS rows.
template <int ROWS>
inline void expand_rows(const float* packed, int64_t rank, bf16* const* y, int64_t o, const float* const* low) {
  __m256 evens[ROWS], odds[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) evens[r] = even(load(y[r] + o)), odds[r] = odd(load(y[r] + o));
#pragma GCC unroll 8
  for (int64_t j = 0; j < rank; ++j) {
    const __m256 even_weights = _mm256_load_ps(packed + j * kOutTile);
    const __m256 odd_weights = _mm256_load_ps(packed + j * kOutTile + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m256 value = _mm256_broadcast_ss(low[r] + j);
      evens[r] = _mm256_fmadd_ps(value, even_weights, evens[r]);
      odds[r] = _mm256_fmadd_ps(value, odd_weights, odds[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    const __m256i lower = _mm256_srli_epi32(rounded(evens[r]), 16);
    const __m256i both = _mm256_blend_epi16(lower, rounded(odds[r]), 0b10101010);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y[r] + o), both);
  }
}

inline void expand_tile(const float* packed, int64_t rank, bf16* const* y, int64_t o, const float* const* low, int rows) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) expand_rows<4>(packed, rank, y + r, o, low + r);
  if (rows - r == 3) expand_rows<3>(packed, rank, y + r, o, low + r);
  if (rows - r == 2) expand_rows<2>(packed, rank, y + r, o, low + r);
  if (rows - r == 1) expand_rows<1>(packed, rank, y + r, o, low + r);
}

void expand(const bf16* b, int64_t rank, int64_t outs, bf16* const* y, const float* const* low, int rows) {
  alignas(32) float packed[kMostRanks * kOutTile];
  int64_t o = 0;
  for (; o + kOutTile <= outs; o += kOutTile) {
    pack(b + o * rank, rank, packed);
    expand_tile(packed, rank, y, o, low, rows);
  }
  if (o == outs) return;
  bf16 rest_b[kMostRanks * kOutTile], rest_y[kBlockRows][kOutTile] = {}, *rest[kBlockRows];
  const size_t bytes = (outs - o) * sizeof(bf16);
  std::memset(rest_b, 0, rank * sizeof(rest_b[0]) * kOutTile);
  std::memcpy(rest_b, b + o * rank, rank * bytes);
  for (int r = 0; r < rows; ++r) std::memcpy(rest_y[r], y[r] + o, bytes), rest[r] = rest_y[r];
  pack(rest_b, rank, packed);
  expand_tile(packed, rank, rest, 0, low, rows);
  for (int r = 0; r < rows; ++r) std::memcpy(y[r] + o, rest_y[r], bytes);
}

}  // namespace avx2
}  // namespace

#pragma GCC pop_options

namespace {

struct Avx2 {
  using Low = float;
  static constexpr auto shrink = avx2::shrink;
  static constexpr auto expand = avx2::expand;

  static bool runs() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
};

}  // namespace
