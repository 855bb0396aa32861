/* Softmax attention inside tiles, forward and backward, for the CPU this is compiled on.

   A tile is some queries and the keys that they need, all named by row numbers; one head of a tile is four steps in the caches
   of one core: gather the rows, multiply, normalise, multiply. Every product goes through `multiply`, which keeps a block of
   the result in registers. Everything is computed in float32; rows are float32 or bfloat16. */

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

typedef struct {
    int64_t narrow, narrow_out; /* rows of q, k, v (and, in the backward, of out and grad) are bfloat16; those of out are */
    int64_t batch, heads, kv_heads, dim, value;
    Rows q, k, v, out, lse;
    int64_t tiles, tq, tk;
    const int64_t *queries, *keys, *kinds; /* (tiles, tq); (tiles, tk) of a batch item and a head; the class of each tile */
    int64_t keys_batch, keys_head;
    const uint8_t *seen; /* which keys of each tile exist, in the order of `keys`; NULL: all */
    int64_t seen_batch, seen_head;
    const float *bias; /* (tq, UP(tk)) of a class and a head, -inf where hidden and beyond tk; NULL: none */
    int64_t bias_kind, bias_head;
    double scale;
    int64_t merge; /* rows of out and lse, or of dq, hold what other keys gave */
    Rows grad, grad_lse, dq, dk, dv; /* float32 but for grad; grad_lse may be NULL */
    float *sums; /* (workers, classes, heads, tq, UP(tk)): gradients of the biased scores; NULL: not wanted */
    int64_t sums_worker;
    int64_t apart; /* every key stands in one tile only: rows of dk and dv are written, not added to */
    int64_t slices; /* of the tiles where they share keys; each has its own rows of dk and dv, after one another */
    int64_t slice_k, slice_v;
    float *scratch;
    int64_t scratch_worker;
    int64_t workers;
} Task;

int64_t regard_lanes(void) { return LANES; }
int64_t regard_task_size(void) { return sizeof(Task); }

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

/* Scores of at most LANES rows, of `count` each, into weights, not yet divided by their `sums`; the logarithm of the sum of
   a row's weights and its `base` make the log-sum-exp. */
static void weigh(float *scores, int64_t rows, int64_t count, const float *bias, const float *hidden, vec *base, vec *sums) {
    vec square[LANES];
    for (int64_t i = 0; i < LANES; i++) {
        vec most = (vec){0} - INFINITY;
        for (int64_t j = 0; i < rows && j < count; j += LANES) {
            vec s = *(vec *)(scores + i * count + j);
            if (bias) s += *(const loose *)(bias + i * count + j);
            if (hidden) s += *(const vec *)(hidden + j);
            *(vec *)(scores + i * count + j) = s;
            most = choose(s > most, s, most);
        }
        square[i] = most;
    }
    vec most = largest_of(square), zero = {0};
    most = choose(most == zero - INFINITY, zero, most);
    for (int64_t i = 0; i < LANES; i++) {
        vec total = zero;
        for (int64_t j = 0; i < rows && j < count; j += LANES) {
            vec weight = exponential(*(vec *)(scores + i * count + j) - most[i]);
            *(vec *)(scores + i * count + j) = weight;
            total += weight;
        }
        square[i] = total;
    }
    *base = most;
    *sums = sums_of(square);
}

/* What is added to the scores of a tile: -inf for keys that do not exist; NULL where all do and their number is even. */
INLINE const float *hide(const Task *task, float *hidden, int64_t item, int64_t head, int64_t tile) {
    int64_t tk = task->tk;
    if (!task->seen && (task->bias || tk == UP(tk))) return NULL;
    const uint8_t *seen = NULL;
    if (task->seen) seen = task->seen + item * task->seen_batch + head * task->seen_head + tile * tk;
    for (int64_t j = 0; j < UP(tk); j++) hidden[j] = j < tk && (!seen || seen[j]) ? 0.0f : -INFINITY;
    return hidden;
}

/* How many queries are dealt with at once: their scores stay in the cache next to the core. */
INLINE int64_t at_once(int64_t tq, int64_t tk, int64_t scores) {
    int64_t some = scores / UP(tk) / LANES * LANES;
    return least(tq, some > LANES ? some : LANES);
}

#define CLOSE (1 << 13)
#define NEAR (1 << 15)

INLINE float *part(float **scratch, int64_t size) {
    float *here = *scratch;
    *scratch += (size + 15) / 16 * 16;
    return here;
}

/* One head of keys and values of a tile, and its place in the lists. */
typedef struct {
    int64_t item, tile, kv;
} Unit;

INLINE Unit unit_at(const Task *task, int64_t number) {
    int64_t tile = number / task->kv_heads;
    return (Unit){tile / task->tiles, tile % task->tiles, number % task->kv_heads};
}

INLINE void fetch(const Rows *rows, int64_t item, int64_t head, const int64_t *tokens, int64_t from, int64_t to, int64_t width,
                  int narrow) {
    int64_t bytes = width * (narrow ? 2 : 4);
    for (int64_t i = from; i < to; i++) {
        const char *row = row_of(rows, item, tokens[i], head, narrow);
        for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(row + c);
    }
}

/* Ask for a part of the rows of the next unit while this one is computed: `turn` of `turns`. */
INLINE void look_ahead(const Task *task, Unit next, int64_t turn, int64_t turns) {
    int64_t group = task->heads / task->kv_heads, head = next.kv * group;
    const int64_t *keys = task->keys + next.item * task->keys_batch + head * task->keys_head + next.tile * task->tk;
    const int64_t *queries = task->queries + next.tile * task->tq;
    int64_t from = task->tk * turn / turns, to = task->tk * (turn + 1) / turns;
    fetch(&task->k, next.item, next.kv, keys, from, to, task->dim, task->narrow);
    fetch(&task->v, next.item, next.kv, keys, from, to, task->value, task->narrow);
    from = task->tq * turn / turns, to = task->tq * (turn + 1) / turns;
    fetch(&task->q, next.item, head, queries, from, to, task->dim * group, task->narrow);
    if (!task->grad.at) return;
    fetch(&task->out, next.item, head, queries, from, to, task->value * group, task->narrow);
    fetch(&task->grad, next.item, head, queries, from, to, task->value * group, task->narrow);
}

/* ---- forward ---- */

int64_t regard_forward_scratch(const Task *task) {
    int64_t tk = UP(task->tk), some = at_once(task->tq, task->tk, CLOSE);
    int64_t size = task->dim * tk + task->tk * UP(task->value) + tk;
    return size + some * (UP(task->dim) + tk + UP(task->value)) + 256;
}

static void attend(const Task *task, float *scratch, Unit unit, Unit next) {
    const int64_t item = unit.item, tile = unit.tile, kv = unit.kv;
    const int64_t tq = task->tq, tk = task->tk, step = UP(tk), dim = task->dim, value = task->value, wide = UP(value);
    const int64_t some = at_once(tq, tk, CLOSE), group = task->heads / task->kv_heads;
    float *columns = part(&scratch, dim * step), *values = part(&scratch, tk * wide), *space = part(&scratch, step);
    float *queries = part(&scratch, some * UP(dim)), *scores = part(&scratch, some * step), *result = part(&scratch, some * wide);
    vec base[some / LANES + 1], sums[some / LANES + 1];
    int64_t turn = 0, turns = group * ((tq + LANES - 1) / LANES);
    const int64_t *rows = task->queries + tile * tq;
    const float *hidden = NULL;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        if (head == kv * group || task->keys_head) {
            const int64_t *keys = task->keys + item * task->keys_batch + head * task->keys_head + tile * tk;
            gather_transposed(columns, &task->k, item, kv, keys, tk, dim, task->narrow);
            gather(values, &task->v, item, kv, keys, tk, value, 1.0f, task->narrow);
        }
        if (head == kv * group || task->seen_head) hidden = hide(task, space, item, head, tile);
        const float *bias = task->bias ? task->bias + task->kinds[tile] * task->bias_kind + head * task->bias_head : NULL;
        for (int64_t first = 0; first < tq; first += some) {
            int64_t here = least(some, tq - first);
            gather(queries, &task->q, item, head, rows + first, here, dim, task->scale, task->narrow);
            multiply(here, step, dim, scores, step, queries, UP(dim), 1, columns, step, 0);
            for (int64_t i = 0; i < here; i += LANES) {
                const float *added = bias ? bias + (first + i) * step : NULL;
                look_ahead(task, next, turn++, turns);
                weigh(scores + i * step, least(LANES, here - i), step, added, hidden, base + i / LANES, sums + i / LANES);
            }
            multiply(here, wide, tk, result, wide, scores, step, 1, values, wide, 0);
            for (int64_t i = 0; i < here; i++) {
                void *out = (void *)row_of(&task->out, item, rows[first + i], head, task->narrow_out);
                float *known = task->lse.at ? (float *)row_of(&task->lse, item, rows[first + i], head, 0) : NULL;
                float sum = sums[i / LANES][i % LANES], factor = sum == 0 ? 0 : 1 / sum;
                float lse = known ? base[i / LANES][i % LANES] + logf(sum) : 0;
                if (task->merge) {
                    float most = *known > lse ? *known : lse;
                    if (most == -INFINITY) continue;
                    float total = most + logf(expf(*known - most) + expf(lse - most));
                    float keep = expf(*known - total), take = expf(lse - total) * factor;
                    for (int64_t c = 0; c < value; c++)
                        ((float *)out)[c] = ((float *)out)[c] * keep + result[i * wide + c] * take;
                    *known = total;
                } else {
                    store_row(out, result + i * wide, value, factor, task->narrow_out);
                    if (known) *known = lse;
                }
            }
        }
    }
}

INLINE float *of_worker(const Task *task) { return task->scratch + omp_get_thread_num() * task->scratch_worker; }

void regard_forward(const Task *task) {
    int64_t units = task->batch * task->tiles * task->kv_heads;
#pragma omp parallel for schedule(guided, 4) num_threads(task->workers)
    for (int64_t i = 0; i < units; i++) attend(task, of_worker(task), unit_at(task, i), unit_at(task, least(i + 1, units - 1)));
}

/* ---- backward ---- */

int64_t regard_backward_scratch(const Task *task) {
    int64_t tk = UP(task->tk), some = at_once(task->tq, task->tk, NEAR), dim = UP(task->dim), value = UP(task->value);
    return tk * (3 * dim + 2 * value + 1) + some * (2 * dim + 2 * value + 2 * tk) + 512;
}

static void differentiate(const Task *task, float *scratch, float *sums, Unit unit, Unit next, int64_t slice) {
    const int64_t item = unit.item, tile = unit.tile, kv = unit.kv;
    const int64_t tq = task->tq, tk = task->tk, step = UP(tk), dim = task->dim, deep = UP(dim);
    const int64_t value = task->value, wide = UP(value), some = at_once(tq, tk, NEAR), group = task->heads / task->kv_heads;
    float *columns = part(&scratch, deep * step), *values = part(&scratch, wide * step), *space = part(&scratch, step);
    float *keys = part(&scratch, tk * deep), *of_keys = part(&scratch, tk * deep), *of_values = part(&scratch, tk * wide);
    float *queries = part(&scratch, some * deep), *of_queries = part(&scratch, some * deep);
    float *grad = part(&scratch, some * wide), *out = part(&scratch, some * wide);
    float *weights = part(&scratch, some * step), *change = part(&scratch, some * step);
    const int64_t *rows = task->queries + tile * tq, *places = NULL;
    int64_t turn = 0, turns = group * ((tq + LANES - 1) / LANES);
    const float *hidden = NULL;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        if (head == kv * group || task->keys_head) {
            places = task->keys + item * task->keys_batch + head * task->keys_head + tile * tk;
            gather_transposed(columns, &task->k, item, kv, places, tk, dim, task->narrow);
            gather_transposed(values, &task->v, item, kv, places, tk, value, task->narrow);
            gather(keys, &task->k, item, kv, places, tk, dim, task->scale, task->narrow);
        }
        if (head == kv * group || task->seen_head) hidden = hide(task, space, item, head, tile);
        int64_t kind = task->kinds ? task->kinds[tile] : 0;
        const float *bias = task->bias ? task->bias + kind * task->bias_kind + head * task->bias_head : NULL;
        float *sum = sums ? sums + (kind * task->heads + head) * tq * step : NULL;
        for (int64_t first = 0; first < tq; first += some) {
            int64_t here = least(some, tq - first);
            const int64_t *row = rows + first;
            gather(queries, &task->q, item, head, row, here, dim, task->scale, task->narrow);
            gather(grad, &task->grad, item, head, row, here, value, 1.0f, task->narrow);
            gather(out, &task->out, item, head, row, here, value, 1.0f, task->narrow);
            multiply(here, step, dim, weights, step, queries, deep, 1, columns, step, 0);
            multiply(here, step, value, change, step, grad, wide, 1, values, step, 0);
            for (int64_t i = 0; i < here; i++) {
                if (i % LANES == 0) look_ahead(task, next, turn++, turns);
                float lse = *(const float *)row_of(&task->lse, item, row[i], head, 0);
                if (lse == -INFINITY) lse = 0;
                vec dot = {0};
                for (int64_t c = 0; c < wide; c += LANES) dot += *(vec *)(grad + i * wide + c) * *(vec *)(out + i * wide + c);
                float delta = sum_of(dot);
                if (task->grad_lse.at) delta -= *(const float *)row_of(&task->grad_lse, item, row[i], head, 0);
                const float *added = bias ? bias + (first + i) * step : NULL;
                for (int64_t j = 0; j < step; j += LANES) {
                    vec s = *(vec *)(weights + i * step + j) - lse;
                    if (added) s += *(const loose *)(added + j);
                    if (hidden) s += *(const vec *)(hidden + j);
                    vec weight = exponential(s);
                    *(vec *)(weights + i * step + j) = weight;
                    *(vec *)(change + i * step + j) = weight * (*(vec *)(change + i * step + j) - delta);
                }
                if (sum)
                    for (int64_t j = 0; j < step; j += LANES)
                        *(vec *)(sum + (first + i) * step + j) += *(vec *)(change + i * step + j);
            }
            multiply(here, deep, tk, of_queries, deep, change, step, 1, keys, deep, 0);
            for (int64_t i = 0; i < here; i++) {
                float *target = (float *)row_of(&task->dq, item, row[i], head, 0), *from = of_queries + i * deep;
                move(target, from, dim, task->merge);
            }
            int begun = first > 0 || (head > kv * group && !task->keys_head);
            multiply(tk, deep, here, of_keys, deep, change, 1, step, queries, deep, begun);
            multiply(tk, wide, here, of_values, wide, weights, 1, step, grad, wide, begun);
        }
        if (task->keys_head || head == (kv + 1) * group - 1)
            for (int64_t j = 0; j < tk; j++) {
                float *dk = (float *)row_of(&task->dk, item, places[j], kv, 0) + slice * task->slice_k;
                float *dv = (float *)row_of(&task->dv, item, places[j], kv, 0) + slice * task->slice_v;
                move(dk, of_keys + j * deep, dim, !task->apart);
                move(dv, of_values + j * wide, value, !task->apart);
            }
    }
}

/* Tiles that share keys are one unit for each of their heads, or a slice of it: what they add to is then their own. */
void regard_backward(const Task *task) {
    int64_t slices = task->apart ? task->tiles : task->slices, units = task->batch * task->kv_heads * slices;
#pragma omp parallel for schedule(static) num_threads(task->workers)
    for (int64_t i = 0; i < units; i++) {
        int64_t slice = i / task->kv_heads % slices;
        int64_t from = task->tiles * slice / slices, to = task->tiles * (slice + 1) / slices;
        float *scratch = of_worker(task), *sums = NULL;
        if (task->sums) sums = task->sums + (scratch - task->scratch) / task->scratch_worker * task->sums_worker;
        Unit unit = {i / task->kv_heads / slices, from, i % task->kv_heads}, next = unit;
        for (; unit.tile < to; unit = next) {
            if (task->apart)
                next = unit_at(task, least(i + 1, units - 1));
            else
                next.tile = least(unit.tile + 1, task->tiles - 1);
            differentiate(task, scratch, sums, unit, next, task->apart ? 0 : slice);
            if (unit.tile == to - 1) break;
        }
    }
}
