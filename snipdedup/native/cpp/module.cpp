// The Python module snipdedup.native._kernels.
#include <nanobind/nanobind.h>

NB_MODULE(_kernels, m) {
    m.doc() = "Kernels in C++; snipdedup.native says what each one computes.";
    m.def("compiler", [] { return __VERSION__; }, "The compiler that built this module.");
}
