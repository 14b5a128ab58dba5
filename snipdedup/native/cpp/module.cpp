// Kernels for Python: arrays in, arrays out, without the interpreter's lock while they run.
//
// Shapes and types are those of fallback.py, which computes the same with numpy.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "module.hpp"
#include "forest.hpp"

namespace snip {
const Kernels *kernels = &portable;
}

namespace {

using namespace snip;

std::vector<const Kernels *> usable() {
    std::vector<const Kernels *> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        found.push_back(&vnni);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        found.push_back(&avx2);
#endif
    found.push_back(&portable);
    return found;
}

std::vector<std::string> names() {
    std::vector<std::string> found;
    for (const Kernels *set : usable()) found.push_back(set->name);
    return found;
}

void use(const std::string &name) {
    for (const Kernels *set : usable())
        if (name == set->name) {
            kernels = set;
            return;
        }
    throw std::invalid_argument("no kernels '" + name + "' on this processor");
}

template <class Number>
Made join_best(const Array<std::int64_t> &start, const Array<std::int64_t> &end,
               const Maybe<std::int64_t> &order,
               nb::ndarray<Number, nb::ndim<1>, nb::c_contig, nb::device::cpu> parent) {
    same(start.size(), end.size(), "ends of edges");
    const std::size_t edges = order ? order->size() : start.size();
    for (std::size_t n = 0; n < start.size(); n++)
        if ((std::uint64_t)start.data()[n] >= parent.size() ||
            (std::uint64_t)end.data()[n] >= parent.size())
            throw nb::index_error("no such node");
    for (std::size_t n = 0; order && n < edges; n++)
        if ((std::uint64_t)order->data()[n] >= start.size()) throw nb::index_error("no such edge");
    std::vector<std::int64_t> chosen(edges);
    std::size_t count;
    {
        nb::gil_scoped_release free;
        count = kruskal(start.data(), end.data(), order ? order->data() : nullptr, edges,
                        parent.data(), chosen.data());
    }
    Owned<std::int64_t> out({count});
    if (count) std::memcpy(out.get(), chosen.data(), 8 * count);
    return out.array();
}

template <class Value>
using Cube = nb::ndarray<const Value, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

Made decode_names(const Table<std::int64_t> &names, const Table<std::uint8_t> &codes,
                  const Array<std::int64_t> &starts, const Table<float> &centroids,
                  const Cube<float> &words, bool residual) {
    const std::size_t lists = centroids.shape(0), dim = centroids.shape(1);
    const Coded coded{codes.data(), codes.shape(0), codes.shape(1), starts.data(), centroids.data(),
                      lists, dim, words.data(), residual};
    same(starts.size(), lists + 1, "lists and centroids");
    same(words.shape(0), coded.m, "codes and tables of words");
    same(words.shape(1), 256, "8 bits and words of a table");
    same(words.shape(2) * coded.m, dim, "widths of words and centroids");
    for (std::size_t n = 0; n < names.size(); n++)
        if (names.data()[n] >= (std::int64_t)(coded.count + lists)) throw nb::index_error("no such name");
    Owned<float> out({names.shape(0), names.shape(1), dim});
    {
        nb::gil_scoped_release free;
        kernels->decode(coded, names.data(), names.size(), out.get());
    }
    return out.array();
}

Made common_lengths_of(const Table<std::int64_t> &names, const Table<float> &products,
                       const Cube<float> &vectors, const Array<std::int64_t> &at,
                       const Table<std::int64_t> &other_names, const Table<float> &other_products,
                       double ridge, const Array<double> &limits) {
    const std::size_t count = names.shape(0), width = names.shape(1), pairs = at.size();
    same(products.shape(0), count, "rows and products");
    same(products.shape(1), width, "names and products");
    same(vectors.shape(0), count, "rows and their vectors");
    same(vectors.shape(1), width, "names and vectors");
    same(other_names.shape(0), pairs, "pairs and others");
    same(other_products.shape(0), pairs, "pairs and others");
    same(limits.size(), pairs, "pairs and limits");
    same(other_names.shape(1), width, "names of rows and others");
    same(other_products.shape(1), width, "names and products of others");
    for (std::size_t n = 0; n < pairs; n++)
        if ((std::uint64_t)at.data()[n] >= count) throw nb::index_error("no such row");
    Owned<double> out({pairs});
    {
        nb::gil_scoped_release free;
        kernels->common_lengths({names.data(), products.data(), count, width}, vectors.data(),
                                vectors.shape(2), at.data(),
                                {other_names.data(), other_products.data(), pairs, width}, ridge,
                                limits.data(), out.get(),
                                scratch<double>(2 * (width + 8) * (width + 8)));
    }
    return out.array();
}

}  // namespace

NB_MODULE(_kernels, m) {
    use(names().front());
    m.def("names", &names, "Kernels that this processor has, the fastest first.");
    m.def("use", &use, "Use the kernels of a name from now on.");
    m.def("used", [] { return std::string(kernels->name); });
    bind_codes(m);
    bind_rows(m);
    m.def("decode", &decode_names);
    m.def("common_lengths", &common_lengths_of);
    m.def("join_best", &join_best<std::uint32_t>, nb::arg("start"), nb::arg("end"),
          nb::arg("order").none(), nb::arg("parent").noconvert());
    m.def("join_best", &join_best<std::int64_t>, nb::arg("start"), nb::arg("end"),
          nb::arg("order").none(), nb::arg("parent").noconvert());
}
