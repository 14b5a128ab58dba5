#pragma once

#include <cstddef>
#include <cstdint>

namespace snip {

// What some rows were compared with: `width` names a row (negative: none), and its products.
struct Views {
    const std::int64_t *names;
    const float *products;
    std::size_t count, width;
};

// Estimate the squared length of x - y of each pair: x = rows[at[p]], y = others[p]. `gram` holds,
// for each of `rows`, the products of what its names stand for with one another; `work` has
// common_work(width) numbers. See common.cpp.
void common_lengths(const Views &rows, const float *gram, const std::int64_t *at,
                    const Views &others, double dim, double ridge, double *out, double *work);

constexpr std::size_t common_work(std::size_t width) { return (width + 1) * (width + 1); }

}  // namespace snip
