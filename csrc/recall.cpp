#include "recall.h"

#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "cpu/operators/fingerprint.h"

namespace dla_fast {
namespace {

namespace py = pybind11;

// Whether somebody sees operators, or wants others: modes, transforms, tracing, autocast.
bool is_watched(at::ScalarType dtype) {
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 || torch::jit::tracer::isTracing() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         (at::autocast::is_autocast_enabled(at::kCPU) && at::autocast::get_autocast_dtype(at::kCPU) != dtype);
}

// The tensors of a call; false where one is not plain, or a gradient is wanted.
struct Given {
  std::vector<at::Tensor> xs;
  std::optional<at::Tensor> residual;
  int64_t residual_input = -1;

  bool read(const py::sequence& given, const py::object& added) {
    xs.reserve(given.size());
    for (const py::handle x : given) {
      if (!THPVariable_CheckExact(x.ptr())) return false;
      xs.push_back(THPVariable_Unpack(x.ptr()));
    }
    return !xs.empty() && add(added);
  }

  bool add(const py::object& added) {
    if (py::isinstance<py::int_>(added)) {
      residual_input = added.cast<int64_t>();
      if (residual_input < 0) return false;
    } else if (!added.is_none()) {
      if (!THPVariable_CheckExact(added.ptr())) return false;
      residual = THPVariable_Unpack(added.ptr());
    }
    return true;
  }

  bool wants_gradient() const {
    for (const at::Tensor& x : xs) {
      if (x.requires_grad()) return true;
    }
    return residual.has_value() && residual->requires_grad();
  }
};

// Some of a tuple of modules: from its first one on, or those of two numbers.
struct Modules {
  PyObject* all;
  size_t first = 0, second = 1;

  PyObject* operator[](size_t i) const {
    const size_t number = i == 0 ? first : i == 1 ? second : i;
    if (number >= static_cast<size_t>(PyTuple_GET_SIZE(all))) throw py::index_error("facts: there is no such module");
    return PyTuple_GET_ITEM(all, number);
  }
};

bool hold(const py::tuple& facts, const Modules& modules) {
  py::object own;  // the __dict__ of the last module that was asked about
  size_t owner = 0;
  for (size_t i = 0; i + 2 < facts.size(); i += 3) {
    PyObject* where = PyTuple_GET_ITEM(facts.ptr(), i);
    PyObject* const key = PyTuple_GET_ITEM(facts.ptr(), i + 1);
    PyObject* const expected = PyTuple_GET_ITEM(facts.ptr(), i + 2);
    if (PyLong_Check(where)) {
      const size_t number = PyLong_AsSize_t(where);
      PyObject* const module = modules[number];
      if (PyType_Check(key)) {
        if (Py_TYPE(module) != reinterpret_cast<PyTypeObject*>(key)) return false;
        continue;
      }
      if (!own || number != owner) {
        own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
        if (!own) throw py::error_already_set();
        owner = number;
      }
      where = own.ptr();
    }
    if (!PyDict_Check(where)) throw py::type_error("facts: expected a dict, or the number of a module");
    if (PyLong_Check(key)) {
      if (PyDict_Size(where) != PyLong_AsLong(key)) return false;
      continue;
    }
    PyObject* const found = PyDict_GetItemWithError(where, key);
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if ((found == nullptr ? Py_Ellipsis : found) != expected) return false;
  }
  return true;
}

std::vector<cpu::OptionalTensor> unpacked(const py::tuple& tensors) {
  std::vector<cpu::OptionalTensor> out;
  out.reserve(tensors.size());
  for (const py::handle t : tensors) {
    if (!t.is_none() && !THPVariable_Check(t.ptr())) throw py::type_error("tensors: expected tensors or None");
    out.emplace_back(t.is_none() ? cpu::OptionalTensor() : THPVariable_Unpack(t.ptr()));
  }
  return out;
}

int64_t kind_of(int64_t mark, const std::vector<cpu::OptionalTensor>& tensors, const Given& given) {
  const at::ScalarType dtype = tensors.at(0)->scalar_type();
  if (mark == 0 || is_watched(dtype)) return 0;
  if (c10::GradMode::is_enabled()) {
    if (given.wants_gradient()) return 0;
    for (const cpu::OptionalTensor& t : tensors) {
      if (t.has_value() && t->requires_grad()) return 0;
    }
  }
  return cpu::kind_of_call(mark, dtype, given.xs, given.residual, given.residual_input);
}

}  // namespace

bool unchanged(const py::tuple& modules, const py::tuple& facts) {
  return hold(facts, {modules.ptr()});
}

int64_t kind_of(int64_t mark, const py::tuple& tensors, const py::sequence& xs, const py::object& residual) {
  Given given;
  return given.read(xs, residual) ? kind_of(mark, unpacked(tensors), given) : 0;
}

py::object recall(const py::tuple& modules, const py::tuple& facts, const py::tuple& units, const py::sequence& xs,
                  const py::object& residual) {
  Given given;
  if (!hold(facts, {modules.ptr()}) || !given.read(xs, py::none())) return py::none();
  for (size_t i = 0; i < units.size(); ++i) {
    const auto unit = units[i].cast<py::tuple>();
    const Modules pair = {modules.ptr(), unit[0].cast<size_t>(), unit[1].cast<size_t>()};
    if (!hold(unit[2].cast<py::tuple>(), pair)) return py::none();
    if (i + 1 == units.size() && !given.add(residual)) return py::none();
    const auto tensors = unpacked(unit[3].cast<py::tuple>());
    const py::int_ kind(kind_of(cpu::fingerprint(tensors), tensors, given));
    PyObject* const found = PyDict_GetItemWithError(unit[4].cast<py::dict>().ptr(), kind.ptr());
    if (found == nullptr) return py::none();
    // Who has the lock next may forget it.
    const auto kept = py::reinterpret_borrow<py::object>(found);
    const auto& call = kept.cast<const cpu::PackedCall&>();
    const py::gil_scoped_release released;
    at::Tensor y = cpu::conv_norm_act_packed(call, given.xs, {}, given.residual);
    given.xs.assign(1, std::move(y));
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(given.xs[0])));
}

}  // namespace dla_fast
