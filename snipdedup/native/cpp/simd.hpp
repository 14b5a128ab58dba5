// The few vector operations that differ between instruction sets: products of 16 columns at a time.
#pragma once

#include <cstring>
#include <utility>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace snip::SNIP_SET {

// Builtins, since functions of the standard library could be taken from another unit.
inline float root(float value) { return __builtin_sqrtf(value); }
inline double root(double value) { return __builtin_sqrt(value); }

#define SNIP_INLINE inline __attribute__((always_inline))

inline std::int32_t word(const void *at) {
    std::int32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

typedef std::int32_t GroupInts __attribute__((vector_size(4 * GROUP)));

#if defined(__AVX512VNNI__)

// vpdpbusd adds four products of an unsigned and a signed byte to each of 16 numbers.
constexpr std::uint8_t TURN = 0x80;  // rows become unsigned: 128 is added
constexpr int BLOCK_ROWS = 6, BLOCK_GROUPS = 4;

using Sums = __m512i;
using RowWord = __m512i;
using Group = __m512i;
inline Sums start(const std::int32_t *starts) { return _mm512_loadu_si512(starts); }
inline RowWord spread(const std::uint8_t *row) { return _mm512_set1_epi32(word(row)); }
inline Group group(const std::int8_t *packed) { return _mm512_loadu_si512(packed); }
inline void add(Sums &sums, RowWord row, Group columns) {
    sums = _mm512_dpbusd_epi32(sums, row, columns);
}
inline void store(std::int32_t *out, Sums sums) { _mm512_storeu_si512(out, sums); }
inline unsigned reach(Sums sums, std::int32_t limit) {
    return _mm512_cmpge_epi32_mask(sums, _mm512_set1_epi32(limit));
}
// GCC 12 would keep sums in memory in the loop before a comparison; this ends their life there.
inline void settle(Sums &sums) { __asm__ volatile("" : "+v"(sums)); }
inline unsigned truths(GroupInts values) { return _mm512_movepi32_mask((__m512i)values); }
inline __m512i some_bytes(const std::int8_t *from, std::size_t left) {
    return _mm512_maskz_loadu_epi8(left >= 64 ? ~0ULL : (1ULL << left) - 1, from);
}
inline std::int32_t turned_dot(const std::int8_t *x, const std::int8_t *y, std::size_t width) {
    const __m512i bias = _mm512_set1_epi8((char)TURN);
    __m512i sums = _mm512_setzero_si512();
    std::size_t k = 0;
    for (; k + 64 <= width; k += 64)
        sums = _mm512_dpbusd_epi32(sums, _mm512_xor_si512(_mm512_loadu_si512(x + k), bias),
                                   _mm512_loadu_si512(y + k));
    if (k < width)
        sums = _mm512_dpbusd_epi32(sums, _mm512_xor_si512(some_bytes(x + k, width - k), bias),
                                   some_bytes(y + k, width - k));
    return _mm512_reduce_add_epi32(sums);
}
inline std::int32_t turn(const std::int8_t *y, std::size_t width) {
    const __m512i bias = _mm512_set1_epi8((char)TURN);
    __m512i sums = _mm512_setzero_si512();
    for (std::size_t k = 0; k < width; k += 64)
        sums = _mm512_dpbusd_epi32(sums, bias, some_bytes(y + k, width - k));
    return _mm512_reduce_add_epi32(sums);
}
using Sums16 = __m512i;
using RowPair = __m512i;
inline Sums16 zero16() { return _mm512_setzero_si512(); }
inline RowPair pair(const std::int16_t *row) { return _mm512_set1_epi32(word(row)); }
inline void add16(Sums16 &sums, RowPair row, const std::int16_t *columns) {
    sums = _mm512_dpwssd_epi32(sums, row, _mm512_loadu_si512(columns));
}
inline void settle16(Sums16 &sums) { settle(sums); }
inline void store16(float *out, Sums16 sums) { _mm512_storeu_ps(out, _mm512_cvtepi32_ps(sums)); }

#elif defined(__AVX2__)

// vpmaddubsw takes one unsigned side: |x| and y with x's sign. Codes are -127 to 127, so two
// products fit 16 bits.
constexpr std::uint8_t TURN = 0;
constexpr int BLOCK_ROWS = 2, BLOCK_GROUPS = 2;

struct Sums {
    __m256i low, high;
};
inline Sums start(const std::int32_t *starts) {
    return {_mm256_loadu_si256((const __m256i *)starts),
            _mm256_loadu_si256((const __m256i *)(starts + 8))};
}
struct RowWord {
    __m256i v, size;
};
inline RowWord spread(const std::uint8_t *row) {
    const __m256i v = _mm256_set1_epi32(word(row));
    return {v, _mm256_abs_epi8(v)};
}
struct Group {
    __m256i low, high;
};
inline Group group(const std::int8_t *packed) {
    return {_mm256_loadu_si256((const __m256i *)packed),
            _mm256_loadu_si256((const __m256i *)(packed + 32))};
}
inline __m256i four(RowWord row, __m256i columns) {
    const __m256i two = _mm256_maddubs_epi16(row.size, _mm256_sign_epi8(columns, row.v));
    return _mm256_madd_epi16(two, _mm256_set1_epi16(1));
}
inline void add(Sums &sums, RowWord row, Group columns) {
    sums.low = _mm256_add_epi32(sums.low, four(row, columns.low));
    sums.high = _mm256_add_epi32(sums.high, four(row, columns.high));
}
inline void store(std::int32_t *out, Sums sums) {
    _mm256_storeu_si256((__m256i *)out, sums.low);
    _mm256_storeu_si256((__m256i *)(out + 8), sums.high);
}
inline unsigned truths(GroupInts values) {
    __m256 parts[2];
    std::memcpy(parts, &values, sizeof values);
    return (unsigned)_mm256_movemask_ps(parts[0]) | (unsigned)_mm256_movemask_ps(parts[1]) << 8;
}
inline unsigned below(__m256i values, __m256i limit) {
    return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, values)));
}
inline unsigned reach(Sums sums, std::int32_t limit) {
    const __m256i least = _mm256_set1_epi32(limit);
    return (~(below(sums.low, least) | below(sums.high, least) << 8)) & 0xffff;
}
inline void settle(Sums &sums) { __asm__ volatile("" : "+x"(sums.low), "+x"(sums.high)); }
inline std::int32_t turned_dot(const std::int8_t *x, const std::int8_t *y, std::size_t width) {
    __m256i sums = _mm256_setzero_si256();
    std::size_t k = 0;
    for (; k + 16 <= width; k += 16) {
        const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(x + k)));
        const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(y + k)));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
    }
    std::int32_t parts[8], total = 0;
    _mm256_storeu_si256((__m256i *)parts, sums);
    for (int lane = 0; lane < 8; lane++) total += parts[lane];
    for (; k < width; k++) total += x[k] * y[k];
    return total;
}
struct Sums16 {
    __m256i low, high;
};
inline Sums16 zero16() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
using RowPair = __m256i;
inline RowPair pair(const std::int16_t *row) { return _mm256_set1_epi32(word(row)); }
inline void add16(Sums16 &sums, RowPair v, const std::int16_t *columns) {
    const __m256i low = _mm256_loadu_si256((const __m256i *)columns);
    const __m256i high = _mm256_loadu_si256((const __m256i *)(columns + 16));
    sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(v, low));
    sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(v, high));
}
inline void settle16(Sums16 &sums) { __asm__ volatile("" : "+x"(sums.low), "+x"(sums.high)); }
inline void store16(float *out, Sums16 sums) {
    _mm256_storeu_ps(out, _mm256_cvtepi32_ps(sums.low));
    _mm256_storeu_ps(out + 8, _mm256_cvtepi32_ps(sums.high));
}

#else

// Plain loops over 16 numbers; NEON's dot product of bytes where the processor has it.
constexpr std::uint8_t TURN = 0;
constexpr int BLOCK_ROWS = 2, BLOCK_GROUPS = 1;

#if defined(__ARM_FEATURE_DOTPROD)
struct Sums {
    int32x4_t v[4];
};
struct RowWord {
    int8x16_t v;
};
inline RowWord spread(const std::uint8_t *row) {
    return {vreinterpretq_s8_s32(vdupq_n_s32(word(row)))};
}
inline void add(Sums &sums, RowWord row, const std::int8_t *columns) {
    for (int part = 0; part < 4; part++)
        sums.v[part] = vdotq_s32(sums.v[part], row.v, vld1q_s8(columns + 16 * part));
}
#else
struct Sums {
    std::int32_t v[16];
};
struct RowWord {
    const std::int8_t *v;
};
inline RowWord spread(const std::uint8_t *row) { return {(const std::int8_t *)row}; }
inline void add(Sums &sums, RowWord row, const std::int8_t *columns) {
    for (int lane = 0; lane < 16; lane++) {
        const std::int8_t *c = columns + 4 * lane;
        sums.v[lane] += row.v[0] * c[0] + row.v[1] * c[1] + row.v[2] * c[2] + row.v[3] * c[3];
    }
}
#endif
using Group = const std::int8_t *;
inline Group group(const std::int8_t *packed) { return packed; }
inline Sums start(const std::int32_t *starts) {
    Sums sums;
    std::memcpy(&sums, starts, sizeof sums);
    return sums;
}
inline void store(std::int32_t *out, const Sums &sums) { std::memcpy(out, &sums, sizeof sums); }
inline unsigned reach(const Sums &sums, std::int32_t limit) {
    std::int32_t values[16];
    unsigned mask = 0;
    store(values, sums);
    for (int lane = 0; lane < 16; lane++) mask |= (unsigned)(values[lane] >= limit) << lane;
    return mask;
}
inline unsigned truths(GroupInts values) {
    unsigned mask = 0;
    for (std::size_t lane = 0; lane < GROUP; lane++) mask |= (unsigned)(values[lane] != 0) << lane;
    return mask;
}
inline void settle(Sums &) {}
inline std::int32_t turned_dot(const std::int8_t *x, const std::int8_t *y, std::size_t width) {
    std::int32_t total = 0;
    for (std::size_t k = 0; k < width; k++) total += x[k] * y[k];
    return total;
}
struct Sums16 {
    std::int32_t v[16];
};
inline Sums16 zero16() { return {}; }
using RowPair = const std::int16_t *;
inline RowPair pair(const std::int16_t *row) { return row; }
inline void add16(Sums16 &sums, RowPair row, const std::int16_t *columns) {
    for (int lane = 0; lane < 16; lane++)
        sums.v[lane] += row[0] * columns[2 * lane] + row[1] * columns[2 * lane + 1];
}
inline void settle16(Sums16 &) {}
inline void store16(float *out, const Sums16 &sums) {
    for (int lane = 0; lane < 16; lane++) out[lane] = (float)sums.v[lane];
}

#endif

#if !defined(__AVX512VNNI__)
inline std::int32_t turn(const std::int8_t *, std::size_t) { return 0; }
#endif

// The product of two codes. turned_dot is larger by `turn` of the second one: TURN times its sum.
inline std::int32_t dot(const std::int8_t *x, const std::int8_t *y, std::size_t width) {
    return turned_dot(x, y, width) - turn(y, width);
}

constexpr int BLOCK = BLOCK_ROWS * BLOCK_GROUPS;
template <int... I>
using Numbers = std::integer_sequence<int, I...>;
constexpr std::make_integer_sequence<int, BLOCK> ALL{};

}  // namespace snip::SNIP_SET
