// Operators as functions of the module: the same calls of the dispatcher, of arguments that are converted to what
// kernels take and not to boxed values first, which for small maps costs as much as the kernel.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

namespace dla_fast {

// What Python gives for an argument of a kernel, and the argument.
template <class T>
struct Given {
  using type = T;
  static const type& argument(const type& given) { return given; }
};
template <class T>
struct Given<const T&> : Given<T> {};
template <>
struct Given<at::TensorList> {
  using type = std::vector<at::Tensor>;
  static const type& argument(const type& given) { return given; }
};
template <>
struct Given<at::IntArrayRef> {
  using type = std::vector<int64_t>;
  static const type& argument(const type& given) { return given; }
};
template <>
struct Given<std::string_view> {
  using type = std::string;
  static const type& argument(const type& given) { return given; }
};
template <>
struct Given<c10::List<bool>> {
  using type = std::vector<bool>;
  static c10::List<bool> argument(const type& given) {
    c10::List<bool> list;
    for (const bool value : given) list.push_back(value);
    return list;
  }
};

template <auto kernel, class Result, class... Arguments>
void define_direct(pybind11::module& m, const std::string& name, Result (*)(Arguments...)) {
  m.def(
      name.c_str(),
      [full = "dla_fast_cpu::" + name](const typename Given<Arguments>::type&... given) {
        // Schemas are defined after this module is loaded.
        static const auto op =
            c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), "").typed<Result(Arguments...)>();
        return op.call(Given<Arguments>::argument(given)...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>(), "The operator of this name.");
}

// The operator of a kernel; one instance per kernel, as each keeps its operator.
template <auto kernel>
void define_direct(pybind11::module& m, const std::string& name) {
  define_direct<kernel>(m, name, kernel);
}

}  // namespace dla_fast
