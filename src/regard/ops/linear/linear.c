/* Linear attention. In order, one head chunk after chunk, forward and backward, with decays per token or without:

       y_i = sum_{j <= i} exp(c_i - c_j) (f(q_i) . f(k_j)) v_j + exp(c_i) f(q_i)^T S
       S  <- exp(c_n) S + sum_j exp(c_n - c_j) f(k_j) v_j^T

   with c the sums of the logarithms of the decays from the beginning of a chunk. A head is one unit of work; its state lies in
   the cache next to the core. Or over all keys, forward: the sum that the keys leave, and what queries read from it, in which
   slices of the chunks are units of their own. Everything is computed in float32; rows are float32 or bfloat16.

   Rows of keys that do not exist are zero, and so is the gradient of their values. In a chunk with a number that is not finite,
   products of triangles go row by row: what comes later then does not even meet a weight of zero. */

#include <float.h>

#include "../compiled/vectors.h"

enum { NONE, RELU, ELU_PLUS_ONE, SILU };

typedef struct {
    int64_t narrow, narrow_values; /* rows of q, k (and dq, dk) are bfloat16; those of v, out, grad (and dv) */
    int64_t batch, heads, tokens, dim, value, chunk, activation;
    Rows q, k, v, out;
    Rows decay; /* logarithms, one number a row, float32; at may be NULL */
    const uint8_t *valid; /* which keys exist; NULL: all */
    int64_t valid_batch;
    float *state; /* (batch, heads, dim, value): before the first token; the forward leaves that after the last one */
    Rows grad, dq, dk, dv;
    Rows ddecay; /* as decay, written; at may be NULL */
    float *grad_state; /* as state: of the state after the last token; the backward leaves that of the one before the first */
    int64_t slices; /* over all keys: of the chunks; each leaves a state and a total of its own, (slices, batch, heads, ...) */
    float *total;   /* (batch, heads, dim): the sum of the features of keys; NULL: nothing is divided */
    Rows factors;   /* one over the divisor max(f(q) . total, floor) + eps, 0 where that counts as 0; float32 */
    double floor, eps;
    float *scratch;
    int64_t scratch_worker;
    int64_t workers;
} Scan;

int64_t regard_scan_size(void) { return sizeof(Scan); }

/* f of a vector, or its slope. */
INLINE vec activated(vec x, int64_t kind) {
    vec zero = {0};
    if (kind == RELU) return choose(x < zero, zero, x);
    if (kind == ELU_PLUS_ONE) return choose(x > zero, x + 1.0f, exponential(choose(x > zero, zero, x)));
    if (kind == SILU) return x / (1.0f + exponential(choose(x < -87.0f, zero + 87.0f, -x)));
    return x;
}

INLINE vec slope(vec x, int64_t kind) {
    vec zero = {0}, one = zero + 1.0f;
    if (kind == RELU) return choose(x > zero, one, zero);
    if (kind == ELU_PLUS_ONE) return choose(x > zero, one, exponential(choose(x > zero, zero, x)));
    if (kind == SILU) {
        vec share = one / (1.0f + exponential(choose(x < -87.0f, zero + 87.0f, -x)));
        return share * (1.0f + x * (1.0f - share));
    }
    return one;
}

/* Features of rows (count, UP(width)); lanes beyond width stay zero, and so do rows that do not exist. */
INLINE void features(float *to, const float *raw, int64_t count, int64_t width, int64_t kind, const uint8_t *exist) {
    int64_t step = UP(width);
    for (int64_t i = 0; i < count; i++) {
        for (int64_t c = 0; c < step; c += LANES) {
            vec value = activated(*(const vec *)(raw + i * step + c), kind);
            *(vec *)(to + i * step + c) = exist && !exist[i] ? (vec){0} : value;
        }
        for (int64_t c = width; c < step; c++) to[i * step + c] = 0;
    }
}

INLINE void scale_rows(float *to, const float *from, const float *factors, int64_t count, int64_t step) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = i * step; c < (i + 1) * step; c += LANES) *(vec *)(to + c) = *(const vec *)(from + c) * factors[i];
}

INLINE void scale(float *numbers, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i += LANES) *(vec *)(numbers + i) *= factor;
}

/* Rows (count, UP(width)) into columns (width, UP(count)); columns beyond count are zero. */
INLINE void turn(float *to, const float *from, int64_t count, int64_t width) {
    int64_t step = UP(count), wide = UP(width);
    for (int64_t first = 0; first < count; first += LANES)
        for (int64_t c = 0; c < width; c += LANES) {
            vec square[LANES];
            for (int64_t i = 0; i < LANES; i++)
                square[i] = first + i < count ? *(const vec *)(from + (first + i) * wide + c) : (vec){0};
            transpose(square);
            for (int64_t i = 0; i < least(LANES, width - c); i++) *(vec *)(to + (c + i) * step + first) = square[i];
        }
}

/* What a chunk of tokens is made of. */
typedef struct {
    int64_t start, count;
    int64_t together; /* rows of a triangle that are multiplied at once, up to where the last of them sees */
    int64_t *tokens;
    float *raw_q, *raw_k, *queries, *keys, *values; /* (count, UP(width)) */
    float *sums, *rest, *enter, *leave; /* c_i and what rounding it leaves, for whole vectors; exp(c_i); exp(c_n - c_i) */
    float through;                      /* exp(c_n) */
} Chunk;

INLINE Chunk chunk_in(const Scan *scan, float **scratch) {
    int64_t size = scan->chunk, deep = UP(scan->dim);
    Chunk chunk = {0};
    chunk.tokens = (int64_t *)part(scratch, 2 * size);
    chunk.raw_q = part(scratch, size * deep), chunk.raw_k = part(scratch, size * deep);
    chunk.queries = part(scratch, size * deep), chunk.keys = part(scratch, size * deep);
    chunk.values = part(scratch, size * UP(scan->value));
    chunk.sums = part(scratch, UP(size)), chunk.rest = part(scratch, UP(size));
    chunk.enter = part(scratch, UP(size)), chunk.leave = part(scratch, UP(size));
    return chunk;
}

INLINE int64_t chunk_scratch(const Scan *scan) {
    int64_t size = scan->chunk;
    return size * (2 + 4 * UP(scan->dim) + UP(scan->value)) + 4 * UP(size) + 10 * 16;
}

/* Gather a chunk; queries only where they are wanted. */
INLINE void load(const Scan *scan, Chunk *chunk, int64_t start, int64_t item, int64_t head, int queries) {
    int64_t count = least(scan->chunk, scan->tokens - start), kind = scan->activation;
    chunk->start = start, chunk->count = count;
    for (int64_t i = 0; i < count; i++) chunk->tokens[i] = start + i;
    const uint8_t *exist = scan->valid ? scan->valid + item * scan->valid_batch + start : NULL;
    if (queries) {
        gather(chunk->raw_q, &scan->q, item, head, chunk->tokens, count, scan->dim, 1.0f, scan->narrow);
        features(chunk->queries, chunk->raw_q, count, scan->dim, kind, NULL);
    }
    gather(chunk->raw_k, &scan->k, item, head, chunk->tokens, count, scan->dim, 1.0f, scan->narrow);
    features(chunk->keys, chunk->raw_k, count, scan->dim, kind, exist);
    gather(chunk->values, &scan->v, item, head, chunk->tokens, count, scan->value, 1.0f, scan->narrow_values);
    int64_t deep = UP(scan->dim), wide = UP(scan->value);
    for (int64_t i = 0; exist && i < count; i++)
        if (!exist[i]) memset(chunk->values + i * wide, 0, wide * 4);
    int whole = all_finite(chunk->keys, count * deep) && all_finite(chunk->values, count * wide);
    chunk->together = whole && (!queries || all_finite(chunk->queries, count * deep)) ? LANES : 1;
    chunk->through = 1;
    if (!scan->decay.at) return;
    double sums[UP(count)], sum = 0;
    for (int64_t i = 0; i < UP(count); i++) {
        float log = i < count ? *(const float *)row_of(&scan->decay, item, start + i, head, 0) : 0;
        sum += log < -200 ? -200 : log; /* which is nothing left: minus infinity has no differences */
        sums[i] = sum;
        chunk->sums[i] = sum;
        chunk->rest[i] = sum - chunk->sums[i];
    }
    for (int64_t i = 0; i < UP(count); i++) chunk->leave[i] = sum - sums[i];
    for (int64_t i = 0; i < UP(count); i += LANES) {
        *(vec *)(chunk->enter + i) = exponential(*(vec *)(chunk->sums + i)) * (1.0f + *(vec *)(chunk->rest + i));
        *(vec *)(chunk->leave + i) = exponential(*(vec *)(chunk->leave + i));
    }
    chunk->through = chunk->enter[count - 1];
}

/* Times exp(c_i - c_j) where j <= i, times 0 elsewhere: `rows` rows from `first` on, (rows, step), of which
   `seen` lanes count. */
INLINE void decay_scores(float *scores, const Scan *scan, const Chunk *chunk, int64_t first, int64_t rows, int64_t seen,
                         int64_t step) {
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    vec zero = {0};
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < seen; j += LANES) {
            vec *at = (vec *)(scores + i * step + j), value = *at;
            ints visible = lane <= (int)(first + i - j);
            if (scan->decay.at) {
                vec apart = chunk->sums[first + i] - *(const vec *)(chunk->sums + j);
                apart += chunk->rest[first + i] - *(const vec *)(chunk->rest + j);
                value *= exponential(choose(visible, apart, zero));
            }
            *at = choose(visible, value, zero);
        }
}

/* The scores of a chunk, with their decays: (count, UP(count)), only as far as they are visible. */
INLINE void causal_scores(const Scan *scan, const Chunk *chunk, float *scores, const float *queries, int64_t width,
                          const float *columns) {
    int64_t step = UP(chunk->count), deep = UP(width);
    for (int64_t first = 0; first < chunk->count; first += LANES) {
        int64_t rows = least(LANES, chunk->count - first), seen = least(first + LANES, step);
        multiply(rows, seen, width, scores + first * step, step, queries + first * deep, deep, 1, columns, step, 0);
        decay_scores(scores + first * step, scan, chunk, first, rows, seen, step);
    }
}

/* c (rows, n) (+)= lower triangle (rows, inner) b: blocks of rows end where they see no more. */
INLINE void times_lower(const Chunk *chunk, int64_t n, float *c, const float *lower, const float *b, int add) {
    int64_t count = chunk->count, step = UP(count), together = chunk->together;
    for (int64_t first = 0; first < count; first += together) {
        int64_t rows = least(together, count - first), seen = least(first + together, count);
        multiply(rows, n, seen, c + first * n, n, lower + first * step, step, 1, b, n, add);
    }
}

/* c (columns, n) (+)= the transpose of a lower triangle, times b. */
INLINE void times_upper(const Chunk *chunk, int64_t n, float *c, const float *lower, const float *b, int add) {
    int64_t count = chunk->count, step = UP(count), together = chunk->together;
    for (int64_t first = 0; first < count; first += together) {
        int64_t rows = least(together, count - first);
        multiply(rows, n, count - first, c + first * n, n, lower + first * step + first, 1, step, b + first * n, n, add);
    }
}

INLINE float *head_of(const Scan *scan, float *states, int64_t item, int64_t head) {
    return states + (item * scan->heads + head) * scan->dim * scan->value;
}

/* (rows, width) and (rows, UP(width)). */
INLINE void pad_rows(float *to, const float *from, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < UP(width); c++) to[i * UP(width) + c] = c < width ? from[i * width + c] : 0;
}

INLINE void unpad_rows(float *to, const float *from, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; i++) memcpy(to + i * width, from + i * UP(width), width * 4);
}

INLINE float *memory_of(const Scan *scan) { return scan->scratch + omp_get_thread_num() * scan->scratch_worker; }

/* ---- forward ---- */

int64_t regard_scan_scratch(const Scan *scan) {
    int64_t size = scan->chunk, wide = UP(scan->value), deep = UP(scan->dim);
    return chunk_scratch(scan) + scan->dim * (UP(size) + wide) + size * (UP(size) + deep + wide) + 6 * 16;
}

static void scan_head(const Scan *scan, float *scratch, int64_t item, int64_t head) {
    int64_t dim = scan->dim, value = scan->value, deep = UP(dim), wide = UP(value), size = scan->chunk;
    Chunk chunk = chunk_in(scan, &scratch);
    float *columns = part(&scratch, dim * UP(size)), *scores = part(&scratch, size * UP(size));
    float *result = part(&scratch, size * wide), *state = part(&scratch, dim * wide), *scaled = part(&scratch, size * deep);
    float *kept = head_of(scan, scan->state, item, head);
    pad_rows(state, kept, dim, value);
    for (int64_t start = 0; start < scan->tokens; start += size) {
        load(scan, &chunk, start, item, head, 1);
        int64_t count = chunk.count;
        const float *queries = chunk.queries, *keys = chunk.keys;
        turn(columns, chunk.keys, count, dim);
        causal_scores(scan, &chunk, scores, chunk.queries, dim, columns);
        times_lower(&chunk, wide, result, scores, chunk.values, 0);
        if (scan->decay.at) scale_rows(scaled, chunk.queries, chunk.enter, count, deep), queries = scaled;
        multiply(count, wide, dim, result, wide, queries, deep, 1, state, wide, 1);
        for (int64_t i = 0; i < count; i++)
            store_row((void *)row_of(&scan->out, item, start + i, head, scan->narrow_values), result + i * wide, value, 1.0f,
                      scan->narrow_values);
        if (scan->decay.at) {
            scale(state, dim * wide, chunk.through);
            scale_rows(scaled, chunk.keys, chunk.leave, count, deep), keys = scaled;
        }
        multiply(dim, wide, count, state, wide, keys, 1, deep, chunk.values, wide, 1);
    }
    unpad_rows(kept, state, dim, value);
}

void regard_scan(const Scan *scan) {
    int64_t units = scan->batch * scan->heads;
#pragma omp parallel for schedule(dynamic) num_threads(scan->workers)
    for (int64_t i = 0; i < units; i++) scan_head(scan, memory_of(scan), i / scan->heads, i % scan->heads);
}

/* ---- backward ---- */

int64_t regard_scan_backward_scratch(const Scan *scan) {
    int64_t size = scan->chunk, wide = UP(scan->value), deep = UP(scan->dim), step = UP(size);
    int64_t chunks = (scan->tokens + size - 1) / size;
    int64_t states = scan->value * deep * (chunks + 2) + scan->dim * wide;
    int64_t rows = size * (2 * step + 6 * deep + 2 * wide);
    return chunk_scratch(scan) + states + rows + (scan->dim + scan->value + 2) * step + 320;
}

INLINE float dot(const float *a, const float *b, int64_t step) {
    vec sum = {0};
    for (int64_t c = 0; c < step; c += LANES) sum += *(const vec *)(a + c) * *(const vec *)(b + c);
    return sum_of(sum);
}

static void scan_head_backward(const Scan *scan, float *scratch, int64_t item, int64_t head) {
    int64_t dim = scan->dim, value = scan->value, deep = UP(dim), wide = UP(value), size = scan->chunk, area = value * deep;
    int64_t chunks = (scan->tokens + size - 1) / size, decays = scan->decay.at != NULL;
    Chunk chunk = chunk_in(scan, &scratch);
    float *turned = part(&scratch, area * (chunks + 1)); /* states before each chunk, (value, UP(dim)) */
    float *after = part(&scratch, dim * wide), *after_turned = part(&scratch, area);
    float *key_columns = part(&scratch, dim * UP(size)), *value_columns = part(&scratch, value * UP(size));
    float *scores = part(&scratch, size * UP(size)), *change = part(&scratch, size * UP(size));
    float *grad = part(&scratch, size * wide), *grad_v = part(&scratch, size * wide);
    float *enters = part(&scratch, size * deep), *leaves = part(&scratch, size * deep);
    float *grad_q = part(&scratch, size * deep), *grad_k = part(&scratch, size * deep);
    float *read = part(&scratch, size * deep), *written = part(&scratch, size * deep);
    float *local = part(&scratch, UP(size)), *left = part(&scratch, UP(size));
    float *kept = head_of(scan, scan->state, item, head), *grad_kept = head_of(scan, scan->grad_state, item, head);
    for (int64_t j = 0; j < value; j++)
        for (int64_t c = 0; c < deep; c++) {
            turned[j * deep + c] = c < dim ? kept[c * value + j] : 0;
            after_turned[j * deep + c] = c < dim ? grad_kept[c * value + j] : 0;
        }
    pad_rows(after, grad_kept, dim, value);
    for (int64_t n = 0; n < chunks; n++) {
        load(scan, &chunk, n * size, item, head, 0);
        const float *keys = chunk.keys;
        if (decays) scale_rows(leaves, chunk.keys, chunk.leave, chunk.count, deep), keys = leaves;
        float *next = turned + (n + 1) * area;
        memcpy(next, turned + n * area, area * 4);
        if (decays) scale(next, area, chunk.through);
        multiply(value, deep, chunk.count, next, deep, chunk.values, 1, wide, keys, deep, 1);
    }
    for (int64_t n = chunks - 1; n >= 0; n--) {
        load(scan, &chunk, n * size, item, head, 1);
        int64_t count = chunk.count;
        const float *queries = chunk.queries, *keys = chunk.keys, *before = turned + n * area;
        if (decays) {
            scale_rows(enters, chunk.queries, chunk.enter, count, deep), queries = enters;
            scale_rows(leaves, chunk.keys, chunk.leave, count, deep), keys = leaves;
        }
        gather(grad, &scan->grad, item, head, chunk.tokens, count, value, 1.0f, scan->narrow_values);
        if (!all_finite(grad, count * wide)) chunk.together = 1;
        turn(key_columns, chunk.keys, count, dim);
        turn(value_columns, chunk.values, count, value);
        causal_scores(scan, &chunk, scores, chunk.queries, dim, key_columns);
        causal_scores(scan, &chunk, change, grad, value, value_columns);
        times_upper(&chunk, wide, grad_v, scores, grad, 0);
        multiply(count, wide, dim, grad_v, wide, keys, deep, 1, after, wide, 1);
        times_lower(&chunk, deep, grad_q, change, chunk.keys, 0);
        times_upper(&chunk, deep, grad_k, change, chunk.queries, 0);
        multiply(count, deep, value, read, deep, grad, wide, 1, before, deep, 0);
        multiply(count, deep, value, written, deep, chunk.values, wide, 1, after_turned, deep, 0);
        if (scan->ddecay.at) {
            float carried = chunk.through * dot(before, after_turned, area), sum = 0;
            for (int64_t i = 0; i < count; i++) {
                int64_t at = i * deep;
                local[i] = dot(chunk.queries + at, grad_q + at, deep) - dot(chunk.keys + at, grad_k + at, deep);
                local[i] += dot(queries + at, read + at, deep);
                left[i] = dot(keys + at, written + at, deep);
            }
            for (int64_t i = 0; i < count; i++) { /* what was left by the keys before, and the state that passed through */
                float own = left[i];
                left[i] = carried;
                carried += own;
            }
            for (int64_t i = count - 1; i >= 0; i--) {
                sum += local[i];
                *(float *)row_of(&scan->ddecay, item, n * size + i, head, 0) = sum + left[i];
            }
        }
        for (int64_t i = 0; i < count; i++) {
            int exists = !scan->valid || scan->valid[item * scan->valid_batch + n * size + i];
            float enter = decays ? chunk.enter[i] : 1, leave = decays ? chunk.leave[i] : 1;
            for (int64_t c = 0; c < deep; c += LANES) {
                int64_t at = i * deep + c;
                vec of_q = *(vec *)(grad_q + at) + *(vec *)(read + at) * enter;
                vec of_k = *(vec *)(grad_k + at) + *(vec *)(written + at) * leave;
                *(vec *)(grad_q + at) = of_q * slope(*(vec *)(chunk.raw_q + at), scan->activation);
                *(vec *)(grad_k + at) = exists ? of_k * slope(*(vec *)(chunk.raw_k + at), scan->activation) : (vec){0};
            }
            if (!exists) memset(grad_v + i * wide, 0, wide * 4);
            int64_t token = n * size + i;
            store_row((void *)row_of(&scan->dq, item, token, head, scan->narrow), grad_q + i * deep, dim, 1.0f, scan->narrow);
            store_row((void *)row_of(&scan->dk, item, token, head, scan->narrow), grad_k + i * deep, dim, 1.0f, scan->narrow);
            store_row((void *)row_of(&scan->dv, item, token, head, scan->narrow_values), grad_v + i * wide, value, 1.0f,
                      scan->narrow_values);
        }
        if (decays) scale(after, dim * wide, chunk.through), scale(after_turned, area, chunk.through);
        multiply(dim, wide, count, after, wide, queries, 1, deep, grad, wide, 1);
        multiply(value, deep, count, after_turned, deep, grad, 1, wide, queries, deep, 1);
    }
    unpad_rows(grad_kept, after, dim, value);
}

void regard_scan_backward(const Scan *scan) {
    int64_t units = scan->batch * scan->heads;
#pragma omp parallel for schedule(dynamic) num_threads(scan->workers)
    for (int64_t i = 0; i < units; i++) scan_head_backward(scan, memory_of(scan), i / scan->heads, i % scan->heads);
}

/* ---- over all keys ---- */

int64_t regard_memory_scratch(const Scan *scan) {
    return chunk_scratch(scan) + scan->dim * UP(scan->value) + UP(scan->dim) + 64;
}

static void sum_keys(const Scan *scan, float *scratch, int64_t item, int64_t head, int64_t slice, int64_t unit) {
    int64_t dim = scan->dim, deep = UP(dim), wide = UP(scan->value), size = scan->chunk;
    int64_t chunks = (scan->tokens + size - 1) / size;
    Chunk chunk = chunk_in(scan, &scratch);
    float *state = part(&scratch, dim * wide), *total = part(&scratch, deep);
    memset(state, 0, dim * wide * 4), memset(total, 0, deep * 4);
    for (int64_t n = chunks * slice / scan->slices; n < chunks * (slice + 1) / scan->slices; n++) {
        load(scan, &chunk, n * size, item, head, 0);
        multiply(dim, wide, chunk.count, state, wide, chunk.keys, 1, deep, chunk.values, wide, 1);
        for (int64_t i = 0; i < chunk.count; i++)
            for (int64_t c = 0; c < deep; c += LANES) *(vec *)(total + c) += *(vec *)(chunk.keys + i * deep + c);
    }
    unpad_rows(scan->state + unit * dim * scan->value, state, dim, scan->value);
    memcpy(scan->total + unit * dim, total, dim * 4);
}

void regard_memory(const Scan *scan) {
    int64_t heads = scan->batch * scan->heads, units = scan->slices * heads;
#pragma omp parallel for schedule(dynamic) num_threads(scan->workers)
    for (int64_t i = 0; i < units; i++)
        sum_keys(scan, memory_of(scan), i % heads / scan->heads, i % scan->heads, i / heads, i);
}

int64_t regard_read_scratch(const Scan *scan) {
    int64_t deep = UP(scan->dim), wide = UP(scan->value);
    return scan->chunk * (2 + 2 * deep + wide) + scan->dim * wide + deep + 6 * 16;
}

static void answer_queries(const Scan *scan, float *scratch, int64_t item, int64_t head, int64_t slice) {
    int64_t dim = scan->dim, value = scan->value, deep = UP(dim), wide = UP(value), size = scan->chunk;
    int64_t chunks = (scan->tokens + size - 1) / size;
    int64_t *tokens = (int64_t *)part(&scratch, 2 * size);
    float *raw = part(&scratch, size * deep), *queries = part(&scratch, size * deep), *result = part(&scratch, size * wide);
    float *state = part(&scratch, dim * wide), *total = part(&scratch, deep);
    pad_rows(state, head_of(scan, scan->state, item, head), dim, value);
    if (scan->total) pad_rows(total, scan->total + (item * scan->heads + head) * dim, 1, dim);
    for (int64_t n = chunks * slice / scan->slices; n < chunks * (slice + 1) / scan->slices; n++) {
        int64_t start = n * size, count = least(size, scan->tokens - start);
        for (int64_t i = 0; i < count; i++) tokens[i] = start + i;
        gather(raw, &scan->q, item, head, tokens, count, dim, 1.0f, scan->narrow);
        features(queries, raw, count, dim, scan->activation, NULL);
        multiply(count, wide, dim, result, wide, queries, deep, 1, state, wide, 0);
        for (int64_t i = 0; i < count; i++) {
            float factor = 1;
            if (scan->total) {
                float mass = dot(queries + i * deep, total, deep), least_mass = scan->floor;
                float divisor = (mass < least_mass ? least_mass : mass) + (float)scan->eps;
                factor = fabsf(divisor) < FLT_MIN ? 0 : 1 / divisor;
                *(float *)row_of(&scan->factors, item, start + i, head, 0) = factor;
            }
            void *out = (void *)row_of(&scan->out, item, start + i, head, scan->narrow_values);
            store_row(out, result + i * wide, value, factor, scan->narrow_values);
        }
    }
}

void regard_read(const Scan *scan) {
    int64_t heads = scan->batch * scan->heads, units = scan->slices * heads;
#pragma omp parallel for schedule(dynamic) num_threads(scan->workers)
    for (int64_t i = 0; i < units; i++)
        answer_queries(scan, memory_of(scan), i % heads / scan->heads, i % scan->heads, i / heads);
}
