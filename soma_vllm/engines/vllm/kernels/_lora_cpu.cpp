// LoRA products of one engine step on x86 CPUs, fused: y += B (A x) for every row, each under its own adapter.
// `fused.py` calls it with the best instruction set that this CPU has and that `machine.py` allows; with none, or
// where this file was not compiled, `lora_kernels.py` takes torch's products instead.
//
// Guarantees:
//   * Only rows that the plan gives an adapter are written; nothing else of y is touched.
//   * A plan that reaches past x, y or the module's slots is a ValueError, and nothing is written.
//   * No weights are copied. A slot whose A is all zero in a slice (a module that its adapter leaves alone) costs
//     nothing: which those are is looked up only when the weights' version changes.
//   * No global state; plans and modules are freed with their Python objects. The GIL is released meanwhile; threads
//     that share a plan or a module take turns.
//   * The build asks nothing of the CPU: what needs an instruction set is compiled for it alone, and asked before.
//
// How: rows are sorted by slot into blocks of at most 8 rows of one slot, and both halves, each in the form that suits
// its instruction set (`_lora_avx512.h`, `_lora_avx2.h`), share one OpenMP region, or the calling thread where there is
// little to do; torch's own thread pool runs it, since both link libgomp.so.1. Low-rank values are rounded to bf16
// between the halves, as vLLM's GPU kernels do; sums are fp32, and y is rounded once.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>

#include "_lora.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SOMA_X86
#include "_lora_avx2.h"
#include "_lora_avx512.h"
#endif

namespace {

constexpr int64_t kOutChunk = 256;

// Multiplications up to which the calling thread computes alone: some microseconds, about what it costs to share them,
// and far less than waiting for a thread whose core somebody else has.
constexpr int64_t kAlone = 1 << 16;

// One call's tensors; strides in elements.
struct Operands {
  bf16* y;
  int64_t y_rows, y_width, y_stride;
  const bf16* x;
  int64_t x_rows, x_width, x_stride;
  float scale;
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

// Task number `task` of the first half is one tile of 8 ranks, of one slice, for one block.
struct Tile {
  const Block* block;
  int slice;
  int64_t number;
  const bf16* a;
};

Tile tile_of(const Module& m, const Plan& plan, int64_t task) {
  const int64_t tiles = m.rank / kRankTile;
  const Block& block = plan.blocks[task / (m.slices * tiles)];
  const int slice = static_cast<int>(task / tiles % m.slices);
  const int64_t number = task % tiles;
  return {&block, slice, number, m.a[slice] + (block.slot * m.rank + number * kRankTile) * m.in};
}

template <class Isa>
void shrink_block(const Module& m, Plan& plan, const Tile& tile, const bf16* next, const Operands& io) {
  auto* low = reinterpret_cast<typename Isa::Low*>(plan.scratch.data());
  const Block& block = *tile.block;
  const bf16* xs[kBlockRows];
  typename Isa::Low* lows[kBlockRows];
  for (int r = 0; r < block.count; ++r) {
    xs[r] = io.x + plan.rows[block.begin + r] * io.x_stride;
    lows[r] = low + (tile.slice * plan.rows.size() + block.begin + r) * m.rank + tile.number * kRankTile;
  }
  Isa::shrink(tile.a, next, m.in, xs, lows, block.count, io.scale);
}

template <class Isa>
void expand_block(const Module& m, Plan& plan, const Block& block, int slice, int64_t from, const Operands& io) {
  const auto* low = reinterpret_cast<const typename Isa::Low*>(plan.scratch.data());
  bf16* ys[kBlockRows];
  const typename Isa::Low* lows[kBlockRows];
  for (int r = 0; r < block.count; ++r) {
    ys[r] = io.y + plan.rows[block.begin + r] * io.y_stride + m.start[slice] + from;
    lows[r] = low + (slice * plan.rows.size() + block.begin + r) * m.rank;
  }
  const int64_t outs = std::min(kOutChunk, m.out[slice] - from);
  Isa::expand(m.b[slice] + (block.slot * m.out[slice] + from) * m.rank, m.rank, outs, ys, lows, block.count);
}

template <class Isa>
void add(const Module& m, Plan& plan, const Operands& io) {
  const int64_t blocks = static_cast<int64_t>(plan.blocks.size());
  const int64_t all_tiles = blocks * m.slices * (m.rank / kRankTile);
  plan.scratch.resize(static_cast<size_t>(m.slices) * plan.rows.size() * m.rank * sizeof(typename Isa::Low));
  int64_t chunks[kMaxSlices], all_chunks = 0;
  for (int s = 0; s < m.slices; ++s) all_chunks += chunks[s] = (m.out[s] + kOutChunk - 1) / kOutChunk;

  const int64_t work = static_cast<int64_t>(plan.rows.size()) * m.rank * (m.slices * m.in + m.width());

#pragma omp parallel if (work > kAlone)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < all_tiles; ++task) {
      const Tile tile = tile_of(m, plan, task);
      const bf16* next = tile_of(m, plan, std::min(task + 1, all_tiles - 1)).a;
      if (m.is_active(tile.slice, tile.block->slot)) shrink_block<Isa>(m, plan, tile, next, io);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < blocks * all_chunks; ++task) {
      const Block& block = plan.blocks[task / all_chunks];
      int64_t chunk = task % all_chunks;
      int slice = 0;
      while (chunk >= chunks[slice]) chunk -= chunks[slice++];
      if (m.is_active(slice, block.slot)) expand_block<Isa>(m, plan, block, slice, chunk * kOutChunk, io);
    }
  }
}

struct Kernel {
  const char* name;
  bool (*runs)();
  void (*add)(const Module&, Plan&, const Operands&);
};

// The best first; the last one has no name.
constexpr Kernel kKernels[] = {
#ifdef SOMA_X86
    {"avx512_bf16", Avx512Bf16::runs, add<Avx512Bf16>},
    {"avx2", Avx2::runs, add<Avx2>},
#endif
    {nullptr, nullptr, nullptr}};

const Kernel* kernel_named(const char* name) {
  for (const Kernel* k = kKernels; k->name; ++k)
    if (!std::strcmp(k->name, name) && k->runs()) return k;
  return nullptr;
}

template <typename T>
void destroy(PyObject* capsule) {
  delete static_cast<T*>(PyCapsule_GetPointer(capsule, T::kName));
}

struct PlanBox : Plan {
  const Kernel* kernel = nullptr;
  static constexpr const char* kName = "soma_vllm.engines.vllm.kernels._lora_cpu.Plan";
};

struct ModuleBox : Module {
  static constexpr const char* kName = "soma_vllm.engines.vllm.kernels._lora_cpu.Module";
};

template <typename T>
T* unboxed(PyObject* capsule) {
  return static_cast<T*>(PyCapsule_GetPointer(capsule, T::kName));
}

// instruction_sets() -> names, the best first
PyObject* py_instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Kernel* k = kKernels; names && k->name; ++k) {
    if (!k->runs()) continue;
    PyObject* name = PyUnicode_FromString(k->name);
    if (!name || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

// plan(instruction_set, slots_pointer, rows) -> capsule, or None where no row has an adapter
PyObject* py_plan(PyObject*, PyObject* args) {
  const char* name;
  unsigned long long pointer;
  long long rows;
  if (!PyArg_ParseTuple(args, "sKL", &name, &pointer, &rows)) return nullptr;
  const Kernel* kernel = kernel_named(name);
  if (!kernel) return PyErr_Format(PyExc_ValueError, "plan: found '%s', expected one of instruction_sets()", name);
  const int64_t* slots = reinterpret_cast<const int64_t*>(pointer);
  int64_t most = -1;
  for (int64_t i = 0; i < rows; ++i) most = std::max(most, slots[i]);
  if (most < 0) Py_RETURN_NONE;
  auto* plan = new PlanBox;
  plan->kernel = kernel;
  plan->last_slot = most;
  std::vector<std::vector<int32_t>> of_slot(most + 1);
  for (int64_t i = 0; i < rows; ++i)
    if (slots[i] >= 0) of_slot[slots[i]].push_back(static_cast<int32_t>(i)), plan->last_row = i;
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
      slots < 1 || in < 1 || rank < kRankTile || rank > kMostRanks || rank % kRankTile != 0)
    return PyErr_Format(PyExc_ValueError,
                        "module: found %zd slices of rank %lld, expected 1 to %d of a multiple of %d up to %lld", slices,
                        rank, kMaxSlices, kRankTile, static_cast<long long>(kMostRanks));
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

// Whether the plan's rows and slots are all there; if not, a ValueError is set.
bool fits(const Module& m, const Plan& plan, const Operands& io) {
  const auto last_row = static_cast<long long>(plan.last_row), last_slot = static_cast<long long>(plan.last_slot);
  if (plan.last_row >= io.x_rows || plan.last_row >= io.y_rows)
    PyErr_Format(PyExc_ValueError, "add: found x of %lld rows and y of %lld, expected more than %lld, the plan's last",
                 static_cast<long long>(io.x_rows), static_cast<long long>(io.y_rows), last_row);
  else if (io.x_width != m.in || io.y_width != m.width())
    PyErr_Format(PyExc_ValueError, "add: found x of width %lld and y of width %lld, expected %lld and %lld",
                 static_cast<long long>(io.x_width), static_cast<long long>(io.y_width),
                 static_cast<long long>(m.in), static_cast<long long>(m.width()));
  else if (plan.last_slot >= m.slots)
    PyErr_Format(PyExc_ValueError, "add: found a plan for slot %lld, expected less than the module's %lld", last_slot,
                 static_cast<long long>(m.slots));
  else
    return true;
  return false;
}

// add(module, plan, y_pointer, y_rows, y_width, y_stride, x_pointer, x_rows, x_width, x_stride, scale, version);
// strides in elements
PyObject* py_add(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 12) return PyErr_Format(PyExc_TypeError, "add: found %zd arguments, expected 12", count);
  auto* m = unboxed<ModuleBox>(args[0]);
  auto* plan = unboxed<PlanBox>(args[1]);
  if (!m || !plan) return nullptr;
  int64_t numbers[8];
  for (int i = 0; i < 4; ++i) {
    numbers[i] = PyLong_AsLongLong(args[2 + i]);
    numbers[4 + i] = PyLong_AsLongLong(args[6 + i]);
  }
  Operands io;
  io.y = reinterpret_cast<bf16*>(numbers[0]);
  io.y_rows = numbers[1], io.y_width = numbers[2], io.y_stride = numbers[3];
  io.x = reinterpret_cast<const bf16*>(numbers[4]);
  io.x_rows = numbers[5], io.x_width = numbers[6], io.x_stride = numbers[7];
  io.scale = static_cast<float>(PyFloat_AsDouble(args[10]));
  const int64_t version = PyLong_AsLongLong(args[11]);
  if (PyErr_Occurred() || !fits(*m, *plan, io)) return nullptr;
  bool enough = true;
  Py_BEGIN_ALLOW_THREADS
  try {
    const std::scoped_lock lock(m->busy, plan->busy);
    if (version != m->version) {
      refresh(*m);
      m->version = version;
    }
    plan->kernel->add(*m, *plan, io);
  } catch (const std::bad_alloc&) {  // nothing may be thrown through Python's frames
    enough = false;
  }
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"instruction_sets", py_instruction_sets, METH_NOARGS, "Names of those that this CPU has, the best first."},
    {"plan", py_plan, METH_VARARGS,
     "plan(instruction_set, slots_pointer, rows): blocks of rows by slot; None without adapters."},
    {"module", py_module, METH_VARARGS, "module(a_pointers, b_pointers, outs, slots, in, rank): stacked weights."},
    {"add", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(py_add)), METH_FASTCALL,
     "add(module, plan, y, rows, width, stride, x, rows, width, stride, scale, version): y += B A x, in place."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_lora_cpu", "Fused LoRA products for x86 CPUs.", -1, kMethods,
                       nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__lora_cpu() { return PyModule_Create(&kModule); }
