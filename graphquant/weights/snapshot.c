/* Snapshot of tensors: detects that they were changed or replaced.
 *
 * Snapshot(positions, tensors, addresses, storages, samples, version, address, expired)
 * unchanged(args) -> bool
 *
 * positions  of the tensors among the args of a call
 * addresses  of the first values; 0 for a released weight, whose data_ptr() raises
 * storages   weak references to their storages, with a `cdata` that `expired` takes
 * samples    for each tensor None, or (bytes per value, byte offsets from the first element as the
 *            bytes of an int64 array, the values): only for tensors on the CPU
 * version, address, expired   TensorBase._version, TensorBase.data_ptr, StorageBase._expired: the
 *            functions behind them are called without the interpreter
 *
 * The tensors are not kept alive. They are compared by the address of the object, so a Snapshot
 * must be dropped when one of them dies.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  Py_ssize_t position;
  PyObject *object; /* borrowed: only its address is compared */
  PyObject *weak, *storage; /* the weak reference, and its `cdata` */
  int has_version; /* inference tensors have none */
  long long version;
  void *address; /* NULL for a released weight */
  Py_ssize_t width, count; /* of the samples */
  int64_t *offsets;
  char *values;
} Root;

typedef struct {
  PyObject_HEAD
  Py_ssize_t count;
  Root *roots;
} Snapshot;

static getter version_of;
static PyCFunction address_of, expired_of;
static PyObject *expired_self;

static int find_functions(PyObject *version, PyObject *address, PyObject *expired) {
  if (Py_TYPE(version) != &PyGetSetDescr_Type || Py_TYPE(address) != &PyMethodDescr_Type ||
      !PyCFunction_Check(expired) || PyCFunction_GET_FLAGS(expired) != (METH_O | METH_STATIC) ||
      ((PyMethodDescrObject *)address)->d_method->ml_flags != METH_NOARGS ||
      ((PyGetSetDescrObject *)version)->d_getset->closure) {
    PyErr_SetString(PyExc_TypeError, "this torch defines _version, data_ptr or _expired differently");
    return -1;
  }
  version_of = ((PyGetSetDescrObject *)version)->d_getset->get;
  address_of = ((PyMethodDescrObject *)address)->d_method->ml_meth;
  expired_of = PyCFunction_GET_FUNCTION(expired);
  expired_self = PyCFunction_GET_SELF(expired);
  return 0;
}

static int version(PyObject *tensor, long long *result) {
  PyObject *got = version_of(tensor, NULL);
  if (!got) return -1;
  *result = PyLong_AsLongLong(got);
  Py_DECREF(got);
  return PyErr_Occurred() ? -1 : 0;
}

static int address(PyObject *tensor, void **result) {
  PyObject *got = address_of(tensor, NULL);
  if (!got) return -1;
  *result = PyLong_AsVoidPtr(got);
  Py_DECREF(got);
  return PyErr_Occurred() ? -1 : 0;
}

static int take_samples(Root *root, PyObject *samples) {
  const char *offsets, *values;
  Py_ssize_t offset_bytes, value_bytes;
  if (samples == Py_None) return 0;
  if (!PyArg_ParseTuple(samples, "ny#y#", &root->width, &offsets, &offset_bytes, &values,
                        &value_bytes))
    return -1;
  root->count = offset_bytes / (Py_ssize_t)sizeof(int64_t);
  if (value_bytes != root->count * root->width) {
    PyErr_SetString(PyExc_ValueError, "as many values as offsets are needed");
    return -1;
  }
  root->offsets = PyMem_Malloc(offset_bytes + 1);
  root->values = PyMem_Malloc(value_bytes + 1);
  if (!root->offsets || !root->values) {
    PyErr_NoMemory();
    return -1;
  }
  memcpy(root->offsets, offsets, offset_bytes);
  memcpy(root->values, values, value_bytes);
  return 0;
}

static void snapshot_dealloc(Snapshot *self) {
  PyTypeObject *type = Py_TYPE(self);
  for (Py_ssize_t i = 0; i < self->count; ++i) {
    Py_XDECREF(self->roots[i].storage);
    Py_XDECREF(self->roots[i].weak);
    PyMem_Free(self->roots[i].offsets);
    PyMem_Free(self->roots[i].values);
  }
  PyMem_Free(self->roots);
  type->tp_free(self);
  Py_DECREF(type);
}

static PyObject *snapshot_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  PyObject *positions, *tensors, *addresses, *storages, *samples, *version_, *address_, *expired;
  if (!PyArg_ParseTuple(args, "O!O!O!O!O!OOO", &PyTuple_Type, &positions, &PyTuple_Type, &tensors,
                        &PyTuple_Type, &addresses, &PyTuple_Type, &storages, &PyTuple_Type,
                        &samples, &version_, &address_, &expired) ||
      find_functions(version_, address_, expired))
    return NULL;
  Py_ssize_t count = PyTuple_GET_SIZE(tensors);
  if (PyTuple_GET_SIZE(positions) != count || PyTuple_GET_SIZE(addresses) != count ||
      PyTuple_GET_SIZE(storages) != count ||
      PyTuple_GET_SIZE(samples) != count) {
    PyErr_SetString(PyExc_ValueError, "tuples of equal length are needed");
    return NULL;
  }
  Snapshot *self = (Snapshot *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->roots = PyMem_Calloc(count + 1, sizeof(Root));
  if (!self->roots) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  self->count = count;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Root *root = &self->roots[i];
    root->position = PyLong_AsSsize_t(PyTuple_GET_ITEM(positions, i));
    root->object = PyTuple_GET_ITEM(tensors, i);
    root->weak = PyTuple_GET_ITEM(storages, i);
    Py_INCREF(root->weak);
    root->storage = PyObject_GetAttrString(root->weak, "cdata");
    if (!root->storage) goto failed;
    root->has_version = !version(root->object, &root->version);
    if (!root->has_version) {
      if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) goto failed;
      PyErr_Clear();
    }
    root->address = PyLong_AsVoidPtr(PyTuple_GET_ITEM(addresses, i));
    if (PyErr_Occurred() || take_samples(root, PyTuple_GET_ITEM(samples, i))) goto failed;
  }
  return (PyObject *)self;
failed:
  Py_DECREF(self);
  return NULL;
}

/* 1 or 0; -1 with an exception set. */
static int same(const Root *root, PyObject *tensor) {
  long long now_version = 0;
  void *now_address;
  if (tensor != root->object) return 0;
  if (root->has_version && version(tensor, &now_version)) return -1;
  if (root->has_version && now_version != root->version) return 0;
  if (root->address) {
    if (address(tensor, &now_address)) return -1;
    if (now_address != root->address) return 0;
  }
  PyObject *expired = expired_of(expired_self, root->storage);
  if (!expired) return -1;
  Py_DECREF(expired);
  if (expired != Py_False) return 0;
  const char *data = root->address;
  for (Py_ssize_t i = 0; i < root->count; ++i)
    if (memcmp(data + root->offsets[i], root->values + i * root->width, root->width)) return 0;
  return 1;
}

static PyObject *snapshot_unchanged(Snapshot *self, PyObject *args) {
  PyObject *sequence = PySequence_Fast(args, "a sequence is needed");
  if (!sequence) return NULL;
  int result = 1;
  for (Py_ssize_t i = 0; i < self->count && result == 1; ++i) {
    const Root *root = &self->roots[i];
    result = root->position < PySequence_Fast_GET_SIZE(sequence)
                 ? same(root, PySequence_Fast_GET_ITEM(sequence, root->position))
                 : 0;
  }
  Py_DECREF(sequence);
  if (result < 0) { /* another tensor at this position has no version */
    PyErr_Clear();
    result = 0;
  }
  return PyBool_FromLong(result);
}

static PyMethodDef snapshot_methods[] = {
    {"unchanged", (PyCFunction)snapshot_unchanged, METH_O, "Whether these tensors are unchanged."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot snapshot_slots[] = {
    {Py_tp_new, snapshot_new},
    {Py_tp_dealloc, snapshot_dealloc},
    {Py_tp_methods, snapshot_methods},
    {0, NULL},
};

static PyType_Spec snapshot_spec = {
    .name = "graphquant_snapshot.Snapshot",
    .basicsize = sizeof(Snapshot),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = snapshot_slots,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "graphquant_snapshot", NULL, -1};

PyMODINIT_FUNC PyInit_graphquant_snapshot(void) {
  PyObject *made = PyModule_Create(&module);
  PyObject *type = PyType_FromSpec(&snapshot_spec);
  if (!made || !type || PyModule_AddObject(made, "Snapshot", type)) {
    Py_XDECREF(type);
    Py_XDECREF(made);
    return NULL;
  }
  return made;
}
