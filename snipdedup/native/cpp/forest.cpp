// Maximum spanning forests by Kruskal's method, with union by minimum and path halving.
#include "forest.hpp"

namespace snip {

namespace {

template <class Number>
Number root(Number *parent, Number node) {
    while (parent[node] != node) node = parent[node] = parent[parent[node]];
    return node;
}

}  // namespace

template <class Number>
std::size_t kruskal(const std::int64_t *start, const std::int64_t *end, const std::int64_t *order,
                    std::size_t edges, Number *parent, std::int64_t *chosen) {
    std::size_t count = 0;
    for (std::size_t n = 0; n < edges; n++) {
        const std::int64_t edge = order ? order[n] : (std::int64_t)n;
        const Number a = root(parent, (Number)start[edge]), b = root(parent, (Number)end[edge]);
        if (a == b) continue;
        parent[a < b ? b : a] = a < b ? a : b;
        if (chosen) chosen[count] = edge;
        count++;
    }
    return count;
}

template std::size_t kruskal(const std::int64_t *, const std::int64_t *, const std::int64_t *,
                             std::size_t, std::uint32_t *, std::int64_t *);
template std::size_t kruskal(const std::int64_t *, const std::int64_t *, const std::int64_t *,
                             std::size_t, std::int64_t *, std::int64_t *);

}  // namespace snip
