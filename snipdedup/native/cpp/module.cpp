// Kernels for Python: arrays in, arrays out, without the interpreter's lock while they run.
//
// Shapes and types are those of fallback.py, which computes the same with numpy.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "arrays.hpp"
#include "forest.hpp"

namespace {

using namespace snip;

const Kernels *kernels = &portable;

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

Made products(const Table<std::int8_t> &rows, const PackedColumns &columns) {
    const Codes codes = codes_of(rows);
    same(codes.width, columns.codes().width, "widths of rows and columns");
    Owned<std::int32_t> out({codes.count, columns.columns().count});
    {
        nb::gil_scoped_release free;
        kernels->products(codes, columns.columns(), out.get(), columns.columns().count,
                          columns.turned(codes.count));
    }
    return out.array();
}

std::pair<Made, Made> hits(const Table<std::int8_t> &rows, const PackedColumns &columns,
                           const Array<std::int32_t> &limits,
                           const std::optional<Table<std::int8_t>> &wide_rows,
                           const std::optional<Table<std::int8_t>> &wide_columns,
                           const Maybe<std::int32_t> &wide_limits,
                           const Maybe<std::int32_t> &wide_falls, std::int64_t first,
                           const Maybe<bool> &reference_rows,
                           const Maybe<bool> &reference_columns, bool references_only) {
    const Codes codes = codes_of(rows);
    const std::size_t count = columns.columns().count;
    same(codes.width, columns.codes().width, "widths of rows and columns");
    same(limits.size(), codes.count, "rows and limits");
    Codes x{}, y{};
    HitRule rule{limits.data(), nullptr, nullptr, nullptr,        nullptr,
                 first,         nullptr, nullptr, references_only};
    if (wide_rows) {
        x = codes_of(*wide_rows);
        y = codes_of(wide_columns.value());
        same(x.count, codes.count, "rows and wide rows");
        same(y.count, count, "columns and wide columns");
        same(x.width, y.width, "widths of wide rows and columns");
        same(wide_limits.value().size(), codes.count, "rows and wide limits");
        rule.wide_rows = &x;
        rule.wide_columns = &y;
        same(wide_falls.value().size(), count, "columns and wide falls");
        rule.wide_limits = wide_limits->data();
        rule.wide_falls = wide_falls->data();
    }
    if (reference_rows) {
        same(reference_rows->size(), codes.count, "rows and reference rows");
        same(reference_columns.value().size(), count, "columns and reference columns");
        rule.reference_rows = (const std::uint8_t *)reference_rows->data();
        rule.reference_columns = (const std::uint8_t *)reference_columns->data();
    }
    Found found;
    {
        nb::gil_scoped_release free;
        kernels->hits(codes, columns.columns(), rule, found, columns.turned(codes.count));
    }
    return found.arrays();
}

std::tuple<Made, Made, Made, Made> assign(const Table<std::int8_t> &rows,
                                          const PackedColumns &centroids,
                                          const Maybe<float> &widest,
                                          const std::optional<Table<float>> &distances,
                                          const Maybe<float> &radius) {
    const Codes codes = codes_of(rows);
    const Columns columns = centroids.columns();
    same(codes.width, centroids.codes().width, "widths of rows and centroids");
    if (!columns.count) throw std::invalid_argument("no centroids");
    if (radius) {
        same(radius->size(), codes.count, "rows and radii");
        same(widest.value().size(), columns.count, "centroids and distances");
    }
    if (distances) {
        same(distances->shape(0), columns.count, "centroids and distances");
        same(distances->shape(1), columns.count, "centroids and distances");
    }
    const Lists lists{columns, centroids.codes(), centroids.sizes(),
                      radius ? widest->data() : nullptr,
                      distances ? distances->data() : nullptr};
    Owned<std::int32_t> home({codes.count}), best({codes.count});
    Found visits;
    {
        nb::gil_scoped_release free;
        const std::size_t stride = (columns.count + PANEL - 1) / PANEL * PANEL;
        kernels->assign(codes, lists, radius ? radius->data() : nullptr, home.get(), best.get(),
                        radius ? &visits : nullptr, centroids.turned(codes.count),
                        scratch<std::int32_t>(ROWS * stride));
    }
    const auto [row, list] = visits.arrays();
    return {home.array(), best.array(), row, list};
}

// target[at[n]] = source[places[n]], rows of bytes.
void copy_rows(const Table<std::uint8_t> &source, const Array<std::int64_t> &places,
               const nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> &target,
               const Array<std::int64_t> &at) {
    const std::size_t width = source.shape(1);
    same(width, target.shape(1), "widths");
    same(places.size(), at.size(), "numbers of places");
    nb::gil_scoped_release free;
    for (std::size_t n = 0; n < places.size(); n++) {
        if ((std::uint64_t)places.data()[n] >= source.shape(0) ||
            (std::uint64_t)at.data()[n] >= target.shape(0))
            throw std::out_of_range("no such row");
        std::memcpy(target.data() + (std::size_t)at.data()[n] * width,
                    source.data() + (std::size_t)places.data()[n] * width, width);
    }
}

Made dots(const Table<std::int8_t> &x, const Table<std::int8_t> &y) {
    const Codes a = codes_of(x), b = codes_of(y);
    same(a.count, b.count, "numbers of rows");
    same(a.width, b.width, "widths");
    Owned<std::int32_t> out({a.count});
    {
        nb::gil_scoped_release free;
        kernels->dots(a, b, out.get());
    }
    return out.array();
}

Made widen(const Table<std::uint8_t> &rows, int bytes) {
    const Stored stored(rows, bytes);
    Owned<float> out({stored.count, stored.dim});
    {
        nb::gil_scoped_release free;
        kernels->widen(stored.data, bytes, stored.count * stored.dim, out.get());
    }
    return out.array();
}

std::pair<Made, Made> whole(const Table<std::uint8_t> &rows, int bytes, float longest) {
    const Stored stored(rows, bytes);
    Owned<std::int16_t> out({stored.count, stored.dim});
    Owned<float> norms({stored.count});
    {
        nb::gil_scoped_release free;
        kernels->whole(stored.data, bytes, stored.count, stored.dim, longest, out.get(),
                       norms.get(), scratch<float>(2 * stored.dim + 2));
    }
    return {out.array(), norms.array()};
}

std::pair<Made, Made> finish(const Table<float> &products, float unit, const Array<float> &axis,
                             float length, float scale) {
    const std::size_t count = products.shape(0), width = products.shape(1);
    same(axis.size(), width, "widths of products and axis");
    Owned<std::int8_t> codes({count, width});
    Owned<std::int32_t> falls({count});
    {
        nb::gil_scoped_release free;
        kernels->finish(products.data(), count, width, unit, axis.data(), length, scale,
                        codes.get(), falls.get(), scratch<float>(2 * width));
    }
    return {codes.array(), falls.array()};
}

Made norms(const Table<std::uint8_t> &rows, int bytes) {
    const Stored stored(rows, bytes);
    Owned<double> out({stored.count});
    {
        nb::gil_scoped_release free;
        kernels->norms(stored.data, bytes, stored.count, stored.dim, out.get());
    }
    return out.array();
}

Made cosines(const Table<std::uint8_t> &x, const Array<double> &x_norms,
             const Table<std::uint8_t> &y, const Array<double> &y_norms, int bytes,
             const Array<std::int64_t> &i, const Array<std::int64_t> &j) {
    const Stored a(x, bytes), b(y, bytes);
    same(a.dim, b.dim, "widths");
    same(i.size(), j.size(), "numbers of places");
    same(a.count, x_norms.size(), "rows and norms");
    same(b.count, y_norms.size(), "rows and norms");
    for (std::size_t n = 0; n < i.size(); n++)
        if ((std::uint64_t)i.data()[n] >= a.count || (std::uint64_t)j.data()[n] >= b.count)
            throw nb::index_error("no such row");
    Owned<float> out({i.size()});
    {
        nb::gil_scoped_release free;
        kernels->cosines(a.data, x_norms.data(), b.data, y_norms.data(), bytes, a.dim, i.data(),
                         j.data(), i.size(), out.get(), scratch<double>(a.dim));
    }
    return out.array();
}

Made table(const Table<std::uint8_t> &x, const Array<double> &x_norms,
           const Table<std::uint8_t> &y, const Array<double> &y_norms, int bytes,
           std::size_t groups) {
    const Stored a(x, bytes), b(y, bytes);
    same(a.dim, b.dim, "widths");
    same(a.count, x_norms.size(), "rows and norms");
    same(b.count, y_norms.size(), "rows and norms");
    if (!groups || a.count % groups || b.count % groups)
        throw std::invalid_argument("rows are no multiple of groups");
    const std::size_t m = a.count / groups, n = b.count / groups;
    const std::size_t row = a.dim * (std::size_t)bytes;
    Owned<float> out({groups, m, n});
    {
        nb::gil_scoped_release free;
        double *work = scratch<double>((2 * 32 + 1) * (a.dim + 8));
        for (std::size_t g = 0; g < groups; g++)
            kernels->table(x.data() + g * m * row, x_norms.data() + g * m, m,
                           y.data() + g * n * row, y_norms.data() + g * n, n, bytes, a.dim,
                           out.get() + g * m * n, work);
    }
    return out.array();
}

Made hashes(const Table<std::uint64_t> &words, const Array<std::uint64_t> &offsets, bool mixed) {
    same(words.shape(1), offsets.size(), "words and offsets");
    if (words.shape(1) % 2) throw std::invalid_argument("an odd number of words");
    Owned<std::uint64_t> out({words.shape(0)});
    {
        nb::gil_scoped_release free;
        kernels->hashes(words.data(), words.shape(0), words.shape(1), offsets.data(), mixed,
                        out.get());
    }
    return out.array();
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
    nb::class_<PackedColumns>(m, "Columns").def(
        nb::init<const Table<std::int8_t> &, const Maybe<std::int32_t> &>(), nb::arg("codes"),
        nb::arg("falls").none());
    nb::class_<PackedMatrix>(m, "Matrix")
        .def(nb::init<const Table<std::int8_t> &>())
        .def("project", [](const PackedMatrix &matrix, const Table<std::int16_t> &rows) {
            return matrix.project(*kernels, rows);
        });
    m.def("products", &products);
    m.def("hits", &hits, nb::arg("rows"), nb::arg("columns"), nb::arg("limits"),
          nb::arg("wide_rows").none(), nb::arg("wide_columns").none(),
          nb::arg("wide_limits").none(), nb::arg("wide_falls").none(), nb::arg("first"), nb::arg("reference_rows").none(),
          nb::arg("reference_columns").none(), nb::arg("references_only"));
    m.def("assign", &assign, nb::arg("rows"), nb::arg("centroids"), nb::arg("widest").none(),
          nb::arg("distances").none(), nb::arg("radius").none());
    m.def("copy_rows", &copy_rows);
    m.def("dots", &dots);
    m.def("widen", &widen);
    m.def("whole", &whole);
    m.def("finish", &finish);
    m.def("norms", &norms);
    m.def("cosines", &cosines);
    m.def("table", &table);
    m.def("hashes", &hashes);
    m.def("decode", &decode_names);
    m.def("common_lengths", &common_lengths_of);
    m.def("join_best", &join_best<std::uint32_t>, nb::arg("start"), nb::arg("end"),
          nb::arg("order").none(), nb::arg("parent").noconvert());
    m.def("join_best", &join_best<std::int64_t>, nb::arg("start"), nb::arg("end"),
          nb::arg("order").none(), nb::arg("parent").noconvert());
}
