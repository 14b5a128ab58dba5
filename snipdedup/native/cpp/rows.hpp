// Stored rows as float32, and sums of floats in the one order that all of the package uses.
#pragma once

#include "simd.hpp"

namespace snip::SNIP_SET {

inline float half_value(std::uint16_t bits) {
    // the exponent is moved by a product with a power of two, which is exact for subnormals too
    const std::uint32_t sign = (std::uint32_t)(bits & 0x8000) << 16;
    const std::uint32_t rest = (std::uint32_t)(bits & 0x7fff) << 13;
    float value;
    if (rest >= 0x0f800000) {  // infinity or NaN
        const std::uint32_t odd = rest | 0x7f800000;
        std::memcpy(&value, &odd, 4);
    } else {
        std::memcpy(&value, &rest, 4);
        value *= 0x1p112f;
    }
    std::uint32_t whole;
    std::memcpy(&whole, &value, 4);
    whole |= sign;
    std::memcpy(&value, &whole, 4);
    return value;
}

// `count` values of 2, 4 or 8 bytes (float16, float32, float64) as float32.
static void widen(const void *values, int bytes, std::size_t count, float *out) {
    std::size_t k = 0;
    if (bytes == 2) {
        const auto *half = (const std::uint16_t *)values;
#if defined(__AVX512F__)
        for (; k + 16 <= count; k += 16)
            _mm512_storeu_ps(out + k,
                             _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(half + k))));
#elif defined(__F16C__)
        for (; k + 8 <= count; k += 8)
            _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + k))));
#endif
        for (; k < count; k++) out[k] = half_value(half[k]);
    } else if (bytes == 4) {
        std::memcpy(out, values, 4 * count);
    } else {
        const auto *wide = (const double *)values;
        for (; k < count; k++) out[k] = (float)wide[k];
    }
}

// The sum of terms: the second half is added to the first, until eight are left; spoils them.
template <class Float>
inline Float sum(Float *terms, std::size_t width) {
    while (width > 8) {
        const std::size_t half = width / 2;
        const Float *__restrict later = terms + width - half;
        Float *__restrict first = terms;
        for (std::size_t k = 0; k < half; k++) first[k] += later[k];
        width -= half;
    }
    if (!width) return 0;
    Float total = terms[0] + (Float)0;
    for (std::size_t k = 1; k < width; k++) total += terms[k];
    return total;
}

static void hashes(const std::uint64_t *words, std::size_t count, std::size_t width,
                   const std::uint64_t *offsets, bool mixed, std::uint64_t *out) {
    for (std::size_t n = 0; n < count; n++) {
        const std::uint64_t *row = words + n * width;
        std::uint64_t total = 0;
        for (std::size_t k = 0; k < width; k += 2) {
            std::uint64_t a = row[k], b = row[k + 1];
            if (mixed) {
                a = (a ^ a >> 32) * 0x9E3779B97F4A7C15u;
                b = (b ^ b >> 32) * 0x9E3779B97F4A7C15u;
                a ^= a >> 32;
                b ^= b >> 32;
            }
            total += (a + offsets[k]) * (b + offsets[k + 1]);
        }
        out[n] = total;
    }
}

}  // namespace snip::SNIP_SET
