// The number that decides: cosines of stored rows in float64, rounded to float32.
//
// The order in which a processor adds cannot show in the result: where it could, that is where
// 2 (2 dim + 16) half ulps more or less round to another float32, terms are added in the one order
// of `sum`.
#pragma once

#include "rows.hpp"

namespace snip::SNIP_SET {

#if defined(__AVX512F__)
constexpr int LANES = 8;
constexpr int EDGE = 4;  // rows of each side of a table whose products stay in registers
#else
constexpr int LANES = 4;
constexpr int EDGE = 2;
#endif
constexpr std::size_t SIDE = 32;  // rows of each side of a table that are widened together
typedef double Doubles __attribute__((vector_size(8 * LANES)));

inline double total(Doubles sums) {
    double all = 0;
    for (int lane = 0; lane < LANES; lane++) all += sums[lane];
    return all;
}

inline double value(const std::uint16_t *at) { return half_value(*at); }
inline double value(const float *at) { return *at; }
inline double value(const double *at) { return *at; }

template <class Stored>
inline double dot64(const Stored *x, const Stored *y, std::size_t dim) {
    Doubles sums = {};
    std::size_t k = 0;
    for (; k + LANES <= dim; k += LANES) {
        Doubles a, b;
        for (int lane = 0; lane < LANES; lane++) {
            a[lane] = value(x + k + lane);
            b[lane] = value(y + k + lane);
        }
        sums += a * b;
    }
    double rest = total(sums);
    for (; k < dim; k++) rest += value(x + k) * value(y + k);
    return rest;
}

#if defined(__AVX512BW__)
// Products of two float16 are exact in float32.
inline __m512 half_products(const std::uint16_t *x, const std::uint16_t *y, std::size_t left) {
    const __mmask16 use = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1);
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(use, x)),
                         _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(use, y)));
}
inline __m512d low_half(__m512 v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
inline __m512d high_half(__m512 v) {
    return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}
template <>
inline double dot64(const std::uint16_t *x, const std::uint16_t *y, std::size_t dim) {
    __m512d a = _mm512_setzero_pd(), b = a, c = a, d = a;
    std::size_t k = 0;
    for (; k + 32 <= dim; k += 32) {
        const __m512 first = half_products(x + k, y + k, 16);
        const __m512 second = half_products(x + k + 16, y + k + 16, 16);
        a = _mm512_add_pd(a, low_half(first));
        b = _mm512_add_pd(b, high_half(first));
        c = _mm512_add_pd(c, low_half(second));
        d = _mm512_add_pd(d, high_half(second));
    }
    for (; k < dim; k += 16) {
        const __m512 rest = half_products(x + k, y + k, dim - k);
        a = _mm512_add_pd(a, low_half(rest));
        b = _mm512_add_pd(b, high_half(rest));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(a, b), _mm512_add_pd(c, d)));
}
#elif defined(__F16C__)
template <>
inline double dot64(const std::uint16_t *x, const std::uint16_t *y, std::size_t dim) {
    __m256d low = _mm256_setzero_pd(), high = low;
    std::size_t k = 0;
    for (; k + 8 <= dim; k += 8) {
        const __m256 a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + k)));
        const __m256 b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(y + k)));
        const __m256 c = _mm256_mul_ps(a, b);
        low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(c)));
        high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(c, 1)));
    }
    double parts[4], rest = 0;
    _mm256_storeu_pd(parts, _mm256_add_pd(low, high));
    for (int lane = 0; lane < 4; lane++) rest += parts[lane];
    for (; k < dim; k++) rest += value(x + k) * value(y + k);
    return rest;
}
#endif

template <class Stored>
inline void norms_of(const Stored *rows, std::size_t count, std::size_t dim, double *out) {
    for (std::size_t n = 0; n < count; n++)
        out[n] = root(dot64(rows + n * dim, rows + n * dim, dim));
}

template <class Stored>
inline double ordered(const Stored *x, const Stored *y, std::size_t dim, double *work) {
    for (std::size_t k = 0; k < dim; k++) work[k] = value(x + k) * value(y + k);
    return sum(work, dim);
}

template <class Stored>
inline void cosines_of(const Stored *x, const double *x_norms, const Stored *y,
                       const double *y_norms, std::size_t dim, const std::int64_t *i,
                       const std::int64_t *j, std::size_t count, float *out, double *work) {
    const double error = 2 * (2 * (double)dim + 16) * 0x1p-53;
    for (std::size_t n = 0; n < count; n++) {
        const Stored *a = x + (std::size_t)i[n] * dim, *b = y + (std::size_t)j[n] * dim;
        if (n + 4 < count) {
            const Stored *later = y + (std::size_t)j[n + 4] * dim;
            for (std::size_t k = 0; k < dim; k += 64 / sizeof(Stored))
                __builtin_prefetch(later + k);
        }
        if (!std::memcmp(a, b, dim * sizeof(Stored))) {
            out[n] = 1;
            continue;
        }
        double cosine = dot64(a, b, dim) / (x_norms[i[n]] * y_norms[j[n]]);
        if (__builtin_isfinite(cosine) && (float)(cosine - error) != (float)(cosine + error))
            cosine = ordered(a, b, dim, work) /
                     (root(ordered(a, a, dim, work)) * root(ordered(b, b, dim, work)));
        const float found = (float)cosine;
        out[n] = found > 1 ? 1 : found;
    }
}

inline Doubles more(Doubles sums, const double *x, const double *y) {
    Doubles a, b;
    std::memcpy(&a, x, sizeof a);
    std::memcpy(&b, y, sizeof b);
#if defined(__AVX512F__)
    return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sums);
#else
    return sums + a * b;
#endif
}

constexpr std::make_integer_sequence<int, EDGE * EDGE> EDGES{};

// The products of EDGE rows with EDGE others; place I is of row I / EDGE, other I % EDGE.
template <int... I>
SNIP_INLINE void edge_products(const double *x, const double *y, std::size_t stride, double *out,
                               Numbers<I...>) {
    Doubles sums[EDGE * EDGE];
    ((sums[I] = Doubles{}), ...);
    for (std::size_t k = 0; k < stride; k += LANES)
        ((sums[I] = more(sums[I], x + I / EDGE * stride + k, y + I % EDGE * stride + k)), ...);
    ((out[I] = total(sums[I])), ...);
}

// Up to SIDE rows as float64, zeros after the last value and row; a row takes `stride` numbers.
template <class Stored>
inline void widen_side(const Stored *rows, std::size_t count, std::size_t dim, std::size_t stride,
                       double *out) {
    for (std::size_t n = 0; n < SIDE; n++) {
        for (std::size_t k = 0; k < dim; k++) out[n * stride + k] = n < count ? value(rows + n * dim + k) : 0;
        for (std::size_t k = dim; k < stride; k++) out[n * stride + k] = 0;
    }
}

// All cosines of m rows with n rows. `work` holds 2 SIDE rows, each a multiple of 8 numbers, and one more.
template <class Stored>
inline void table_of(const Stored *x, const double *x_norms, std::size_t m, const Stored *y,
                     const double *y_norms, std::size_t n, std::size_t dim, float *out,
                     double *work) {
    const std::size_t stride = (dim + 7) / 8 * 8;
    const double error = 2 * (2 * (double)dim + 16) * 0x1p-53;
    double *left = work, *right = work + SIDE * stride, *terms = right + SIDE * stride;
    for (std::size_t i = 0; i < m; i += SIDE) {
        const std::size_t rows = m - i < SIDE ? m - i : SIDE;
        widen_side(x + i * dim, rows, dim, stride, left);
        for (std::size_t j = 0; j < n; j += SIDE) {
            const std::size_t columns = n - j < SIDE ? n - j : SIDE;
            widen_side(y + j * dim, columns, dim, stride, right);
            for (std::size_t r = 0; r < rows; r += EDGE)
                for (std::size_t c = 0; c < columns; c += EDGE) {
                    double part[EDGE * EDGE];
                    edge_products(left + r * stride, right + c * stride, stride, part, EDGES);
                    for (std::size_t a = r; a < r + EDGE && a < rows; a++)
                        for (std::size_t b = c; b < c + EDGE && b < columns; b++) {
                            const Stored *p = x + (i + a) * dim, *q = y + (j + b) * dim;
                            double cosine =
                                part[(a - r) * EDGE + b - c] / (x_norms[i + a] * y_norms[j + b]);
                            if (cosine > 1 - 1e-7 && !std::memcmp(p, q, dim * sizeof(Stored)))
                                cosine = 1;
                            else if (__builtin_isfinite(cosine) &&
                                     (float)(cosine - error) != (float)(cosine + error))
                                cosine = ordered(p, q, dim, terms) /
                                         (root(ordered(p, p, dim, terms)) *
                                          root(ordered(q, q, dim, terms)));
                            const float found = (float)cosine;
                            out[(i + a) * n + j + b] = found > 1 ? 1 : found;
                        }
                }
        }
    }
}

static void table(const void *x, const double *x_norms, std::size_t m, const void *y,
                  const double *y_norms, std::size_t n, int bytes, std::size_t dim, float *out,
                  double *work) {
    if (bytes == 2)
        table_of((const std::uint16_t *)x, x_norms, m, (const std::uint16_t *)y, y_norms, n, dim,
                 out, work);
    if (bytes == 4)
        table_of((const float *)x, x_norms, m, (const float *)y, y_norms, n, dim, out, work);
    if (bytes == 8)
        table_of((const double *)x, x_norms, m, (const double *)y, y_norms, n, dim, out, work);
}

static void norms(const void *rows, int bytes, std::size_t count, std::size_t dim, double *out) {
    if (bytes == 2) norms_of((const std::uint16_t *)rows, count, dim, out);
    if (bytes == 4) norms_of((const float *)rows, count, dim, out);
    if (bytes == 8) norms_of((const double *)rows, count, dim, out);
}

static void cosines(const void *x, const double *x_norms, const void *y, const double *y_norms,
                    int bytes, std::size_t dim, const std::int64_t *i, const std::int64_t *j,
                    std::size_t count, float *out, double *work) {
    if (bytes == 2)
        cosines_of((const std::uint16_t *)x, x_norms, (const std::uint16_t *)y, y_norms, dim, i, j,
                   count, out, work);
    if (bytes == 4)
        cosines_of((const float *)x, x_norms, (const float *)y, y_norms, dim, i, j, count, out,
                   work);
    if (bytes == 8)
        cosines_of((const double *)x, x_norms, (const double *)y, y_norms, dim, i, j, count, out,
                   work);
}

}  // namespace snip::SNIP_SET
