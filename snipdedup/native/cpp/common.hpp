// How long x - y is, from the products of x and of y with vectors Q that both were compared with.
//
// v = Q (x - y) is the difference of these products. vᵀ (Q Qᵀ)⁻¹ v is the squared length of x - y
// within the span of Q, r of d dimensions; it is scaled by √(d / r). Elimination of all columns but
// the last of [G v; vᵀ 0], where G is Q Qᵀ and a ridge, leaves -vᵀ G⁻¹ v. Its steps are those of
// fallback.py in the same order, so both give the same bits. The lower side of the symmetric matrix
// would differ by rounding; the upper one is used.
#pragma once

#include <cstring>

#include "kernels.hpp"

namespace snip::SNIP_SET {

constexpr std::size_t FLOATS = 16;  // side by side; the second half is added to the first
typedef float Lanes __attribute__((vector_size(4 * FLOATS)));

inline float dot32(const float *x, const float *y, std::size_t dim) {
    Lanes sums = {}, a, b;
    std::size_t k = 0;
    for (; k + FLOATS <= dim; k += FLOATS) {
        std::memcpy(&a, x + k, sizeof a);
        std::memcpy(&b, y + k, sizeof b);
        sums += a * b;
    }
    if (k < dim) {
        a = b = Lanes{};
        std::memcpy(&a, x + k, 4 * (dim - k));
        std::memcpy(&b, y + k, 4 * (dim - k));
        sums += a * b;
    }
    float parts[FLOATS];
    std::memcpy(parts, &sums, sizeof sums);
    for (std::size_t half = FLOATS / 2; half; half /= 2)
        for (std::size_t n = 0; n < half; n++) parts[n] += parts[n + half];
    return parts[0];
}

// Products of a row's vectors with one another, each computed when it is first asked for.
struct Gram {
    const float *vectors;
    std::size_t dim, width;
    float *products;
    bool *known;

    void begin(const float *of) {
        vectors = of;
        std::memset(known, 0, width * width);
    }
    double operator()(std::size_t a, std::size_t b) {
        const std::size_t at = a * width + b;
        if (!known[at]) {
            products[at] = dot32(vectors + a * dim, vectors + b * dim, dim);
            known[at] = true;
        }
        return products[at];
    }
};

// Where each name of a row is: a hash table of names, sparse, with linear probing.
struct Places {
    std::size_t *slots, mask;  // place + 1; 0: none
    const std::int64_t *names;

    static std::size_t size(std::size_t width) {
        std::size_t slots = 64;
        while (slots < 4 * width) slots *= 2;
        return slots;
    }
    std::size_t slot(std::int64_t name) const {
        return (std::size_t)((std::uint64_t)name * 0x9E3779B97F4A7C15u >> 32) & mask;
    }
    void begin(const std::int64_t *of, std::size_t width) {
        names = of;
        std::memset(slots, 0, (mask + 1) * sizeof *slots);
        for (std::size_t i = 0; i < width; i++) {
            if (names[i] < 0) continue;
            std::size_t at = slot(names[i]);
            while (slots[at]) at = (at + 1) & mask;
            slots[at] = i + 1;
        }
    }
    std::size_t find(std::int64_t name) const {  // place + 1, or 0
        std::size_t at = slot(name);
        while (slots[at] && names[slots[at] - 1] != name) at = (at + 1) & mask;
        return slots[at];
    }
};

// The names that two rows have in common, in the order of the first, and v of each.
struct Common {
    std::size_t *names, count;
    double *along;
};

inline void find_common(const Places &places, const float *along_x, const std::int64_t *y,
                        const float *along_y, std::size_t width, std::size_t *match, Common &common) {
    std::memset(match, 0, width * sizeof *match);
    for (std::size_t j = 0; j < width; j++)
        if (const std::size_t place = y[j] < 0 ? 0 : places.find(y[j])) match[place - 1] = j + 1;
    common.count = 0;
    for (std::size_t i = 0; i < width; i++) {
        common.names[common.count] = i;
        common.along[common.count] = match[i] ? along_x[i] - along_y[match[i] - 1] : 0;
        common.count += match[i] != 0;
    }
}

// Eliminate name after name, each a column of the upper side, by factors[i][j] = U[i][j] / U[i][i];
// vᵀ G⁻¹ v grows with each, so no more are needed once it is above `limit`.
inline double eliminate(const Common &common, Gram &gram, double ridge, double scale, double limit,
                        double *factors, double *column, double *pivots) {
    const std::size_t r = common.count;
    double trace = 0, left = 0;
    for (std::size_t a = 0; a < r; a++) trace += gram(common.names[a], common.names[a]);
    const double square = trace / (double)(r ? r : 1), more = ridge * (square > ridge ? square : ridge);
    for (std::size_t a = 0; a < r && -left * scale <= limit; a++) {
        for (std::size_t i = 0; i < a; i++) column[i] = gram(common.names[i], common.names[a]);
        column[a] = gram(common.names[a], common.names[a]) + more;
        double along = common.along[a];
        for (std::size_t i = 0; i < a; i++) {
            double *row = factors + i * r;
            row[a] = column[i] / pivots[i];
            for (std::size_t j = i + 1; j <= a; j++) column[j] -= row[j] * column[i];
            along -= row[a] * common.along[i];
        }
        pivots[a] = column[a];
        common.along[a] = along;
        left -= along / pivots[a] * along;
    }
    return -left * scale;
}

inline void decode(const Coded &coded, const std::int64_t *names, std::size_t count, float *out) {
    const std::size_t dim = coded.dim, width = dim / coded.m;
    for (std::size_t n = 0; n < count; n++, out += dim) {
        if (names[n] < 0) {
            std::memset(out, 0, 4 * dim);
            continue;
        }
        const std::size_t name = (std::size_t)names[n];
        if (name >= coded.count) {
            std::memcpy(out, coded.centroids + (name - coded.count) * dim, 4 * dim);
            continue;
        }
        const std::uint8_t *code = coded.codes + name * coded.m;
        for (std::size_t sub = 0; sub < coded.m; sub++)
            std::memcpy(out + sub * width, coded.words + (sub * 256 + code[sub]) * width, 4 * width);
        if (!coded.residual) continue;
        std::size_t list = 0, end = coded.lists;  // of the lists that begin at or before the name, the last
        while (end - list > 1) {
            const std::size_t middle = (list + end) / 2;
            (coded.starts[middle] <= names[n] ? list : end) = middle;
        }
        const float *centroid = coded.centroids + list * dim;
        for (std::size_t k = 0; k < dim; k++) out[k] += centroid[k];
    }
}

inline void common_lengths(const Views &rows, const float *vectors, std::size_t dim,
                           const std::int64_t *at, const Views &others, double ridge,
                           const double *limits, double *out, double *work) {
    const std::size_t width = rows.width, all = width * width, slots = Places::size(width);
    double *factors = work, *column = factors + all, *pivots = column + width;
    Common common{(std::size_t *)(pivots + 2 * width), 0, pivots + width};
    std::size_t *match = common.names + width;
    Places places{match + width, slots - 1, nullptr};
    Gram gram{vectors, dim, width, (float *)(places.slots + slots), nullptr};
    gram.known = (bool *)(gram.products + all);
    for (std::size_t p = 0; p < others.count; p++) {
        const std::size_t row = (std::size_t)at[p];
        if (p == 0 || at[p] != at[p - 1]) {
            gram.begin(vectors + row * width * dim);
            places.begin(rows.names + row * width, width);
        }
        find_common(places, rows.products + row * width, others.names + p * width,
                    others.products + p * width, width, match, common);
        const double scale = __builtin_sqrt((double)dim / (double)(common.count ? common.count : 1));
        out[p] = eliminate(common, gram, ridge, scale, limits[p], factors, column, pivots);
    }
}

}  // namespace snip::SNIP_SET
