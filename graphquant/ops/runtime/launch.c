/* Prepared kernel launches: later calls only read the tensors' addresses and launch.
 *
 * load(device, cubin, name, shared) -> int                             handle of a loaded function
 * Launch(function, grid, block, shared, cluster, pdl, params, keep)    a prepared launch
 * launch(stream, *tensors) -> bool    False, without launching: an address is not a multiple of 16
 * Site(prepare)                                                        call site that caches a Launch
 * site(stream, *tensors) -> None
 * site.copy() -> Site    with a Launch of its own, so that the two can keep maps of other tensors
 *
 * A Site has no Launch at first, or one that refuses these addresses. Then prepare(*tensors) runs
 * the kernel through Python and returns the Launch for the next call, or None if it has none.
 *
 * params, in the kernel's order (cuda.h has the meaning of a map's numbers):
 *   ("pointer", tensor)   its address          ("null",)     0
 *   ("i32" | "i64", int)  ("f32", float)
 *   ("map", tensor, type, sizes, strides, box, swizzle)      a CUtensorMap of len(sizes) dims, the
 *       innermost first: sizes and box in elements, strides in bytes, of all dims but the innermost
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

#include "cuda.h"

#define MAX_PARAMS 32
#define MAX_BYTES 1024 /* of parameters: four maps of 128 and some */
#define MAX_SLOTS 24
#define MAX_DIMS 5 /* of a map */
#define ALIGN 16

static CUresult (*launch_kernel)(const CUlaunchConfig *, CUfunction, void **, void **);
static CUresult (*encode_map)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static CUresult (*module_load)(CUmodule *, const void *);
static CUresult (*module_function)(CUfunction *, CUmodule, const char *);
static CUresult (*function_set)(CUfunction, CUfunction_attribute, int);
static CUresult (*error_string)(CUresult, const char **);
static CUresult (*context_get)(CUcontext *);
static CUresult (*context_set)(CUcontext);
static CUresult (*context_retain)(CUcontext *, CUdevice);
static CUresult (*device_get)(CUdevice *, int);
static CUresult (*pointer_get)(void *, CUpointer_attribute, CUdeviceptr);
static PyObject *data_ptr_name;

static int find_driver(void) {
  static const struct {
    const char *name;
    void *where;
  } wanted[] = {
      {"cuLaunchKernelEx", &launch_kernel},     {"cuTensorMapEncodeTiled", &encode_map},
      {"cuModuleLoadData", &module_load},       {"cuModuleGetFunction", &module_function},
      {"cuFuncSetAttribute", &function_set},    {"cuGetErrorString", &error_string},
      {"cuCtxGetCurrent", &context_get},        {"cuCtxSetCurrent", &context_set},
      {"cuDeviceGet", &device_get},             {"cuDevicePrimaryCtxRetain", &context_retain},
      {"cuPointerGetAttribute", &pointer_get},
  };
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  if (!driver) {
    PyErr_SetString(PyExc_OSError, "libcuda.so.1 was not found: is the NVIDIA driver installed?");
    return -1;
  }
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; ++i) {
    void *found = dlsym(driver, wanted[i].name);
    if (!found) {
      PyErr_Format(PyExc_OSError, "the NVIDIA driver has no %s: it is too old", wanted[i].name);
      return -1;
    }
    memcpy(wanted[i].where, &found, sizeof found);
  }
  return 0;
}

static int failed(CUresult result, const char *what) {
  const char *why = NULL;
  if (result == CUDA_SUCCESS) return 0;
  error_string(result, &why);
  PyErr_Format(PyExc_RuntimeError, "%s: CUDA error %d, %s", what, (int)result, why ? why : "?");
  return 1;
}

/* Makes the device's primary context, which torch uses, the thread's current one. A thread that has
 * made no CUDA call yet has none: torch can allocate from its cache and knows the stream without. */
static int enter(int ordinal) {
  CUdevice device;
  CUcontext context;
  return failed(device_get(&device, ordinal), "cuDeviceGet") ||
                 failed(context_retain(&context, device), "cuDevicePrimaryCtxRetain") ||
                 failed(context_set(context), "cuCtxSetCurrent")
             ? -1
             : 0;
}

/* ------------------------------------------------------------------------------------- Launch */

typedef struct {
  Py_ssize_t tensor; /* position of the tensor whose address goes here */
  int at;            /* offset into `bytes` */
  int is_map;
  CUdeviceptr last; /* address that the map was encoded for */
  CUtensorMapDataType type;
  CUtensorMapSwizzle swizzle;
  cuuint32_t dims;
  cuuint64_t sizes[MAX_DIMS], strides[MAX_DIMS];
  cuuint32_t box[MAX_DIMS];
} Slot;

typedef struct {
  PyObject_HEAD
  CUfunction function;
  CUlaunchConfig config;
  CUlaunchAttribute attributes[2];
  int n_params, n_slots;
  int starts[MAX_PARAMS];
  Slot slots[MAX_SLOTS];
  Py_ssize_t n_tensors;
  PyObject *keep; /* owner of the function, kept alive */
  unsigned char bytes[MAX_BYTES];
} Launch;

/* Reads a tuple of `n` integers. */
static int read_all(PyObject *tuple, Py_ssize_t n, cuuint64_t *to) {
  if (PyTuple_GET_SIZE(tuple) != n) {
    PyErr_Format(PyExc_ValueError, "a map has %zd numbers where %zd are needed",
                 PyTuple_GET_SIZE(tuple), n);
    return -1;
  }
  for (Py_ssize_t i = 0; i < n; ++i) {
    to[i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(tuple, i));
    if (to[i] == (cuuint64_t)-1 && PyErr_Occurred()) return -1;
  }
  return 0;
}

static int read_map(PyObject *param, Slot *s) {
  const char *kind;
  int type, swizzle;
  PyObject *sizes, *strides, *box;
  cuuint64_t wide[MAX_DIMS];
  if (!PyArg_ParseTuple(param, "sniO!O!O!i", &kind, &s->tensor, &type, &PyTuple_Type, &sizes,
                        &PyTuple_Type, &strides, &PyTuple_Type, &box, &swizzle))
    return -1;
  Py_ssize_t dims = PyTuple_GET_SIZE(sizes);
  if (dims < 1 || dims > MAX_DIMS) {
    PyErr_Format(PyExc_ValueError, "a map has 1 to %d dims, not %zd", MAX_DIMS, dims);
    return -1;
  }
  if (read_all(sizes, dims, s->sizes) || read_all(strides, dims - 1, s->strides) ||
      read_all(box, dims, wide))
    return -1;
  for (Py_ssize_t i = 0; i < dims; ++i) s->box[i] = (cuuint32_t)wide[i];
  s->type = type;
  s->swizzle = swizzle;
  s->dims = (cuuint32_t)dims;
  s->is_map = 1;
  return 0;
}

static int launch_add(Launch *self, PyObject *param, int *used) {
  const char *kind = NULL;
  PyObject *first = PyTuple_Check(param) && PyTuple_GET_SIZE(param) ? PyTuple_GET_ITEM(param, 0) : NULL;
  if (!first || !(kind = PyUnicode_AsUTF8(first))) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "a param is a tuple (kind, ...)");
    return -1;
  }
  unsigned char value[8] = {0};
  int size = 8, align = 8, slot = 0;
  Slot s = {0};
  long long integer;
  float real;
  if (!strcmp(kind, "pointer")) {
    if (!PyArg_ParseTuple(param, "sn", &kind, &s.tensor)) return -1;
    slot = 1;
  } else if (!strcmp(kind, "null")) {
  } else if (!strcmp(kind, "i32") || !strcmp(kind, "i64")) {
    if (!PyArg_ParseTuple(param, "sL", &kind, &integer)) return -1;
    size = align = kind[1] == '3' ? 4 : 8;
    memcpy(value, &integer, size); /* little-endian */
  } else if (!strcmp(kind, "f32")) {
    if (!PyArg_ParseTuple(param, "sf", &kind, &real)) return -1;
    size = align = 4;
    memcpy(value, &real, 4);
  } else if (!strcmp(kind, "map")) {
    if (read_map(param, &s) < 0) return -1;
    slot = 1;
    size = sizeof(CUtensorMap);
    align = 64;
  } else {
    PyErr_Format(PyExc_ValueError, "no param is called %s", kind);
    return -1;
  }
  if (slot && s.tensor < 0) {
    PyErr_SetString(PyExc_ValueError, "a tensor's position is not negative");
    return -1;
  }
  int at = (*used + align - 1) / align * align;
  if (at + size > MAX_BYTES || self->n_params == MAX_PARAMS || self->n_slots == MAX_SLOTS) {
    PyErr_SetString(PyExc_ValueError, "too many params");
    return -1;
  }
  self->starts[self->n_params++] = at;
  if (slot) {
    s.at = at;
    self->slots[self->n_slots++] = s;
    if (s.tensor >= self->n_tensors) self->n_tensors = s.tensor + 1;
  } else {
    memcpy(self->bytes + at, value, size);
  }
  *used = at + size;
  return 0;
}

static PyObject *launch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"function", "grid",   "block", "shared", "cluster",
                          "pdl",      "params", "keep",  NULL};
  unsigned long long function;
  unsigned grid[3], block, shared, cluster;
  int pdl, used = 0;
  PyObject *params, *keep;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "K(III)IIIpO!O", names, &function, &grid[0],
                                   &grid[1], &grid[2], &block, &shared, &cluster, &pdl,
                                   &PyTuple_Type, &params, &keep))
    return NULL;
  Launch *self = (Launch *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->function = (CUfunction)(uintptr_t)function;
  self->config.gridDimX = grid[0];
  self->config.gridDimY = grid[1];
  self->config.gridDimZ = grid[2];
  self->config.blockDimX = block;
  self->config.blockDimY = self->config.blockDimZ = 1;
  self->config.sharedMemBytes = shared;
  self->config.attrs = self->attributes;
  if (cluster > 1) {
    CUlaunchAttribute *a = &self->attributes[self->config.numAttrs++];
    a->id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    a->value.clusterDim.x = cluster;
    a->value.clusterDim.y = a->value.clusterDim.z = 1;
  }
  if (pdl) {
    CUlaunchAttribute *a = &self->attributes[self->config.numAttrs++];
    a->id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    a->value.programmaticStreamSerializationAllowed = 1;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(params); ++i)
    if (launch_add(self, PyTuple_GET_ITEM(params, i), &used) < 0) {
      Py_DECREF(self);
      return NULL;
    }
  Py_INCREF(keep);
  self->keep = keep;
  return (PyObject *)self;
}

static void launch_free(PyObject *object) {
  Py_XDECREF(((Launch *)object)->keep);
  Py_TYPE(object)->tp_free(object);
}

/* 1: launched. 0: an address is not aligned as the kernel needs it. -1: error. */
static int launch_run(Launch *self, CUstream stream, PyObject *const *tensors, Py_ssize_t n) {
  if (n < self->n_tensors) {
    PyErr_Format(PyExc_TypeError, "the kernel reads %zd tensors, got %zd", self->n_tensors, n);
    return -1;
  }
  _Alignas(64) unsigned char bytes[MAX_BYTES]; /* a copy: the object's own are aligned as malloc's */
  void *params[MAX_PARAMS];
  CUdeviceptr addresses[MAX_SLOTS];
  for (int i = 0; i < self->n_slots; ++i) { /* may run Python code, so other threads */
    PyObject *number = PyObject_CallMethodNoArgs(tensors[self->slots[i].tensor], data_ptr_name);
    if (!number) return -1;
    addresses[i] = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (addresses[i] == (CUdeviceptr)-1 && PyErr_Occurred()) return -1;
    if (addresses[i] % ALIGN) return 0;
  }
  for (int i = 0; i < self->n_slots; ++i) { /* holds the GIL from here to the copy below */
    Slot *s = &self->slots[i];
    CUdeviceptr address = addresses[i];
    if (!s->is_map) {
      memcpy(self->bytes + s->at, &address, sizeof address);
    } else if (address != s->last) {
      static const cuuint32_t steps[MAX_DIMS] = {1, 1, 1, 1, 1};
      CUtensorMap map;
      if (failed(encode_map(&map, s->type, s->dims, (void *)(uintptr_t)address, s->sizes, s->strides,
                            s->box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, s->swizzle,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                 "cuTensorMapEncodeTiled"))
        return -1;
      memcpy(self->bytes + s->at, &map, sizeof map);
      s->last = address;
    }
  }
  memcpy(bytes, self->bytes, sizeof bytes);
  for (int i = 0; i < self->n_params; ++i) params[i] = bytes + self->starts[i];
  CUlaunchConfig config = self->config;
  config.hStream = stream;
  CUresult result;
  Py_BEGIN_ALLOW_THREADS /* blocks while the launch queue is full */
  result = launch_kernel(&config, self->function, params, NULL);
  Py_END_ALLOW_THREADS
  if (result == CUDA_ERROR_INVALID_CONTEXT && self->n_slots) {
    int ordinal;
    if (failed(pointer_get(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, addresses[0]),
               "cuPointerGetAttribute") ||
        enter(ordinal) < 0)
      return -1;
    result = launch_kernel(&config, self->function, params, NULL);
  }
  return failed(result, "cuLaunchKernelEx") ? -1 : 1;
}

static PyObject *launch_copy(Launch *self) {
  Launch *made = (Launch *)Py_TYPE(self)->tp_alloc(Py_TYPE(self), 0);
  if (!made) return NULL;
  const size_t head = sizeof(PyObject);
  memcpy((char *)made + head, (char *)self + head, sizeof(Launch) - head);
  made->config.attrs = made->attributes;
  Py_INCREF(made->keep);
  return (PyObject *)made;
}

static PyObject *launch_call(PyObject *object, PyObject *args, PyObject *kwargs) {
  Py_ssize_t n = PyTuple_GET_SIZE(args);
  if (n < 1 || (kwargs && PyDict_GET_SIZE(kwargs))) {
    PyErr_SetString(PyExc_TypeError, "a launch is called with (stream, *tensors)");
    return NULL;
  }
  unsigned long long stream = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(args, 0));
  if (stream == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
  PyObject *const *tensors = ((PyTupleObject *)args)->ob_item + 1;
  int done = launch_run((Launch *)object, (CUstream)(uintptr_t)stream, tensors, n - 1);
  return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyTypeObject LaunchType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "graphquant_launch.Launch",
    .tp_basicsize = sizeof(Launch),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = launch_new,
    .tp_dealloc = launch_free,
    .tp_call = launch_call,
};

/* --------------------------------------------------------------------------------------- Site */

typedef struct {
  PyObject_HEAD
  PyObject *prepare;
  Launch *launch; /* or NULL */
  vectorcallfunc call;
} Site;

static PyObject *site_call(PyObject *object, PyObject *const *args, size_t nargsf, PyObject *names) {
  Site *self = (Site *)object;
  Py_ssize_t n = PyVectorcall_NARGS(nargsf);
  if (n < 1 || (names && PyTuple_GET_SIZE(names))) {
    PyErr_SetString(PyExc_TypeError, "a site is called with (stream, *tensors)");
    return NULL;
  }
  if (self->launch) {
    unsigned long long stream = PyLong_AsUnsignedLongLong(args[0]);
    if (stream == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    Launch *launch = self->launch;
    Py_INCREF(launch); /* another thread may prepare meanwhile */
    int done = launch_run(launch, (CUstream)(uintptr_t)stream, args + 1, n - 1);
    Py_DECREF(launch);
    if (done < 0) return NULL;
    if (done) Py_RETURN_NONE;
  }
  PyObject *made = PyObject_Vectorcall(self->prepare, args + 1, n - 1, NULL);
  if (!made) return NULL;
  if (made != Py_None && !Py_IS_TYPE(made, &LaunchType)) {
    Py_DECREF(made);
    PyErr_SetString(PyExc_TypeError, "prepare must return a Launch or None");
    return NULL;
  }
  if (made == Py_None) {
    Py_DECREF(made);
  } else {
    Launch *old = self->launch;
    self->launch = (Launch *)made;
    Py_XDECREF(old);
  }
  Py_RETURN_NONE;
}

static PyObject *site_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"prepare", NULL};
  PyObject *prepare;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &prepare)) return NULL;
  Site *self = (Site *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  Py_INCREF(prepare);
  self->prepare = prepare;
  self->call = site_call;
  return (PyObject *)self;
}

static void site_free(PyObject *object) {
  Py_XDECREF(((Site *)object)->prepare);
  Py_XDECREF(((Site *)object)->launch);
  Py_TYPE(object)->tp_free(object);
}

static PyObject *site_copy(PyObject *object, PyObject *unused) {
  Site *self = (Site *)object, *made = (Site *)Py_TYPE(object)->tp_alloc(Py_TYPE(object), 0);
  if (!made) return NULL;
  Py_INCREF(self->prepare);
  made->prepare = self->prepare;
  made->call = site_call;
  if (self->launch && !(made->launch = (Launch *)launch_copy(self->launch))) {
    Py_DECREF(made);
    return NULL;
  }
  return (PyObject *)made;
}

static PyMethodDef site_methods[] = {
    {"copy", site_copy, METH_NOARGS, "A Site with a copy of this one's Launch."}, {NULL}};

static PyObject *site_ready(PyObject *object, void *unused) {
  return PyBool_FromLong(((Site *)object)->launch != NULL);
}

static PyGetSetDef site_attributes[] = {
    {"ready", site_ready, NULL, "Does the next call launch without Python?", NULL}, {NULL}};

static PyTypeObject SiteType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "graphquant_launch.Site",
    .tp_basicsize = sizeof(Site),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = site_new,
    .tp_dealloc = site_free,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Site, call),
    .tp_getset = site_attributes,
    .tp_methods = site_methods,
};

/* ------------------------------------------------------------------------------------- module */

static PyObject *load(PyObject *module, PyObject *args) {
  const char *cubin, *name;
  Py_ssize_t size;
  int device, shared;
  CUcontext context;
  CUmodule loaded;
  CUfunction function;
  if (!PyArg_ParseTuple(args, "iy#si", &device, &cubin, &size, &name, &shared)) return NULL;
  if (failed(context_get(&context), "cuCtxGetCurrent") || (!context && enter(device) < 0))
    return NULL;
  if (failed(module_load(&loaded, cubin), "cuModuleLoadData") ||
      failed(module_function(&function, loaded, name), name) ||
      failed(function_set(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
             "cuFuncSetAttribute"))
    return NULL;
  return PyLong_FromUnsignedLongLong((uintptr_t)function);
}

static PyMethodDef functions[] = {
    {"load", load, METH_VARARGS, "load(device: int, cubin: bytes, name: str, shared: int) -> int"}, {NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "graphquant_launch", NULL, -1,
                                        functions};

PyMODINIT_FUNC PyInit_graphquant_launch(void) {
  if (find_driver() < 0 || PyType_Ready(&LaunchType) < 0 || PyType_Ready(&SiteType) < 0) return NULL;
  if (!(data_ptr_name = PyUnicode_InternFromString("data_ptr"))) return NULL;
  PyObject *module = PyModule_Create(&definition);
  if (!module) return NULL;
  Py_INCREF(&LaunchType);
  Py_INCREF(&SiteType);
  if (PyModule_AddObject(module, "Launch", (PyObject *)&LaunchType) < 0 ||
      PyModule_AddObject(module, "Site", (PyObject *)&SiteType) < 0)
    return NULL;
  return module;
}
