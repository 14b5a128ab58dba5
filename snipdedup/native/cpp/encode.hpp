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

// Products of int16 rows with a matrix packed as [width / GROUP][(dim + 1) / 2][GROUP][2]; none
// reaches 2^24, so float32 holds them. Rows have an even number of values.
static void project(const std::int16_t *rows, std::size_t count, std::size_t dim,
                    const std::int16_t *packed, std::size_t width, float *out) {
    constexpr int R = BLOCK_ROWS;
    constexpr std::size_t G = BLOCK_GROUPS;
    for (std::size_t c = 0; c < width; c += G * GROUP) {
        const std::size_t groups = width - c < G * GROUP ? (width - c) / GROUP : G;
        for (std::size_t r = 0; r < count; r += R) {
            const std::size_t left = count - r < R ? count - r : R;
            const std::int16_t *row[R];
            for (std::size_t n = 0; n < R; n++) row[n] = rows + (r + (n < left ? n : 0)) * dim;
            Sums16 sums[R][G];
            for (int n = 0; n < R; n++)
                for (std::size_t g = 0; g < G; g++) sums[n][g] = zero16();
            if (groups == G) {
                for (std::size_t k = 0; k < dim; k += 2)
#pragma GCC unroll 8
                    for (int n = 0; n < R; n++)
#pragma GCC unroll 8
                        for (std::size_t g = 0; g < G; g++)
                            add16(sums[n][g], word(row[n] + k),
                                  packed + (c + g * GROUP) * dim + k * GROUP);
            } else {
                for (std::size_t g = 0; g < groups; g++)
                    for (std::size_t k = 0; k < dim; k += 2)
                        for (int n = 0; n < R; n++)
                            add16(sums[n][g], word(row[n] + k),
                                  packed + (c + g * GROUP) * dim + k * GROUP);
            }
            for (std::size_t n = 0; n < left; n++)
                for (std::size_t g = 0; g < groups; g++)
                    store16(out + (r + n) * width + c + g * GROUP, sums[n][g]);
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

}  // namespace snip::SNIP_SET
