// What each instruction set implements. One source (products.hpp, lists.hpp, encode.hpp,
// cosines.hpp, common.hpp) is compiled once for each set, in a namespace of its own, with that set's flags.
// All results are integers, or floats added in one fixed order, so every set gives the same bits.
//
// No unit that is compiled for an instruction set may use templates of the standard library: the
// linker could take that unit's copy of them for all others.
#pragma once

#include <cstddef>
#include <cstdint>

namespace snip {

constexpr std::size_t GROUP = 16;        // columns packed together
constexpr std::size_t PANEL = 4 * GROUP; // columns that stay in the nearest cache

// Codes laid out for products: [columns / GROUP][width / 4][GROUP][4], zeros after the last.
// Products start from the fall of a column's limit: what its code could not hold may add as much.
// For kernels with one unsigned side, which add 128 to rows, 128 times the column's sum is taken off.
struct Columns {
    const std::int8_t *packed;
    const std::int32_t *starts, *turned_starts;
    std::size_t count;  // real columns; packed ones are a multiple of PANEL
    std::size_t width;  // a multiple of 4
};

// Codes as they are, row after row.
struct Codes {
    const std::int8_t *values;
    std::size_t count, width;
};

// Pairs of numbers that grow; `grow` is called when there is no room for `more`.
struct Pairs {
    std::int32_t *first, *second;
    std::size_t size, room;
    void (*grow)(Pairs *, std::size_t more);
};

// Which products are hits: those that reach their row's limit, and a second limit of wider codes.
struct HitRule {
    const std::int32_t *limits;          // of each row
    const Codes *wide_rows, *wide_columns;  // null: there is no second test
    const std::int32_t *wide_limits, *wide_falls;  // of each row, of each column
    std::int32_t *wide_starts;           // scratch for a number a column
    std::int64_t first;                  // row r meets the columns before r + first only
    const std::uint8_t *reference_rows, *reference_columns;  // null: there are none
    bool references_only;                // two others do not pair either
};

struct Lists {
    Columns columns;                 // the centroids
    Codes centroids;
    const std::int32_t *sizes;       // their squared norms, then the largest number
    const float *widest;             // distance of each from the one furthest away
    const float *distances;          // of all from all; null: they are computed
};

// Codes of a product quantiser with words of 8 bits, sorted by list: code n is
// words[0][codes[n][0]], ..., words[m - 1][codes[n][m - 1]], plus the centroid of its list if
// `residual`. Name n is code n, or centroid n - count from `count` on.
struct Coded {
    const std::uint8_t *codes;
    std::size_t count, m;
    const std::int64_t *starts;  // of the lists, then `count`
    const float *centroids;
    std::size_t lists, dim;
    const float *words;  // m tables of 256 words, dim / m wide
    bool residual;
};

// What some rows were compared with: `width` names a row (negative: none), and its products.
struct Views {
    const std::int64_t *names;
    const float *products;
    std::size_t count, width;
};

struct Kernels {
    const char *name;
    // out[r][c] = rows[r] . columns[c], `stride` numbers a row; `turned` is scratch (see below)
    void (*products)(const Codes &rows, const Columns &, std::int32_t *out, std::size_t stride,
                     std::uint8_t *turned);
    void (*hits)(const Codes &rows, const Columns &, const HitRule &, Pairs &found,
                 std::uint8_t *turned);
    void (*assign)(const Codes &rows, const Lists &, const float *radius, std::int32_t *home,
                   std::int32_t *best, Pairs *visits, std::uint8_t *turned, std::int32_t *table);
    void (*dots)(const Codes &x, const Codes &y, std::int32_t *out);
    void (*widen)(const void *rows, int bytes, std::size_t count, float *out);
    void (*whole)(const void *rows, int bytes, std::size_t count, std::size_t dim, float longest,
                  std::int16_t *out, float *norms, float *work);
    void (*project)(const std::int16_t *rows, std::size_t count, std::size_t dim,
                    const std::int16_t *packed, std::size_t width, float *out);
    void (*finish)(const float *products, std::size_t count, std::size_t width, float unit,
                   const float *axis, float length, float scale, std::int8_t *codes,
                   std::int32_t *falls, float *work);
    void (*orthonormal)(double *rows, std::size_t count, std::size_t dim, double least,
                        double *work);
    void (*norms)(const void *rows, int bytes, std::size_t count, std::size_t dim, double *out);
    void (*cosines)(const void *x, const double *x_norms, const void *y, const double *y_norms,
                    int bytes, std::size_t dim, const std::int64_t *i, const std::int64_t *j,
                    std::size_t count, float *out, double *work);
    void (*table)(const void *x, const double *x_norms, std::size_t m, const void *y,
                  const double *y_norms, std::size_t n, int bytes, std::size_t dim, float *out,
                  double *work);
    void (*hashes)(const std::uint64_t *words, std::size_t count, std::size_t width,
                   const std::uint64_t *offsets, bool mixed, std::uint64_t *out);
    // the vectors of names, zeros for negative ones
    void (*decode)(const Coded &, const std::int64_t *names, std::size_t count, float *out);
    // ‖x - y‖² of each pair x = rows[at[p]], y = others[p]; `vectors` are those of the rows' names;
    // where it is above the limit of the pair, some smaller number above the limit
    void (*common_lengths)(const Views &rows, const float *vectors, std::size_t dim,
                           const std::int64_t *at, const Views &others, double ridge,
                           const double *limits, double *out,
                           double *work);  // `work` has 2 (width + 8)^2 numbers
};

// Rows are copied to `turned` for a call: (count + ROWS) * width bytes.
constexpr std::size_t ROWS = 8;

#if defined(__x86_64__)
extern const Kernels avx2, vnni;
#endif
extern const Kernels portable;

}  // namespace snip
