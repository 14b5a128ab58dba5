// Arrays that pass between Python and the kernels, and codes and matrices made ready for products.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"

namespace snip {

namespace nb = nanobind;

template <class Value>
using Array = nb::ndarray<const Value, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class Value>
using Table = nb::ndarray<const Value, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class Value>
using Maybe = std::optional<Array<Value>>;
using Made = nb::ndarray<nb::numpy>;

// Memory that Python frees, and a view of it as an array.
template <class Value>
struct Owned {
    std::unique_ptr<Value[]> values;
    std::vector<std::size_t> shape;

    Owned(std::initializer_list<std::size_t> sizes) : shape(sizes) {
        std::size_t size = 1;
        for (std::size_t side : shape) size *= side;
        values.reset(new Value[size ? size : 1]);
    }
    Value *get() { return values.get(); }
    Made array() {
        nb::capsule owner(values.get(), [](void *p) noexcept { delete[] (Value *)p; });
        return Made(values.release(), shape.size(), shape.data(), owner, nullptr,
                    nb::dtype<Value>());
    }
};

// Scratch that a thread keeps from call to call.
template <class Value>
Value *scratch(std::size_t size) {
    static thread_local std::vector<Value> held;
    if (held.size() < size) held.resize(size);
    return held.data();
}

struct Found : Pairs {
    Found() : Pairs{nullptr, nullptr, 0, 0, more} { more(this, 1024); }
    ~Found() {
        std::free(first);
        std::free(second);
    }
    Found(const Found &) = delete;
    static void more(Pairs *pairs, std::size_t count) {
        const std::size_t room = 2 * pairs->room + count;
        auto *a = (std::int32_t *)std::realloc(pairs->first, 4 * room);
        if (a) pairs->first = a;
        auto *b = (std::int32_t *)std::realloc(pairs->second, 4 * room);
        if (b) pairs->second = b;
        if (!a || !b) throw std::bad_alloc();
        pairs->room = room;
    }
    std::pair<Made, Made> arrays() { return {give(first), give(second)}; }

  private:
    Made give(std::int32_t *&values) {
        std::int32_t *given = std::exchange(values, nullptr);
        nb::capsule owner(given, [](void *p) noexcept { std::free(p); });
        return Made(given, 1, &size, owner, nullptr, nb::dtype<std::int32_t>());
    }
};

inline Codes codes_of(const Table<std::int8_t> &table) {
    return {table.data(), table.shape(0), table.shape(1)};
}

inline void same(std::size_t a, std::size_t b, const char *what) {
    if (a != b) throw std::invalid_argument(std::string(what) + " do not match");
}

// Rows of floats are passed as bytes, with the size of a value: nanobind knows no float16.
struct Stored {
    const void *data;
    int bytes;
    std::size_t count, dim;
    Stored(const Table<std::uint8_t> &rows, int size)
        : data(rows.data()), bytes(size), count(rows.shape(0)),
          dim(rows.shape(1) / (std::size_t)size) {
        if (size != 2 && size != 4 && size != 8) throw std::invalid_argument("no float type");
    }
};

// Columns of products, packed; see kernels.hpp.
class PackedColumns {
  public:
    PackedColumns(const Table<std::int8_t> &codes, const Maybe<std::int32_t> &falls)
        : count_(codes.shape(0)), width_(codes.shape(1)), padded_((width_ + 3) / 4 * 4) {
        const std::size_t whole = (count_ + PANEL - 1) / PANEL * PANEL;
        packed_.assign(whole * padded_, 0);
        starts_.assign(whole, 0);
        turned_.assign(whole, 0);
        if (falls) {
            same(falls->size(), count_, "columns and falls");
            for (std::size_t c = 0; c < count_; c++) starts_[c] = turned_[c] = falls->data()[c];
        }
        sizes_.assign(whole, INT32_MAX);  // columns that are none are far away
        raw_.assign(codes.data(), codes.data() + count_ * width_);
        for (std::size_t c = 0; c < count_; c++) {
            sizes_[c] = 0;
            std::int8_t *group = packed_.data() + c / GROUP * GROUP * padded_ + c % GROUP * 4;
            for (std::size_t k = 0; k < width_; k++) {
                const std::int8_t value = raw_[c * width_ + k];
                group[k / 4 * 4 * GROUP + k % 4] = value;
                turned_[c] -= 128 * value;
                sizes_[c] += value * value;
            }
        }
    }
    Columns columns() const { return {packed_.data(), starts_.data(), turned_.data(), count_, padded_}; }
    Codes codes() const { return {raw_.data(), count_, width_}; }
    const std::int32_t *sizes() const { return sizes_.data(); }
    std::uint8_t *turned(std::size_t rows) const {
        return scratch<std::uint8_t>((rows + ROWS) * padded_);
    }

  private:
    std::size_t count_, width_, padded_;
    std::vector<std::int8_t> packed_, raw_;
    std::vector<std::int32_t> starts_, turned_, sizes_;
};

// A (dim, width) matrix of small integers, packed for products with int16 rows.
class PackedMatrix {
  public:
    explicit PackedMatrix(const Table<std::int8_t> &matrix)
        : dim_(matrix.shape(0)), width_(matrix.shape(1)), padded_((width_ + PANEL - 1) / PANEL * PANEL),
          packed_((dim_ + 1) / 2 * 2 * padded_, 0) {
        for (std::size_t k = 0; k < dim_; k++)
            for (std::size_t c = 0; c < width_; c++)
                packed_[c / GROUP * GROUP * ((dim_ + 1) / 2 * 2) + k / 2 * 2 * GROUP +
                        c % GROUP * 2 + k % 2] = matrix.data()[k * width_ + c];
    }
    Made project(const Kernels &kernels, const Table<std::int16_t> &rows) const {
        same(rows.shape(1), dim_, "widths of rows and matrix");
        const std::size_t count = rows.shape(0), even = (dim_ + 1) / 2 * 2;
        Owned<float> out({count, width_});
        {
            nb::gil_scoped_release free;
            const std::int16_t *values = rows.data();
            if (even != dim_) {
                std::int16_t *wide = scratch<std::int16_t>(count * even);
                for (std::size_t n = 0; n < count; n++) {
                    std::memcpy(wide + n * even, values + n * dim_, 2 * dim_);
                    wide[n * even + dim_] = 0;
                }
                values = wide;
            }
            kernels.project(values, count, even, packed_.data(), width_, out.get());
        }
        return out.array();
    }

  private:
    std::size_t dim_, width_, padded_;
    std::vector<std::int16_t> packed_;
};

}  // namespace snip
