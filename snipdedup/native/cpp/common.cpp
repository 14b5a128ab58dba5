// How long x - y is, from the products of x and of y with vectors Q that both were compared with.
//
// v = Q (x - y) is the difference of these products. vᵀ (Q Qᵀ)⁻¹ v is the squared length of x - y
// within the span of Q, r of d dimensions; it is scaled by √(d / r). Elimination of all columns but
// the last of [G v; vᵀ 0], where G is Q Qᵀ and a ridge, leaves -vᵀ G⁻¹ v. Its steps are those of
// fallback.py in the same order, so both give the same bits. Both sides of the symmetric matrix would be
// the same but for rounding: the upper one is used.
#include "common.hpp"

#include <cmath>

namespace snip {

namespace {

// Fill the upper side of [G v; vᵀ 0], `stride` numbers a row; return how many names are common.
std::size_t system_of(const Views &rows, std::size_t row, const float *gram, const Views &others,
                      std::size_t other, double ridge, double *left, std::size_t stride) {
    const std::size_t width = rows.width;
    const std::int64_t *x = rows.names + row * width, *y = others.names + other * width;
    const float *along_x = rows.products + row * width, *along_y = others.products + other * width;
    std::size_t common[256], r = 0;
    double along[256], trace = 0;
    for (std::size_t i = 0; i < width; i++) {
        if (x[i] < 0) continue;
        std::size_t j = 0;
        while (j < width && y[j] != x[i]) j++;
        if (j == width) continue;
        along[r] = along_x[i] - along_y[j];
        common[r++] = i;
        trace += gram[i * width + i];
    }
    const double square = trace / (double)(r ? r : 1), more = ridge * (square > ridge ? square : ridge);
    for (std::size_t a = 0; a < r; a++) {
        const float *products = gram + common[a] * width;
        for (std::size_t b = a; b < r; b++) left[a * stride + b] = products[common[b]];
        left[a * stride + a] += more;
        left[a * stride + r] = along[a];
    }
    left[r * stride + r] = 0;
    return r;
}

}  // namespace

void common_lengths(const Views &rows, const float *gram, const std::int64_t *at,
                    const Views &others, double dim, double ridge, double *out, double *work) {
    const std::size_t stride = rows.width + 1;
    for (std::size_t p = 0; p < others.count; p++) {
        const std::size_t row = (std::size_t)at[p];
        const std::size_t r = system_of(rows, row, gram + row * rows.width * rows.width, others, p,
                                        ridge, work, stride);
        for (std::size_t j = 0; j < r; j++) {
            const double *pivots = work + j * stride;
            for (std::size_t a = j + 1; a <= r; a++) {
                const double factor = pivots[a] / pivots[j];
                double *below = work + a * stride;
                for (std::size_t b = a; b <= r; b++) below[b] -= factor * pivots[b];
            }
        }
        out[p] = -work[r * stride + r] * std::sqrt(dim / (double)(r ? r : 1));
    }
}

}  // namespace snip
