// The number that decides: cosines of stored rows in float64, rounded to float32.
//
// The order in which a processor adds cannot show in the result: where it could, that is where
// 2 (2 dim + 16) half ulps more or less round to another float32, terms are added in the one order
// of `sum`.
#pragma once

#include "rows.hpp"

namespace snip::SNIP_SET {

typedef double Doubles __attribute__((vector_size(64)));

inline double total(Doubles sums) {
    double all = 0;
    for (int lane = 0; lane < 8; lane++) all += sums[lane];
    return all;
}

inline double value(const std::uint16_t *at) { return half_value(*at); }
inline double value(const float *at) { return *at; }
inline double value(const double *at) { return *at; }

template <class Stored>
inline double dot64(const Stored *x, const Stored *y, std::size_t dim) {
    Doubles sums = {};
    std::size_t k = 0;
    for (; k + 8 <= dim; k += 8) {
        Doubles a, b;
        for (int lane = 0; lane < 8; lane++) {
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
// products of two float16 are exact in float32
template <>
inline double dot64(const std::uint16_t *x, const std::uint16_t *y, std::size_t dim) {
    __m512d low = _mm512_setzero_pd(), high = low;
    for (std::size_t k = 0; k < dim; k += 16) {
        const std::size_t left = dim - k;
        const __mmask16 use = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1);
        const __m512 a = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(use, x + k));
        const __m512 b = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(use, y + k));
        const __m512 c = _mm512_mul_ps(a, b);
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(c)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm256_castpd_ps(
                                       _mm512_extractf64x4_pd(_mm512_castps_pd(c), 1))));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
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
    for (std::size_t n = 0; n < count; n++) out[n] = dot64(rows + n * dim, rows + n * dim, dim);
}

template <class Stored>
inline double ordered(const Stored *x, const Stored *y, std::size_t dim, double *work) {
    for (std::size_t k = 0; k < dim; k++) work[k] = value(x + k) * value(y + k);
    return sum(work, dim);
}

// x_norms and y_norms are squared norms, of `norms`.
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
        double cosine = dot64(a, b, dim) / (root(x_norms[i[n]]) * root(y_norms[j[n]]));
        if (__builtin_isfinite(cosine) && (float)(cosine - error) != (float)(cosine + error))
            cosine = ordered(a, b, dim, work) /
                     (root(ordered(a, a, dim, work)) * root(ordered(b, b, dim, work)));
        const float found = (float)cosine;
        out[n] = found > 1 ? 1 : found;
    }
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
