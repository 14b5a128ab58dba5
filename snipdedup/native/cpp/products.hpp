// Products of int8 codes: all of them, or only where they reach a limit.
//
// A block of a few rows and 64 columns is kept in registers; each step adds the products of four
// coordinates. Hits are found there too, so that other products are never written.
#pragma once

#include "simd.hpp"

namespace snip::SNIP_SET {

constexpr std::size_t TILE_ROWS = 1024;  // rows whose hits with a panel are held
static_assert(PANEL == 64, "a mask has a bit for each column of a panel");
static_assert(PANEL % (BLOCK_GROUPS * GROUP) == 0 && ROWS >= BLOCK_ROWS);

// Rows as a kernel wants them, as wide as packed columns, zeros after the last.
inline void turn_rows(const Codes &rows, std::size_t width, std::uint8_t *out) {
    for (std::size_t n = 0; n < rows.count; n++) {
        const std::int8_t *row = rows.values + n * rows.width;
        for (std::size_t k = 0; k < rows.width; k++) out[n * width + k] = (std::uint8_t)row[k] ^ TURN;
        for (std::size_t k = rows.width; k < width; k++) out[n * width + k] = 0;
    }
    std::memset(out + rows.count * width, 0, ROWS * width);
}

inline const std::int32_t *starts_of(const Columns &columns) {
    return TURN ? columns.turned_starts : columns.starts;
}

// The products of BLOCK_ROWS rows with BLOCK_GROUPS groups of columns; place I is of row I / G,
// group I % G. Places are constants of templates, so that compilers keep all sums in registers.
template <int... I>
SNIP_INLINE void block_products(const std::uint8_t *rows, std::size_t width,
                                const std::int8_t *packed, const std::int32_t *starts,
                                Sums (&sums)[BLOCK], Numbers<I...>) {
    constexpr int G = BLOCK_GROUPS;
    ((sums[I] = start(starts + I % G * GROUP)), ...);
    for (std::size_t k = 0; k < width; k += 4)
        (add(sums[I], spread(rows + I / G * width + k),
             group(packed + I % G * GROUP * width + k * GROUP)),
         ...);
}

// Tell, a bit a column, which products of a block reach the limit of their row.
template <int... I>
SNIP_INLINE void block_masks(const std::uint8_t *rows, std::size_t width,
                             const std::int8_t *packed, const std::int32_t *starts,
                             const std::int32_t *limits, std::uint64_t *masks, Numbers<I...> all) {
    constexpr int G = BLOCK_GROUPS;
    Sums sums[BLOCK];
    block_products(rows, width, packed, starts, sums, all);
    (settle(sums[I]), ...);
    ((masks[I / G] |= (std::uint64_t)reach(sums[I], limits[I / G]) << I % G * GROUP), ...);
}

// Write the products of a block, `stride` numbers a row.
template <int... I>
SNIP_INLINE void store_block(const std::uint8_t *rows, std::size_t width,
                             const std::int8_t *packed, const std::int32_t *starts,
                             std::int32_t *out, std::size_t stride, Numbers<I...> all) {
    constexpr int G = BLOCK_GROUPS;
    Sums sums[BLOCK];
    block_products(rows, width, packed, starts, sums, all);
    (settle(sums[I]), ...);
    (store(out + I / G * stride + I % G * GROUP, sums[I]), ...);
}

static void products(const Codes &rows, const Columns &columns, std::int32_t *out,
                     std::size_t stride, std::uint8_t *turned) {
    constexpr std::size_t STEP = BLOCK_GROUPS * GROUP;
    const std::size_t width = columns.width;
    turn_rows(rows, width, turned);
    std::int32_t part[BLOCK_ROWS * STEP];
    for (std::size_t c = 0; c < columns.count; c += STEP) {
        const std::int8_t *packed = columns.packed + c * width;
        const std::int32_t *starts = starts_of(columns) + c;
        const std::size_t left = columns.count - c < STEP ? columns.count - c : STEP;
        for (std::size_t r = 0; r < rows.count; r += BLOCK_ROWS) {
            const std::uint8_t *some = turned + r * width;
            if (left == STEP && r + BLOCK_ROWS <= rows.count) {
                store_block(some, width, packed, starts, out + r * stride + c, stride, ALL);
                continue;
            }
            store_block(some, width, packed, starts, part, STEP, ALL);
            for (std::size_t row = 0; row < BLOCK_ROWS && r + row < rows.count; row++)
                std::memcpy(out + (r + row) * stride + c, part + row * STEP, 4 * left);
        }
    }
}

inline bool wanted(const HitRule &rule, std::size_t row, std::size_t column) {
    if ((std::int64_t)column >= (std::int64_t)row + rule.first) return false;
    if (!rule.reference_rows) return true;
    const bool a = rule.reference_rows[row], b = rule.reference_columns[column];
    return rule.references_only ? a != b : !(a && b);
}

// Drop those hits from `begin` on whose wide codes do not reach the limit.
inline void keep_wide(const HitRule &rule, Pairs &found, std::size_t begin) {
    constexpr std::size_t AHEAD = 8, LINE = 64;
    const std::size_t width = rule.wide_rows->width, end = found.size;
    const std::int8_t *x = rule.wide_rows->values, *y = rule.wide_columns->values;
    std::size_t kept = begin;
    for (std::size_t n = begin; n < end; n++) {
        if (n + AHEAD < end)
            for (std::size_t k = 0; k < width; k += LINE)
                __builtin_prefetch(y + (std::size_t)found.second[n + AHEAD] * width + k);
        const std::size_t row = (std::size_t)found.first[n], column = (std::size_t)found.second[n];
        const std::int32_t product = turned_dot(x + row * width, y + column * width, width);
        found.first[kept] = (std::int32_t)row;
        found.second[kept] = (std::int32_t)column;
        kept += product + rule.wide_starts[column] >= rule.wide_limits[row];
    }
    found.size = kept;
}

// Hits come in the order of tiles of rows, panels of columns, rows, columns.
static void hits(const Codes &rows, const Columns &columns, const HitRule &rule, Pairs &found,
                 std::uint8_t *turned) {
    static thread_local std::uint64_t masks[TILE_ROWS + ROWS];  // of each row's hits with a panel
    const std::size_t width = columns.width;
    turn_rows(rows, width, turned);
    for (std::size_t c = 0; rule.wide_rows && c < columns.count; c++) {
        const std::size_t wide = rule.wide_columns->width;
        rule.wide_starts[c] = rule.wide_falls[c] - turn(rule.wide_columns->values + c * wide, wide);
    }
    for (std::size_t tile = 0; tile < rows.count; tile += TILE_ROWS) {
        const std::size_t end = tile + TILE_ROWS < rows.count ? tile + TILE_ROWS : rows.count;
        for (std::size_t panel = 0; panel < columns.count; panel += PANEL) {
            std::size_t count = 0;
            for (std::size_t r = tile; r < end; r += BLOCK_ROWS) {
                const std::size_t last = r + BLOCK_ROWS < end ? r + BLOCK_ROWS : end;
                std::int32_t limits[BLOCK_ROWS];
                for (std::size_t row = 0; row < BLOCK_ROWS; row++) {
                    limits[row] = r + row < last ? rule.limits[r + row] : INT32_MAX;
                    masks[r - tile + row] = 0;
                }
                if ((std::int64_t)panel >= (std::int64_t)(last - 1) + rule.first) continue;
                for (std::size_t c = 0; c < PANEL; c += BLOCK_GROUPS * GROUP) {
                    std::uint64_t part[BLOCK_ROWS] = {};
                    block_masks(turned + r * width, width, columns.packed + (panel + c) * width,
                                starts_of(columns) + panel + c, limits, part, ALL);
                    for (std::size_t row = 0; row < BLOCK_ROWS; row++)
                        masks[r - tile + row] |= part[row] << c;
                }
                for (std::size_t row = r; row < last; row++)
                    count += (std::size_t)__builtin_popcountll(masks[row - tile]);
            }
            if (!count) continue;
            if (found.size + count > found.room) found.grow(&found, count);
            const std::size_t begin = found.size;
            for (std::size_t row = tile; row < end; row++)
                for (std::uint64_t mask = masks[row - tile]; mask; mask &= mask - 1) {
                    const std::size_t column = panel + (std::size_t)__builtin_ctzll(mask);
                    found.first[found.size] = (std::int32_t)row;
                    found.second[found.size] = (std::int32_t)column;
                    found.size += column < columns.count && wanted(rule, row, column);
                }
            if (rule.wide_rows) keep_wide(rule, found, begin);
        }
    }
}

// The product of each row of x with the same row of y.
static void dots(const Codes &x, const Codes &y, std::int32_t *out) {
    for (std::size_t n = 0; n < x.count; n++)
        out[n] = dot(x.values + n * x.width, y.values + n * x.width, x.width);
}

}  // namespace snip::SNIP_SET
