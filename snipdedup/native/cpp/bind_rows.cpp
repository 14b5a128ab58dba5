// Stored rows as integers and codes, their cosines and hashes, for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "module.hpp"

namespace snip {

namespace {

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

Made orthonormal(const Table<double> &rows, double least) {
    const std::size_t count = rows.shape(0), dim = rows.shape(1);
    Owned<double> out({count, dim});
    if (rows.size()) std::memcpy(out.get(), rows.data(), 8 * rows.size());
    {
        nb::gil_scoped_release free;
        kernels->orthonormal(out.get(), count, dim, least, scratch<double>(dim + count));
    }
    return out.array();
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

}  // namespace

void bind_rows(nb::module_ &m) {
    m.def("widen", &widen);
    m.def("whole", &whole);
    m.def("finish", &finish);
    m.def("orthonormal", &orthonormal);
    m.def("norms", &norms);
    m.def("cosines", &cosines);
    m.def("table", &table);
    m.def("hashes", &hashes);
}

}  // namespace snip
