// Linear layers of a vLLM engine on x86 CPUs without bf16 products in hardware: y = x W^T + bias, with x, W and y in
// bf16 and float32 in between. `linear.py` calls it; `supported()` says whether this CPU runs it (AVX2 and FMA).
//
// Guarantees:
//   * A row's result depends on that row and the weights alone: each output is one chain of fused multiply-adds over
//     ascending inputs, whatever the number of rows and threads. The same row gives the same bits in every batch.
//   * Weights stay in bf16, in a copy of their own that is read once for up to 96 rows; y is rounded once, to nearest
//     even, and a NaN stays one.
//   * No global state; packed weights are freed with their Python object. The GIL is released meanwhile.
//
// How: weights lie in panels of 16 outputs, input after input, so that one load brings 16 weights of one input; the
// low and the high halves of its eight 32-bit lanes are outputs 0-7 and 8-15, and a shift and a mask widen them. Up
// to 6 rows are multiplied with a panel in registers. Few rows are bound by memory and take several panels at once,
// to have as many sums in flight as the multipliers can hold; many rows are cut into blocks that stay in the second-
// level cache, with their sums in a scratch buffer between blocks of inputs.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include <omp.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define SOMA_HAS_KERNEL 1
#include <immintrin.h>
#include <sys/mman.h>
#endif

namespace {

using bf16 = uint16_t;

constexpr int64_t kPanel = 16;       // outputs of a panel
constexpr int kMaxRows = 6;          // rows of a register tile
constexpr int64_t kRowBlock = 96;    // rows whose inputs are held widened at once
constexpr int64_t kInBlock = 512;    // inputs of a panel that stay in the first-level cache
constexpr int64_t kPanelsBlock = 16; // most panels that share a block of widened inputs
constexpr int64_t kAlone = 1 << 18;   // multiplications up to which other threads would only be waited for
constexpr size_t kHugePage = size_t{1} << 21;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> allocate(int64_t count, size_t alignment = 64) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(alignment, std::max(bytes, alignment))));
}

struct Weights {
  int64_t out = 0, in = 0;
  Buffer<bf16> panels;  // (out / 16, in, 16), padded with zeros

  int64_t panel_count() const { return (out + kPanel - 1) / kPanel; }
  const bf16* panel(int64_t p) const { return panels.get() + p * in * kPanel; }
};

// Where output `o` of a panel lies among the 16 weights of one input.
constexpr int64_t place(int64_t o) { return o < 8 ? 2 * o : 2 * (o - 8) + 1; }

bool pack(Weights& w, const bf16* weight, int64_t stride) {
  w.panels = allocate<bf16>(w.panel_count() * w.in * kPanel, kHugePage);
  if (!w.panels) return false;
#ifdef SOMA_HAS_KERNEL
  // Streaming through 4 kB pages costs a fifth of the bandwidth. Without permission it is only slower.
  madvise(w.panels.get(), static_cast<size_t>(w.panel_count() * w.in * kPanel) * sizeof(bf16), MADV_HUGEPAGE);
#endif
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < w.panel_count(); ++p) {
    bf16* to = w.panels.get() + p * w.in * kPanel;
    for (int64_t o = 0; o < kPanel; ++o) {
      const int64_t output = p * kPanel + o;
      bf16* mine = to + place(o);
      for (int64_t k = 0; k < w.in; ++k) mine[k * kPanel] = output < w.out ? weight[output * stride + k] : 0;
    }
  }
  return true;
}

inline float widened(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace

#ifdef SOMA_HAS_KERNEL
#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace {

inline __m256i rounded(__m256 v) {
  // To nearest even, in the upper halves; a NaN keeps its sign and becomes quiet.
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_srli_epi32(_mm256_blendv_epi8(near, quiet, _mm256_castps_si256(nan)), 16);
}

// 16 sums as bf16, in order.
inline __m256i as_bf16(__m256 low, __m256 high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(low), rounded(high)), 0xd8);
}

// Rows of one register tile, widened: values[k * ROWS + row].
void widen(const bf16* const* rows, int count, int64_t in, float* to) {
  for (int r = 0; r < count; ++r)
    for (int64_t k = 0; k < in; ++k) to[k * count + r] = widened(rows[r][k]);
}

// sums[row][16 per panel] += x[row] . panels, over `in` inputs. The panels are `distance` weights apart. `fresh`
// begins at zero; rows of `sums` are `stride` apart.
template <int ROWS, int PANELS>
inline void tile(const float* x, const bf16* w, int64_t distance, int64_t in, float* sums, int64_t stride, bool fresh) {
  __m256 low[PANELS][ROWS], high[PANELS][ROWS];
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const float* from = sums + r * stride + p * kPanel;
      low[p][r] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(from);
      high[p][r] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(from + 8);
    }
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t k = 0; k < in; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      const bf16* at = w + p * distance + k * kPanel;
      if (PANELS > 1 && (k & 1) == 0) _mm_prefetch(reinterpret_cast<const char*>(at + 1024), _MM_HINT_T0);
      const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
      const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      const __m256 second = _mm256_castsi256_ps(_mm256_and_si256(both, mask));
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const __m256 value = _mm256_broadcast_ss(x + k * ROWS + r);
        low[p][r] = _mm256_fmadd_ps(value, first, low[p][r]);
        high[p][r] = _mm256_fmadd_ps(value, second, high[p][r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      float* to = sums + r * stride + p * kPanel;
      _mm256_storeu_ps(to, low[p][r]);
      _mm256_storeu_ps(to + 8, high[p][r]);
    }
}

using Tile = void (*)(const float*, const bf16*, int64_t, int64_t, float*, int64_t, bool);
constexpr Tile kOnePanel[] = {nullptr,    tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>};
constexpr Tile kWide[] = {nullptr, tile<1, 4>, tile<2, 2>, tile<3, 2>, tile<4, 1>, tile<5, 1>, tile<6, 1>};
constexpr int kWidth[] = {0, 4, 2, 2, 1, 1, 1};  // panels that kWide takes at once

// The rows of a block as register tiles of almost the same height.
struct Tiles {
  int64_t count, height, taller;  // `taller` tiles have height + 1 rows, and come first
  explicit Tiles(int64_t rows) {
    count = (rows + kMaxRows - 1) / kMaxRows;
    height = rows / count, taller = rows % count;
  }
  int64_t begin(int64_t t) const { return t * height + std::min(t, taller); }
  int rows(int64_t t) const { return static_cast<int>(height + (t < taller)); }
};

void finish(const float* sums, const float* bias, int64_t count, bf16* y) {
  int64_t o = 0;
  for (; o + kPanel <= count; o += kPanel) {
    __m256 low = _mm256_loadu_ps(sums + o), high = _mm256_loadu_ps(sums + o + 8);
    if (bias) {
      low = _mm256_add_ps(low, _mm256_loadu_ps(bias + o));
      high = _mm256_add_ps(high, _mm256_loadu_ps(bias + o + 8));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + o), as_bf16(low, high));
  }
  if (o < count) {
    alignas(32) float rest[kPanel] = {};
    alignas(32) bf16 out[kPanel];
    for (int64_t i = o; i < count; ++i) rest[i - o] = sums[i] + (bias ? bias[i] : 0.0f);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), as_bf16(_mm256_load_ps(rest), _mm256_load_ps(rest + 8)));
    std::memcpy(y + o, out, static_cast<size_t>(count - o) * sizeof(bf16));
  }
}

bool multiply(const Weights& w, bf16* y, int64_t y_stride, const bf16* x, int64_t x_stride, int64_t rows,
              const float* bias) {
  const int64_t panels = w.panel_count();
  const int64_t threads = rows * w.in * w.out <= kAlone ? 1 : omp_get_max_threads();
  // Two blocks a thread at least, so that none waits long for another; how they are cut changes no bits.
  const int64_t each = std::clamp<int64_t>((panels + 2 * threads - 1) / (2 * threads), 4, kPanelsBlock);
  const int64_t blocks = (panels + each - 1) / each;
  const Buffer<float> wide = allocate<float>(std::min(rows, kRowBlock) * w.in);
  bool enough = wide != nullptr;
#pragma omp parallel num_threads(threads)
  {
    const Buffer<float> sums = allocate<float>(std::min(rows, kRowBlock) * each * kPanel);
    if (!sums) {
#pragma omp atomic write
      enough = false;
    }
#pragma omp barrier
    for (int64_t begin = 0; enough && begin < rows; begin += kRowBlock) {
      const Tiles tiles(std::min(kRowBlock, rows - begin));
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tiles.count; ++t) {
        const bf16* mine[kMaxRows];
        for (int r = 0; r < tiles.rows(t); ++r) mine[r] = x + (begin + tiles.begin(t) + r) * x_stride;
        widen(mine, tiles.rows(t), w.in, wide.get() + tiles.begin(t) * w.in);
      }
#pragma omp for schedule(dynamic)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * each, last = std::min(panels, first + each);
        const int64_t stride = (last - first) * kPanel;
        // One tile reads each weight once: nothing is won by coming back to it in the cache.
        const int64_t step = tiles.count == 1 ? w.in : kInBlock;
        for (int64_t k = 0; k < w.in; k += step) {
          const int64_t in = std::min(step, w.in - k);
          for (int64_t p = first; p < last;) {
            int width = 1;
            for (int64_t t = 0; t < tiles.count; ++t) {
              const int height = tiles.rows(t);
              width = tiles.count == 1 && p + kWidth[height] <= last ? kWidth[height] : 1;
              const Tile run = width > 1 ? kWide[height] : kOnePanel[height];
              run(wide.get() + tiles.begin(t) * w.in + k * height, w.panel(p) + k * kPanel, w.in * kPanel, in,
                  sums.get() + tiles.begin(t) * stride + (p - first) * kPanel, stride, k == 0);
            }
            p += width;
          }
        }
        const int64_t from = first * kPanel, count = std::min(w.out, last * kPanel) - from;
        for (int64_t r = 0; r < std::min(kRowBlock, rows - begin); ++r)
          finish(sums.get() + r * stride, bias ? bias + from : nullptr, count, y + (begin + r) * y_stride + from);
      }
    }
  }
  return enough;
}

bool cpu_has_kernel() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace

#pragma GCC pop_options
#else

namespace {
bool multiply(const Weights&, bf16*, int64_t, const bf16*, int64_t, int64_t, const float*) { return false; }
bool cpu_has_kernel() { return false; }
}  // namespace

#endif

namespace {

constexpr const char* kName = "soma_vllm.engines.vllm.kernels._linear_cpu.Weights";

void destroy(PyObject* capsule) { delete static_cast<Weights*>(PyCapsule_GetPointer(capsule, kName)); }

PyObject* py_supported(PyObject*, PyObject*) { return PyBool_FromLong(cpu_has_kernel()); }

// pack(weight_pointer, out, in, stride) -> capsule. The weights are copied; stride in elements.
PyObject* py_pack(PyObject*, PyObject* args) {
  unsigned long long pointer;
  long long out, in, stride;
  if (!PyArg_ParseTuple(args, "KLLL", &pointer, &out, &in, &stride)) return nullptr;
  if (out < 1 || in < 1 || stride < in) {
    PyErr_Format(PyExc_ValueError, "pack: found (%lld, %lld), rows %lld apart; expected at least one of each, rows apart",
                 out, in, stride);
    return nullptr;
  }
  std::unique_ptr<Weights> weights(new (std::nothrow) Weights);
  if (!weights) return PyErr_NoMemory();
  weights->out = out, weights->in = in;
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  enough = pack(*weights, reinterpret_cast<const bf16*>(pointer), stride);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  PyObject* capsule = PyCapsule_New(weights.get(), kName, destroy);
  if (capsule) weights.release();  // it is the capsule's now
  return capsule;
}

// multiply(weights, y_pointer, y_stride, x_pointer, x_stride, rows, bias_pointer); strides in elements; bias float32, 0
// for none
PyObject* py_multiply(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 7) {
    PyErr_SetString(PyExc_TypeError, "multiply: expected 7 arguments");
    return nullptr;
  }
  const auto* weights = static_cast<const Weights*>(PyCapsule_GetPointer(args[0], kName));
  if (!weights) return nullptr;
  auto* y = static_cast<bf16*>(PyLong_AsVoidPtr(args[1]));
  const int64_t y_stride = PyLong_AsLongLong(args[2]);
  const auto* x = static_cast<const bf16*>(PyLong_AsVoidPtr(args[3]));
  const int64_t x_stride = PyLong_AsLongLong(args[4]);
  const int64_t rows = PyLong_AsLongLong(args[5]);
  const auto* bias = static_cast<const float*>(PyLong_AsVoidPtr(args[6]));
  if (PyErr_Occurred()) return nullptr;
  bool enough = true;
  Py_BEGIN_ALLOW_THREADS
  if (rows > 0) enough = multiply(*weights, y, y_stride, x, x_stride, rows, bias);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"supported", py_supported, METH_NOARGS, "Whether this CPU runs the kernel."},
    {"pack", py_pack, METH_VARARGS, "pack(weight_pointer, out, in, stride): a copy as the kernel reads it."},
    {"multiply", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(py_multiply)), METH_FASTCALL,
     "multiply(weights, y, y_stride, x, x_stride, rows, bias): y = x W^T + bias."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_linear_cpu", "Linear layers in bf16 for x86 CPUs with AVX2.", -1,
                       kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__linear_cpu() { return PyModule_Create(&kModule); }
