/* What the kernels share: vectors, rows of tensors, products of small matrices, the exponential. */

#ifndef REGARD_VECTORS_H
#define REGARD_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <omp.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8 /* of a block of results: ROWS * COLUMNS vectors, and the operands, fit the registers */
#define COLUMNS 3
#elif defined(__AVX__)
#define LANES 8
#define ROWS 4
#define COLUMNS 3
#else
#define LANES 4
#define ROWS 6
#define COLUMNS 2
#endif
#define INLINE static inline __attribute__((always_inline))
#define UP(n) (((n) + LANES - 1) / LANES * LANES)

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef uint16_t loose_halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

/* Rows of a tensor (batch, tokens, heads, width): steps in elements; the last one is 1. */
typedef struct {
    void *at;
    int64_t batch, token, head;
} Rows;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- loading and storing rows ---- */

INLINE vec widen(const void *row, int64_t at, int narrow) {
    if (!narrow) return *(const loose *)((const float *)row + at);
    halves h = *(const loose_halves *)((const uint16_t *)row + at);
    return (vec)(__builtin_convertvector(h, ints) << 16);
}

INLINE vec widen_some(const void *row, int64_t at, int64_t count, int narrow) {
    vec result = {0};
    for (int64_t i = 0; i < count; i++) {
        if (narrow) {
            uint32_t bits = (uint32_t)((const uint16_t *)row)[at + i] << 16;
            float one;
            memcpy(&one, &bits, 4);
            result[i] = one;
        } else
            result[i] = ((const float *)row)[at + i];
    }
    return result;
}

INLINE uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store_row(void *row, const float *from, int64_t width, float factor, int narrow) {
    if (narrow)
        for (int64_t i = 0; i < width; i++) ((uint16_t *)row)[i] = rounded(from[i] * factor);
    else
        for (int64_t i = 0; i < width; i++) ((float *)row)[i] = from[i] * factor;
}

INLINE void move(float *row, const float *from, int64_t width, int add) {
    for (int64_t c = 0; c < width; c++) row[c] = add ? row[c] + from[c] : from[c];
}

/* Rows of whole vectors: row += factor * from. */
INLINE void add_row(float *row, const float *from, float factor, int64_t width) {
    for (int64_t c = 0; c < width; c += LANES) *(vec *)(row + c) += factor * *(const vec *)(from + c);
}

INLINE const char *row_of(const Rows *rows, int64_t item, int64_t token, int64_t head, int narrow) {
    int64_t at = item * rows->batch + token * rows->token + head * rows->head;
    return (const char *)rows->at + at * (narrow ? 2 : 4);
}

/* Rows (count, width) into (count, UP(width)), times a factor; lanes beyond width are zero. */
INLINE void gather(float *to, const Rows *rows, int64_t item, int64_t head, const int64_t *tokens, int64_t count, int64_t width,
                   float factor, int narrow) {
    int64_t whole = width / LANES * LANES, step = UP(width);
    for (int64_t i = 0; i < count; i++) {
        const char *row = row_of(rows, item, tokens[i], head, narrow);
        float *target = to + i * step;
        for (int64_t c = 0; c < whole; c += LANES) *(vec *)(target + c) = widen(row, c, narrow) * factor;
        if (whole < width) *(vec *)(target + whole) = widen_some(row, whole, width - whole, narrow) * factor;
    }
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif
#if LANES == 16
#define LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOW(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define HIGH(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif

/* LANES vectors, transposed: each stage interleaves the first half with the second, which turns the address bits by one. */
INLINE void transpose(vec *square) {
#pragma GCC unroll 4
    for (int stage = 1; stage < LANES; stage *= 2) {
        vec next[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = LOW(square[i], square[i + LANES / 2]);
            next[2 * i + 1] = HIGH(square[i], square[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) square[i] = next[i];
    }
}

/* Rows (count, width) into columns (width, UP(count)); columns beyond count are zero. */
INLINE void gather_transposed(float *to, const Rows *rows, int64_t item, int64_t head, const int64_t *tokens, int64_t count,
                              int64_t width, int narrow) {
    int64_t step = UP(count);
    for (int64_t first = 0; first < count; first += LANES) {
        int64_t here = least(LANES, count - first);
        const char *row[LANES];
        for (int64_t i = 0; i < LANES; i++) row[i] = row_of(rows, item, tokens[first + (i < here ? i : 0)], head, narrow);
        for (int64_t c = 0; c < width; c += LANES) {
            vec square[LANES];
            int64_t wide = least(LANES, width - c);
            if (wide == LANES)
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) square[i] = widen(row[i], c, narrow);
            else
                for (int i = 0; i < LANES; i++) square[i] = widen_some(row[i], c, wide, narrow);
            for (int64_t i = here; i < LANES; i++) square[i] = (vec){0};
            transpose(square);
            for (int64_t i = 0; i < wide; i++) *(vec *)(to + (c + i) * step + first) = square[i];
        }
    }
}

/* ---- products ---- */

/* A block of c += a b: `rows` by `columns` vectors of c. Element (i, k) of a is a[i * a_row + k * a_next]. */
INLINE void block(const int rows, const int columns, float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_next,
                  const float *b, int64_t b_row, int64_t inner, int add) {
    vec sum[8][COLUMNS]; /* of which rows * columns are ever there */
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) sum[i][j] = add ? *(vec *)(c + i * c_row + j * LANES) : (vec){0};
    for (int64_t k = 0; k < inner; k++) {
        vec right[COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) right[j] = *(const vec *)(b + k * b_row + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            float left = a[i * a_row + k * a_next];
#pragma GCC unroll 4
            for (int j = 0; j < columns; j++) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) *(vec *)(c + i * c_row + j * LANES) = sum[i][j];
}

#define BLOCK(R, C) block(R, C, c, c_row, a, a_row, a_next, b, b_row, inner, add)
#define SOME_ROWS(C)              \
    switch (rows) {               \
        case 1: BLOCK(1, C); break; \
        case 2: BLOCK(2, C); break; \
        case 3: BLOCK(3, C); break; \
        case 4: BLOCK(4, C); break; \
        case 5: BLOCK(5, C); break; \
        case 6: BLOCK(6, C); break; \
        case 7: BLOCK(7, C); break; \
        default: BLOCK(8, C);       \
    }

static void blocks(int64_t rows, int64_t columns, float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_next,
                   const float *b, int64_t b_row, int64_t inner, int add) {
    switch (columns) {
        case 1: SOME_ROWS(1); break;
#if COLUMNS > 2
        case 2: SOME_ROWS(2); break;
#endif
        default: SOME_ROWS(COLUMNS);
    }
}

/* c (m, n) = a (m, inner) b (inner, n), or += where `add`; n counts whole vectors. */
static void multiply(int64_t m, int64_t n, int64_t inner, float *c, int64_t c_row, const float *a, int64_t a_row,
                     int64_t a_next, const float *b, int64_t b_row, int add) {
    int64_t vectors = n / LANES, pieces = (vectors + COLUMNS - 1) / COLUMNS, high = (m + ROWS - 1) / ROWS;
    for (int64_t p = 0; p < pieces; p++) {
        int64_t from = vectors * p / pieces, to = vectors * (p + 1) / pieces;
        for (int64_t h = 0; h < high; h++) {
            int64_t top = m * h / high, bottom = m * (h + 1) / high;
            blocks(bottom - top, to - from, c + top * c_row + from * LANES, c_row, a + top * a_row, a_row, a_next,
                   b + from * LANES, b_row, inner, add);
        }
    }
}

/* ---- softmax ---- */

INLINE vec choose(ints condition, vec yes, vec no) { return (vec)((condition & (ints)yes) | (~condition & (ints)no)); }

/* e^x where x is at most a little above 0; 0 below the normal numbers, NaN of NaN. */
INLINE vec exponential(vec x) {
    const vec zero = {0}, low = zero - 87.0f, magic = zero + 12582912.0f;
    ints hidden = x < low;
    x = choose(hidden, low, x);
    vec n = x * 1.44269504f + magic; /* the nearest whole number, in the low bits */
    ints power = (ints)n << 23;
    n -= magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec scaled = p * (vec)(power + (127 << 23));
    return choose(hidden, zero, scaled);
}

INLINE float sum_of(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* The sums, or the largest, of LANES vectors each, in one vector. */
INLINE vec sums_of(vec *square) {
    transpose(square);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) square[i] += square[i + half];
    return square[0];
}

INLINE vec largest_of(vec *square) {
    transpose(square);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) square[i] = choose(square[i] > square[i + half], square[i], square[i + half]);
    return square[0];
}

/* Whether all of some numbers, whole vectors of them, are finite. */
INLINE int all_finite(const float *numbers, int64_t count) {
    vec nothing = {0};
    for (int64_t i = 0; i < count; i += LANES) nothing += *(const vec *)(numbers + i) * 0.0f;
    return sum_of(nothing) == 0;
}

INLINE int has_nan(const float *numbers, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (numbers[i] != numbers[i]) return 1;
    return 0;
}

/* The next numbers of a thread's scratch memory, on a line of the cache of their own. */
INLINE float *part(float **scratch, int64_t size) {
    float *here = *scratch;
    *scratch += (size + 15) / 16 * 16;
    return here;
}

#endif
