// From stored rows to int8 codes: rows as integers, their exact products with a matrix of small
// integers, and the rotated residual that makes the products of codes bound cosines.
#pragma once

#include "products.hpp"
#include "rows.hpp"

namespace snip::SNIP_SET {

inline float rounded(float value) {  // half to even, as numpy's rint; |value| < 2^22
    const float shift = 0x1.8p23f;
    return (value + shift) - shift;
}

// Rows scaled to norm `longest` and rounded, and their norms. A row whose norm is no number, or so
// large or small that float32 cannot hold its square, is left to the caller. `work`: 2 dim floats.
static void whole(const void *rows, int bytes, std::size_t count, std::size_t dim, float longest,
                  std::int16_t *out, float *norms, float *work) {
    float *values = work, *terms = work + dim;
    for (std::size_t n = 0; n < count; n++) {
        widen((const char *)rows + n * dim * (std::size_t)bytes, bytes, dim, values);
        for (std::size_t k = 0; k < dim; k++) terms[k] = values[k] * values[k];
        norms[n] = root(sum(terms, dim));
        const float factor = (1 / norms[n]) * longest;
        std::int16_t *row = out + n * dim;
        if (!(norms[n] > 1e-15f && norms[n] < 1e15f)) {
            std::memset(row, 0, 2 * dim);
            continue;
        }
        for (std::size_t k = 0; k < dim; k++) row[k] = (std::int16_t)(int)rounded(values[k] * factor);
    }
}

// The products of BLOCK_ROWS int16 rows with BLOCK_GROUPS groups of packed columns.
template <int... I>
SNIP_INLINE void block_projections(const std::int16_t *const *rows, std::size_t dim,
                                   const std::int16_t *packed, float *out, Numbers<I...>) {
    constexpr int G = BLOCK_GROUPS;
    Sums16 sums[BLOCK];
    ((sums[I] = zero16()), ...);
    for (std::size_t k = 0; k < dim; k += 2)
        (add16(sums[I], pair(rows[I / G] + k), packed + I % G * GROUP * dim + k * GROUP), ...);
    (settle16(sums[I]), ...);
    (store16(out + I * (int)GROUP, sums[I]), ...);
}

// Products of int16 rows with a matrix packed as [width / GROUP][(dim + 1) / 2][GROUP][2]; none
// reaches 2^24, so float32 holds them. Rows have an even number of values, columns fill panels.
static void project(const std::int16_t *rows, std::size_t count, std::size_t dim,
                    const std::int16_t *packed, std::size_t width, float *out) {
    constexpr std::size_t STEP = BLOCK_GROUPS * GROUP;
    float part[BLOCK_ROWS * STEP];
    for (std::size_t c = 0; c < width; c += STEP) {
        const std::size_t columns = width - c < STEP ? width - c : STEP;
        for (std::size_t r = 0; r < count; r += BLOCK_ROWS) {
            const std::int16_t *some[BLOCK_ROWS];
            for (std::size_t n = 0; n < BLOCK_ROWS; n++)
                some[n] = rows + (r + n < count ? r + n : r) * dim;
            block_projections(some, dim, packed + c * dim, part, ALL);
            for (std::size_t n = 0; n < BLOCK_ROWS && r + n < count; n++)
                std::memcpy(out + (r + n) * width + c, part + n * STEP, 4 * columns);
        }
    }
}

// Coordinates are products * unit. What they lack of the row's length is turned to `axis`; all are
// scaled and rounded to int8. Of what int8 cannot hold, o, a product with another row's code loses
// no more than 127 sum |o| + sum o^2 / 2 for each of the two: the fall. `work`: 2 width floats.
static void finish(const float *products, std::size_t count, std::size_t width, float unit,
                   const float *axis, float length, float scale, std::int8_t *codes,
                   std::int32_t *falls, float *work) {
    float *values = work, *terms = work + width;
    for (std::size_t n = 0; n < count; n++) {
        const float *row = products + n * width;
        for (std::size_t k = 0; k < width; k++) values[k] = row[k] * unit;
        for (std::size_t k = 0; k < width; k++) terms[k] = values[k] * values[k];
        const float inside = sum(terms, width);
        for (std::size_t k = 0; k < width; k++) terms[k] = values[k] * axis[k];
        const float along = sum(terms, width);
        const float square = length - (inside - along * along);
        const float rest = root(square > 0 ? square : 0.0f) - along;
        std::int32_t most = 0;  // the bits of sizes are ordered as these are
        for (std::size_t k = 0; k < width; k++) {
            const float value = (values[k] + rest * axis[k]) * scale;
            const std::int32_t size = word(&value) & 0x7fffffff;
            most = size > most ? size : most;
            values[k] = value;
        }
        std::int8_t *code = codes + n * width;
        for (std::size_t k = 0; k < width; k++) {
            float value = rounded(values[k]);
            value = value > 127 ? 127 : value < -127 ? -127 : value;
            code[k] = (std::int8_t)(int)value;
        }
        falls[n] = 0;
        const float limit = 127.5f;
        if (most > word(&limit)) {
            for (std::size_t k = 0; k < width; k++) {
                const float size = __builtin_fabsf(values[k]);
                values[k] = size > 127.5f ? size - 127 : 0.0f;
                terms[k] = values[k] * values[k];
            }
            const float squares = sum(terms, width);
            falls[n] = (std::int32_t)__builtin_ceilf(127 * sum(values, width) + squares / 2);
        }
    }
}

// Rows made orthonormal in their order, by the method of Gram and Schmidt; of those that depend on
// earlier ones so nearly that no more than `least` of their norm is left, zeros. `work`: dim + count.
static void orthonormal(double *rows, std::size_t count, std::size_t dim, double least,
                        double *work) {
    double *terms = work, *sizes = work + dim;
    for (std::size_t n = 0; n < count; n++) {
        double *__restrict row = rows + n * dim;
        for (std::size_t k = 0; k < dim; k++) terms[k] = row[k] * row[k];
        const double before = root(sum(terms, dim));
        for (std::size_t m = 0; m < n; m++) {
            if (sizes[m] == 0) continue;
            const double *__restrict earlier = rows + m * dim;
            for (std::size_t k = 0; k < dim; k++) terms[k] = row[k] * earlier[k];
            const double along = sum(terms, dim);
            for (std::size_t k = 0; k < dim; k++) row[k] -= along * earlier[k];
        }
        for (std::size_t k = 0; k < dim; k++) terms[k] = row[k] * row[k];
        sizes[n] = root(sum(terms, dim));
        if (sizes[n] <= least * before) sizes[n] = 0;
        for (std::size_t k = 0; k < dim; k++) row[k] = sizes[n] == 0 ? 0 : row[k] / sizes[n];
    }
}

}  // namespace snip::SNIP_SET
