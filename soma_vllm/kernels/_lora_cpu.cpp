// LoRA products of one engine step on x86 CPUs with AVX-512 bf16, fused: y += B (A x) for every row, each under
// its own adapter. `lora_kernels.py` calls it, and takes torch's products instead where `supported()` is false or
// this file was not compiled.
//
// Guarantees:
//   * Only rows that the plan gives an adapter are written; nothing else of y is touched.
//   * No weights are copied. A slot whose A is all zero in a slice (a module that its adapter leaves alone) costs
//     nothing: which those are is looked up only when the weights' version changes.
//   * No global state; plans and modules are freed with their Python objects. The GIL is released meanwhile.
//
// How: rows are sorted by slot into blocks of at most 8 rows of one slot. Shrink: A's rows are dot products along
// contiguous memory, 8 ranks by up to 3 rows at once. Expand: 16 outputs by 8 ranks of B are transposed in
// registers into pairs of ranks, then every row of the block costs 4 instructions per 16 outputs. Both halves share
// one OpenMP region; torch's own thread pool runs it, since both link libgomp.so.1. Low-rank values are rounded to
// bf16 between the halves, as vLLM's GPU kernels do; sums are fp32, and y is rounded once.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kBlockRows = 8;
constexpr int kMaxSlices = 4;
constexpr int kRankTile = 8;
constexpr int64_t kOutChunk = 256;

using bf16 = uint16_t;

struct Block {
  int32_t slot, begin, count;  // rows[begin : begin + count] of the plan
};

struct Plan {
  std::vector<int32_t> rows;  // row numbers, those of one slot together
  std::vector<Block> blocks;
  std::vector<bf16> low;  // (slices, rows, rank), scratch
};

struct Module {
  int slices = 0;
  int64_t slots = 0, in = 0, rank = 0;
  const bf16* a[kMaxSlices] = {};  // (slots, rank, in)
  const bf16* b[kMaxSlices] = {};  // (slots, out, rank)
  int64_t out[kMaxSlices] = {}, start[kMaxSlices] = {};
  int64_t version = -1;
  std::vector<uint8_t> active;  // (slices, slots)

  bool is_active(int slice, int32_t slot) const { return active[slice * slots + slot] != 0; }
};

bool any_nonzero(const bf16* values, int64_t count) {
  // Both zeros count as zero: shifting the sign out leaves 0 for either.
  constexpr int64_t kStride = 1024;
  for (int64_t begin = 0; begin < count; begin += kStride) {
    const int64_t end = std::min(count, begin + kStride);
    uint16_t seen = 0;
    for (int64_t i = begin; i < end; ++i) seen |= static_cast<uint16_t>(values[i] << 1);
    if (seen) return true;
  }
  return false;
}

void refresh(Module& m) {
  for (int s = 0; s < m.slices; ++s)
    for (int64_t slot = 0; slot < m.slots; ++slot)
      m.active[s * m.slots + slot] = any_nonzero(m.a[s] + slot * m.rank * m.in, m.rank * m.in);
}

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SOMA_HAS_KERNEL 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")

namespace {

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

// low[r][0:8] = scale * A[0:8] . x[r] for ROWS rows. A's rows are `in` apart.
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

void shrink(const Module& m, const Plan& plan, const Block& block, int slice, int64_t tile, const bf16* x,
            int64_t x_stride, bf16* low, float scale) {
  const bf16* a = m.a[slice] + (block.slot * m.rank + tile * kRankTile) * m.in;
  const __m256 scales = _mm256_set1_ps(scale);
  const bf16* xs[kBlockRows];
  bf16* lows[kBlockRows];
  for (int r = 0; r < block.count; ++r) {
    xs[r] = x + plan.rows[block.begin + r] * x_stride;
    lows[r] = low + (static_cast<int64_t>(slice) * plan.rows.size() + block.begin + r) * m.rank + tile * kRankTile;
  }
  int r = 0;
  for (; r + 3 <= block.count; r += 3) shrink_rows<3>(a, m.in, xs + r, lows + r, scales);
  if (r + 2 == block.count) shrink_rows<2>(a, m.in, xs + r, lows + r, scales);
  if (r + 1 == block.count) shrink_rows<1>(a, m.in, xs + r, lows + r, scales);
}

// Ranks tile*8 .. +8 of outputs o .. o+16 as four vectors, one per pair of ranks; lane i holds output o+i.
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

// y[r][o] += B[o] . low[r] for ROWS rows and outputs `from` .. `to` of a slice. B's rows are `rank` apart.
template <int ROWS>
void expand_rows(const bf16* b, int64_t rank, int64_t from, int64_t to, bf16* const* y, const bf16* const* low) {
  const int64_t tiles = rank / kRankTile;
  for (int64_t o = from; o < to; o += 16) {
    const int count = static_cast<int>(std::min<int64_t>(16, to - o));
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

void expand(const Module& m, const Plan& plan, const Block& block, int slice, int64_t from, int64_t to, bf16* y,
            int64_t y_stride, const bf16* low) {
  const bf16* b = m.b[slice] + block.slot * m.out[slice] * m.rank;
  bf16* ys[kBlockRows];
  const bf16* lows[kBlockRows];
  for (int r = 0; r < block.count; ++r) {
    ys[r] = y + plan.rows[block.begin + r] * y_stride + m.start[slice];
    lows[r] = low + (static_cast<int64_t>(slice) * plan.rows.size() + block.begin + r) * m.rank;
  }
  int r = 0;
  if (block.count == 8) expand_rows<8>(b, m.rank, from, to, ys, lows), r = 8;
  if (block.count & 4) expand_rows<4>(b, m.rank, from, to, ys + r, lows + r), r += 4;
  if (block.count & 2) expand_rows<2>(b, m.rank, from, to, ys + r, lows + r), r += 2;
  if (block.count & 1) expand_rows<1>(b, m.rank, from, to, ys + r, lows + r);
}

void add(const Module& m, Plan& plan, bf16* y, int64_t y_stride, const bf16* x, int64_t x_stride, float scale) {
  const int64_t blocks = static_cast<int64_t>(plan.blocks.size());
  const int64_t tiles = m.rank / kRankTile;
  plan.low.resize(static_cast<size_t>(m.slices) * plan.rows.size() * m.rank);
  bf16* low = plan.low.data();
  int64_t chunks[kMaxSlices], all_chunks = 0;
  for (int s = 0; s < m.slices; ++s) all_chunks += chunks[s] = (m.out[s] + kOutChunk - 1) / kOutChunk;

#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < blocks * m.slices * tiles; ++task) {
      const Block& block = plan.blocks[task / (m.slices * tiles)];
      const int slice = static_cast<int>(task / tiles % m.slices);
      if (m.is_active(slice, block.slot)) shrink(m, plan, block, slice, task % tiles, x, x_stride, low, scale);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < blocks * all_chunks; ++task) {
      const Block& block = plan.blocks[task / all_chunks];
      int64_t chunk = task % all_chunks;
      int slice = 0;
      while (chunk >= chunks[slice]) chunk -= chunks[slice++];
      const int64_t from = chunk * kOutChunk;
      if (m.is_active(slice, block.slot))
        expand(m, plan, block, slice, from, std::min(m.out[slice], from + kOutChunk), y, y_stride, low);
    }
  }
}

bool cpu_has_kernel() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}

}  // namespace

#pragma GCC pop_options
#else

namespace {
void add(const Module&, Plan&, bf16*, int64_t, const bf16*, int64_t, float) {}
bool cpu_has_kernel() { return false; }
}  // namespace

#endif

namespace {

template <typename T>
void destroy(PyObject* capsule) {
  delete static_cast<T*>(PyCapsule_GetPointer(capsule, T::kName));
}

struct PlanBox : Plan {
  static constexpr const char* kName = "soma_vllm.kernels._lora_cpu.Plan";
};

struct ModuleBox : Module {
  static constexpr const char* kName = "soma_vllm.kernels._lora_cpu.Module";
};

template <typename T>
T* unboxed(PyObject* capsule) {
  return static_cast<T*>(PyCapsule_GetPointer(capsule, T::kName));
}

PyObject* py_supported(PyObject*, PyObject*) { return PyBool_FromLong(cpu_has_kernel()); }

// plan(slots_pointer, rows) -> capsule, or None where no row has an adapter
PyObject* py_plan(PyObject*, PyObject* args) {
  unsigned long long pointer;
  long long rows;
  if (!PyArg_ParseTuple(args, "KL", &pointer, &rows)) return nullptr;
  const int64_t* slots = reinterpret_cast<const int64_t*>(pointer);
  int64_t most = -1;
  for (int64_t i = 0; i < rows; ++i) most = std::max(most, slots[i]);
  if (most < 0) Py_RETURN_NONE;
  auto* plan = new PlanBox;
  std::vector<std::vector<int32_t>> of_slot(most + 1);
  for (int64_t i = 0; i < rows; ++i)
    if (slots[i] >= 0) of_slot[slots[i]].push_back(static_cast<int32_t>(i));
  for (int64_t slot = 0; slot <= most; ++slot) {
    const auto& mine = of_slot[slot];
    for (size_t i = 0; i < mine.size(); i += kBlockRows) {
      const int32_t count = static_cast<int32_t>(std::min<size_t>(kBlockRows, mine.size() - i));
      plan->blocks.push_back({static_cast<int32_t>(slot), static_cast<int32_t>(plan->rows.size()), count});
      plan->rows.insert(plan->rows.end(), mine.begin() + i, mine.begin() + i + count);
    }
  }
  return PyCapsule_New(plan, PlanBox::kName, destroy<PlanBox>);
}

// module(a_pointers, b_pointers, outs, slots, in, rank) -> capsule. Pointers stay valid as long as it is used.
PyObject* py_module(PyObject*, PyObject* args) {
  PyObject *a, *b, *outs;
  long long slots, in, rank;
  if (!PyArg_ParseTuple(args, "O!O!O!LLL", &PyTuple_Type, &a, &PyTuple_Type, &b, &PyTuple_Type, &outs, &slots, &in,
                        &rank))
    return nullptr;
  const Py_ssize_t slices = PyTuple_GET_SIZE(a);
  if (slices < 1 || slices > kMaxSlices || PyTuple_GET_SIZE(b) != slices || PyTuple_GET_SIZE(outs) != slices ||
      slots < 1 || in < 1 || rank < kRankTile || rank % kRankTile != 0) {
    PyErr_SetString(PyExc_ValueError, "module: expected 1 to 4 slices and a rank that is a multiple of 8");
    return nullptr;
  }
  auto* m = new ModuleBox;
  m->slices = static_cast<int>(slices);
  m->slots = slots, m->in = in, m->rank = rank;
  m->active.assign(static_cast<size_t>(slices * slots), 1);
  for (int s = 0; s < m->slices; ++s) {
    m->a[s] = static_cast<const bf16*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(a, s)));
    m->b[s] = static_cast<const bf16*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(b, s)));
    m->out[s] = PyLong_AsLongLong(PyTuple_GET_ITEM(outs, s));
    m->start[s] = s == 0 ? 0 : m->start[s - 1] + m->out[s - 1];
  }
  if (PyErr_Occurred()) {
    delete m;
    return nullptr;
  }
  return PyCapsule_New(m, ModuleBox::kName, destroy<ModuleBox>);
}

// add(module, plan, y_pointer, y_stride, x_pointer, x_stride, scale, version); strides in elements
PyObject* py_add(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 8) {
    PyErr_SetString(PyExc_TypeError, "add: expected 8 arguments");
    return nullptr;
  }
  auto* m = unboxed<ModuleBox>(args[0]);
  auto* plan = unboxed<PlanBox>(args[1]);
  if (!m || !plan) return nullptr;
  auto* y = static_cast<bf16*>(PyLong_AsVoidPtr(args[2]));
  const int64_t y_stride = PyLong_AsLongLong(args[3]);
  const auto* x = static_cast<const bf16*>(PyLong_AsVoidPtr(args[4]));
  const int64_t x_stride = PyLong_AsLongLong(args[5]);
  const double scale = PyFloat_AsDouble(args[6]);
  const int64_t version = PyLong_AsLongLong(args[7]);
  if (PyErr_Occurred()) return nullptr;
  Py_BEGIN_ALLOW_THREADS
  if (version != m->version) {
    refresh(*m);
    m->version = version;
  }
  add(*m, *plan, y, y_stride, x, x_stride, static_cast<float>(scale));
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"supported", py_supported, METH_NOARGS, "Whether this CPU runs the kernel."},
    {"plan", py_plan, METH_VARARGS, "plan(slots_pointer, rows): blocks of rows by slot; None without adapters."},
    {"module", py_module, METH_VARARGS, "module(a_pointers, b_pointers, outs, slots, in, rank): stacked weights."},
    {"add", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(py_add)), METH_FASTCALL,
     "add(module, plan, y, y_stride, x, x_stride, scale, version): y += B A x, in place."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_lora_cpu", "Fused LoRA products for x86 CPUs.", -1, kMethods,
                       nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__lora_cpu() { return PyModule_Create(&kModule); }
