// Products of codes and lists, for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "module.hpp"

namespace snip {

namespace {

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
    HitRule rule{limits.data(), nullptr, nullptr, nullptr, nullptr, nullptr,
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
        rule.wide_starts = scratch<std::int32_t>(count);
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

// Records of bytes in parts; each part but the last has `size` of them.
class Records {
  public:
    Records(std::vector<Table<std::uint8_t>> parts, std::size_t size, std::vector<std::size_t> widths)
        : parts_(std::move(parts)), size_(size), widths_(std::move(widths)) {
        for (std::size_t width : widths_) record_ += width;
        if (!size) throw std::invalid_argument("no records in a part");
        for (const auto &part : parts_) {
            same(part.shape(1), record_, "widths of parts and fields");
            if (&part != &parts_.back()) same(part.shape(0), size, "records of parts");
        }
    }
    // Copy records to `memory`, field after field. Places lie far apart, so they are asked for ahead.
    void take(const Array<std::int64_t> &places,
              const nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> &memory) const {
        constexpr std::size_t AHEAD = 16, LINE = 64;
        const std::size_t count = places.size();
        same(memory.size(), count * record_, "memory and records");
        nb::gil_scoped_release free;
        for (std::size_t n = 0; n < count; n++) find(places.data()[n]);  // all are there
        for (std::size_t n = 0; n < count; n++) {
            if (n + AHEAD < count) {
                const std::uint8_t *next = find(places.data()[n + AHEAD]);
                for (std::size_t k = 0; k < record_; k += LINE) __builtin_prefetch(next + k);
            }
            const std::uint8_t *from = find(places.data()[n]);
            std::uint8_t *field = memory.data();
            for (std::size_t width : widths_) {
                std::memcpy(field + n * width, from, width);
                from += width;
                field += count * width;
            }
        }
    }

  private:
    const std::uint8_t *find(std::int64_t place) const {
        const std::size_t part = (std::uint64_t)place / size_, at = (std::uint64_t)place % size_;
        if (part >= parts_.size() || at >= parts_[part].shape(0))
            throw std::out_of_range("no such record");
        return parts_[part].data() + at * record_;
    }
    std::vector<Table<std::uint8_t>> parts_;
    std::size_t size_, record_ = 0;
    std::vector<std::size_t> widths_;
};

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

}  // namespace

void bind_codes(nb::module_ &m) {
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
    nb::class_<Records>(m, "Records")
        .def(nb::init<std::vector<Table<std::uint8_t>>, std::size_t, std::vector<std::size_t>>())
        .def("take", &Records::take);
    m.def("dots", &dots);
}

}  // namespace snip
