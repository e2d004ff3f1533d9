// The nouns of `_lora_cpu.cpp`: which rows are whose, and one layer's stacked weights.
//
// Guarantees: nothing here needs more than plain x86-64. An instruction set is a class with
//   Low        what a low-rank value is kept as between the halves
//   runs()     whether this CPU has it
//   shrink()   low[r][0:8] = bf16(scale * A[0:8] . x[r]) for up to 8 rows; A's rows are `in` apart. `next` is the tile
//              of A that the same thread reads afterwards, if it wants to fetch it
//   expand()   y[r][0:outs] += B[0:outs] . low[r] for up to 8 rows; B's rows are `rank` apart

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

constexpr int kBlockRows = 8;
constexpr int kMaxSlices = 4;
constexpr int kRankTile = 8;
constexpr int64_t kMostRanks = 512;

using bf16 = uint16_t;

struct Block {
  int32_t slot, begin, count;  // rows[begin : begin + count] of the plan
};

struct Plan {
  std::vector<int32_t> rows;  // row numbers, those of one slot together
  std::vector<Block> blocks;
  int64_t last_row = -1, last_slot = -1;  // the largest of each
  std::vector<unsigned char> scratch;     // low-rank values: (slices, rows, rank)
  std::mutex busy;
};

struct Module {
  int slices = 0;
  int64_t slots = 0, in = 0, rank = 0;
  const bf16* a[kMaxSlices] = {};  // (slots, rank, in)
  const bf16* b[kMaxSlices] = {};  // (slots, out, rank)
  int64_t out[kMaxSlices] = {}, start[kMaxSlices] = {};
  int64_t version = -1;
  std::vector<uint8_t> active;  // (slices, slots)
  std::mutex busy;

  bool is_active(int slice, int32_t slot) const { return active[slice * slots + slot] != 0; }
  int64_t width() const { return start[slices - 1] + out[slices - 1]; }
};

}  // namespace
