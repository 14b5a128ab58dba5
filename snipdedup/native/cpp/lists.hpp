// The nearest centroid of each code, and the lists that the code visits.
//
// With near(c) = 2 x.c - |c|^2 = |x|^2 - |x - c|^2, the home h of x has the largest near. x visits
// c if its distance to the bisector of h and c is at most its radius:
// near(h) - near(c) <= 2 radius |h - c|.
#pragma once

#include "products.hpp"

namespace snip::SNIP_SET {

inline float distance(const Lists &lists, std::size_t a, std::size_t b) {
    if (lists.distances) return lists.distances[a * lists.columns.count + b];
    const std::size_t width = lists.centroids.width;
    const std::int8_t *values = lists.centroids.values;
    const std::int32_t product = dot(values + a * width, values + b * width, width);
    return root((float)(lists.sizes[a] + lists.sizes[b] - 2 * product));
}

typedef float GroupFloats __attribute__((vector_size(4 * GROUP)));

inline GroupInts ints(const std::int32_t *from) {
    GroupInts values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

// The largest near of each lane so far, and the first centroid that has it.
struct Best {
    GroupInts near, place;

    // Turn the products with a group of centroids to near.
    void meet(std::int32_t *products, const std::int32_t *sizes, std::size_t first, GroupInts lanes) {
        const GroupInts values = 2 * ints(products) - ints(sizes);
        std::memcpy(products, &values, sizeof values);
        const GroupInts better = values > near;
        near = (values & better) | (near & ~better);
        place = ((lanes + (std::int32_t)first) & better) | (place & ~better);
    }
    // Of all lanes: the largest, and the first centroid that has it.
    void of_all(std::int32_t &most, std::int32_t &first) const {
        most = near[0], first = place[0];
        for (std::size_t lane = 1; lane < GROUP; lane++) {
            const bool better = near[lane] > most || (near[lane] == most && place[lane] < first);
            most = better ? near[lane] : most;
            first = better ? place[lane] : first;
        }
    }
};

// The lists that one row visits. First as if all centroids were as far from its own as the
// furthest, then by their own distances. Numbers are below 2^24, so float32 holds them.
inline void find_visits(const Lists &lists, const std::int32_t *near, std::int32_t most,
                        std::size_t own, float radius, std::int32_t row, Pairs &visits) {
    const std::size_t count = lists.columns.count;
    const float twice = 2 * radius;
    const double least = __builtin_ceil(most - (double)twice * lists.widest[own]);
    const std::int32_t limit = least > INT32_MIN ? (std::int32_t)least : INT32_MIN;
    for (std::size_t group = 0; group < count; group += GROUP) {
        const GroupInts values = ints(near + group);
        GroupInts close = values >= limit;
        const bool known = lists.distances && group + GROUP <= count;
        if (known) {
            GroupFloats away;
            std::memcpy(&away, lists.distances + own * count + group, sizeof away);
            close &= (GroupInts)(__builtin_convertvector(most - values, GroupFloats) <= twice * away);
        }
        for (unsigned mask = truths(close); mask; mask &= mask - 1) {
            const std::size_t c = group + (std::size_t)__builtin_ctz(mask);
            if (c >= count) break;
            if (!known && (float)(most - near[c]) > twice * distance(lists, own, c)) continue;
            visits.first[visits.size] = row;
            visits.second[visits.size++] = (std::int32_t)c;
        }
    }
}

// `table` is scratch for BLOCK_ROWS rows of near. Ties go to the first centroid. Without `visits`
// only homes are found.
static void assign(const Codes &rows, const Lists &lists, const float *radius, std::int32_t *home,
                   std::int32_t *best, Pairs *visits, std::uint8_t *turned, std::int32_t *table) {
    const std::size_t width = lists.columns.width, count = lists.columns.count;
    const std::size_t stride = (count + PANEL - 1) / PANEL * PANEL;
    GroupInts lanes;
    for (std::size_t lane = 0; lane < GROUP; lane++) lanes[lane] = (std::int32_t)lane;
    turn_rows(rows, width, turned);
    for (std::size_t r = 0; r < rows.count; r += BLOCK_ROWS) {
        Best found[BLOCK_ROWS];
        for (Best &one : found) one = {GroupInts{} + INT32_MIN, GroupInts{}};
        for (std::size_t c = 0; c < count; c += BLOCK_GROUPS * GROUP) {
            store_block(turned + r * width, width, lists.columns.packed + c * width,
                        starts_of(lists.columns) + c, table + c, stride, ALL);
            for (std::size_t row = 0; row < BLOCK_ROWS; row++)
                for (std::size_t group = c; group < c + BLOCK_GROUPS * GROUP; group += GROUP)
                    found[row].meet(table + row * stride + group, lists.sizes + group, group, lanes);
        }
        for (std::size_t row = r; row < r + BLOCK_ROWS && row < rows.count; row++) {
            std::int32_t most, own;
            found[row - r].of_all(most, own);
            home[row] = own;
            best[row] = most;
            if (!visits) continue;
            if (visits->size + count > visits->room) visits->grow(visits, count);
            find_visits(lists, table + (row - r) * stride, most, (std::size_t)own, radius[row],
                        (std::int32_t)row, *visits);
        }
    }
}

}  // namespace snip::SNIP_SET
