/* Softmax attention inside tiles, forward and backward, for the CPU this is compiled on.

   A tile is some queries and the keys that they need, all named by row numbers; one head of a tile is four steps in the caches
   of one core: gather the rows, multiply, normalise, multiply. Every product goes through `multiply`, which keeps a block of
   the result in registers. Everything is computed in float32; rows are float32 or bfloat16.

   What a query does not see does not reach it, even where it is not finite: the score of a hidden pair is chosen, not added
   up, rows of keys that do not exist are zero, and where an operand of a tile that hides pairs is not finite, the products
   with weights go over the visible pairs alone (0 times NaN is NaN). */

#include "../../compiled/vectors.h"

typedef struct {
    int64_t ahead; /* whether rows of the next tile are better asked for before their turn: they are not in the caches */
    int64_t narrow, narrow_out; /* rows of q, k, v (and, in the backward, of out and grad) are bfloat16; those of out are */
    int64_t batch, heads, kv_heads, dim, value;
    Rows q, k, v, out, lse;
    int64_t tiles, tq, tk;
    int64_t cuts; /* pieces that the queries of a tile are cut into, each a piece of work */
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

/* A score and what is added to it; -inf hides it, whatever it is. */
INLINE vec biased(vec score, vec bias) { return choose(bias == (vec){0} - INFINITY, bias, score + bias); }

/* Scores of at most LANES rows, of `count` each, into weights, not yet divided by their `sums`; the logarithm of the sum of
   a row's weights and its `base` make the log-sum-exp. */
static void weigh(float *scores, int64_t rows, int64_t count, const float *bias, const float *hidden, vec *base, vec *sums) {
    vec square[LANES];
    for (int64_t i = 0; i < LANES; i++) {
        vec most = (vec){0} - INFINITY;
        for (int64_t j = 0; i < rows && j < count; j += LANES) {
            vec s = *(vec *)(scores + i * count + j);
            if (bias) s = biased(s, *(const loose *)(bias + i * count + j));
            if (hidden) s = biased(s, *(const vec *)(hidden + j));
            *(vec *)(scores + i * count + j) = s;
            most = choose(s > most, s, most);
        }
        square[i] = most;
    }
    vec most = largest_of(square), zero = {0};
    most = choose(most == zero - INFINITY, zero, most);
    for (int64_t i = 0; i < LANES; i++) {
        vec total = zero;
        int endless = i < rows && most[i] == INFINITY && !has_nan(scores + i * count, count);
        for (int64_t j = 0; i < rows && j < count; j += LANES) {
            vec weight = exponential(*(vec *)(scores + i * count + j) - most[i]);
            *(vec *)(scores + i * count + j) = weight;
            total += weight;
        }
        square[i] = endless ? (vec){1} : total; /* the log-sum-exp of infinity is that, the weights are NaN */
    }
    *base = most;
    *sums = sums_of(square);
}

/* What is added to the scores of a tile: -inf for keys that do not exist; NULL where all do and fill
   whole vectors (a bias hides what is beyond). */
INLINE const float *hide(const Task *task, float *hidden, int64_t item, int64_t head, int64_t tile) {
    int64_t tk = task->tk;
    if (!task->seen && (task->bias || tk == UP(tk))) return NULL;
    const uint8_t *seen = NULL;
    if (task->seen) seen = task->seen + item * task->seen_batch + head * task->seen_head + tile * tk;
    for (int64_t j = 0; j < UP(tk); j++) hidden[j] = j < tk && (!seen || seen[j]) ? 0.0f : -INFINITY;
    return hidden;
}

/* Rows of keys that do not exist, as zeros. */
INLINE void blank(float *rows, int64_t width, const Task *task, const float *hidden) {
    for (int64_t j = 0; task->seen && j < task->tk; j++)
        if (hidden[j] != 0) memset(rows + j * width, 0, width * 4);
}

/* Whether a pair is visible, by what is added to its score. */
INLINE int shown(const float *bias, const float *hidden, int64_t key) {
    return !(bias && bias[key] == -INFINITY) && !(hidden && hidden[key] == -INFINITY);
}

/* result (rows, UP(value)) = weights values, over the visible pairs. */
static void multiply_seen(const Task *task, int64_t rows, float *result, const float *weights, const float *values,
                          const float *bias, const float *hidden) {
    int64_t step = UP(task->tk), wide = UP(task->value);
    memset(result, 0, rows * wide * 4);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < task->tk; j++)
            if (shown(bias ? bias + i * step : NULL, hidden, j))
                add_row(result + i * wide, values + j * wide, weights[i * step + j], wide);
}

/* How many queries are dealt with at once: their scores stay in the cache next to the core. */
INLINE int64_t at_once(int64_t tq, int64_t tk, int64_t scores) {
    int64_t some = scores / UP(tk) / LANES * LANES;
    return least(tq, some > LANES ? some : LANES);
}

#define CLOSE (1 << 13)
#define NEAR (1 << 15)

/* One head of keys and values of a tile, for some of its queries. */
typedef struct {
    int64_t item, tile, kv, cut;
} Unit;

INLINE Unit unit_at(const Task *task, int64_t number) {
    int64_t piece = number / task->kv_heads, tile = piece / task->cuts;
    return (Unit){tile / task->tiles, tile % task->tiles, number % task->kv_heads, piece % task->cuts};
}

/* Where a cut begins: at a whole number of vectors. */
INLINE int64_t cut_at(const Task *task, int64_t cut) {
    return cut == task->cuts ? task->tq : task->tq * cut / task->cuts / LANES * LANES;
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
    if (!task->ahead) return;
    int64_t group = task->heads / task->kv_heads, head = next.kv * group;
    const int64_t *keys = task->keys + next.item * task->keys_batch + head * task->keys_head + next.tile * task->tk;
    const int64_t *queries = task->queries + next.tile * task->tq;
    int64_t from = task->tk * turn / turns, to = task->tk * (turn + 1) / turns;
    fetch(&task->k, next.item, next.kv, keys, from, to, task->dim, task->narrow);
    fetch(&task->v, next.item, next.kv, keys, from, to, task->value, task->narrow);
    int64_t begin = cut_at(task, next.cut), here = cut_at(task, next.cut + 1) - begin;
    from = begin + here * turn / turns, to = begin + here * (turn + 1) / turns;
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
    float *queries = part(&scratch, some * UP(dim)), *scores = part(&scratch, some * step);
    float *result = part(&scratch, some * wide);
    vec base[some / LANES + 1], sums[some / LANES + 1];
    const int64_t begin = cut_at(task, unit.cut), end = cut_at(task, unit.cut + 1);
    int64_t turn = 0, turns = group * ((end - begin + LANES - 1) / LANES);
    const int64_t *rows = task->queries + tile * tq;
    const float *hidden = NULL;
    int odd = 0; /* whether pairs are hidden and a value is not finite */
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        if (head == kv * group || task->keys_head) {
            const int64_t *keys = task->keys + item * task->keys_batch + head * task->keys_head + tile * tk;
            gather_transposed(columns, &task->k, item, kv, keys, tk, dim, task->narrow);
            gather(values, &task->v, item, kv, keys, tk, value, 1.0f, task->narrow);
        }
        if (head == kv * group || task->keys_head || task->seen_head) {
            hidden = hide(task, space, item, head, tile);
            blank(values, wide, task, hidden);
            odd = (task->bias || task->seen) && !all_finite(values, tk * wide);
        }
        const float *bias = task->bias ? task->bias + task->kinds[tile] * task->bias_kind + head * task->bias_head : NULL;
        for (int64_t first = begin; first < end; first += some) {
            int64_t here = least(some, end - first);
            gather(queries, &task->q, item, head, rows + first, here, dim, task->scale, task->narrow);
            multiply(here, step, dim, scores, step, queries, UP(dim), 1, columns, step, 0);
            for (int64_t i = 0; i < here; i += LANES) {
                const float *added = bias ? bias + (first + i) * step : NULL;
                look_ahead(task, next, turn++, turns);
                weigh(scores + i * step, least(LANES, here - i), step, added, hidden, base + i / LANES, sums + i / LANES);
            }
            if (odd)
                multiply_seen(task, here, result, scores, values, bias ? bias + first * step : NULL, hidden);
            else
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
                    if (most == INFINITY && *known == *known && lse == lse) total = INFINITY;
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
    int64_t units = task->batch * task->tiles * task->cuts * task->kv_heads;
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
    const int64_t begin = cut_at(task, unit.cut), end = cut_at(task, unit.cut + 1);
    int64_t turn = 0, turns = group * ((end - begin + LANES - 1) / LANES);
    const float *hidden = NULL;
    const int hides = task->bias || task->seen;
    int odd_keys = 0;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        if (head == kv * group || task->keys_head) {
            places = task->keys + item * task->keys_batch + head * task->keys_head + tile * tk;
            gather_transposed(columns, &task->k, item, kv, places, tk, dim, task->narrow);
            gather_transposed(values, &task->v, item, kv, places, tk, value, task->narrow);
            gather(keys, &task->k, item, kv, places, tk, dim, task->scale, task->narrow);
        }
        if (head == kv * group || task->keys_head || task->seen_head) {
            hidden = hide(task, space, item, head, tile);
            blank(keys, deep, task, hidden);
            odd_keys = hides && !all_finite(keys, tk * deep);
        }
        int64_t kind = task->kinds ? task->kinds[tile] : 0;
        const float *bias = task->bias ? task->bias + kind * task->bias_kind + head * task->bias_head : NULL;
        float *sum = sums ? sums + (kind * task->heads + head) * tq * step : NULL;
        for (int64_t first = begin; first < end; first += some) {
            int64_t here = least(some, end - first);
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
                vec dot = {0}, zero = {0};
                for (int64_t c = 0; c < wide; c += LANES) dot += *(vec *)(grad + i * wide + c) * *(vec *)(out + i * wide + c);
                float delta = sum_of(dot);
                if (task->grad_lse.at) delta -= *(const float *)row_of(&task->grad_lse, item, row[i], head, 0);
                const float *added = bias ? bias + (first + i) * step : NULL;
                for (int64_t j = 0; j < step; j += LANES) {
                    vec s = *(vec *)(weights + i * step + j) - lse, less = *(vec *)(change + i * step + j) - delta;
                    ints here_not = {0};
                    if (added) here_not = *(const loose *)(added + j) == zero - INFINITY, s += *(const loose *)(added + j);
                    if (hidden) here_not |= *(const vec *)(hidden + j) < zero;
                    vec weight = exponential(s);
                    if (hides || hidden) weight = choose(here_not, zero, weight), less = choose(here_not, zero, less);
                    *(vec *)(weights + i * step + j) = weight;
                    *(vec *)(change + i * step + j) = weight * less;
                }
                if (sum)
                    for (int64_t j = 0; j < step; j += LANES)
                        *(vec *)(sum + (first + i) * step + j) += *(vec *)(change + i * step + j);
            }
            int begun = first > begin || (head > kv * group && !task->keys_head);
            if (odd_keys || (hides && !(all_finite(queries, here * deep) && all_finite(grad, here * wide)))) {
                if (!begun) memset(of_keys, 0, tk * deep * 4), memset(of_values, 0, tk * wide * 4);
                memset(of_queries, 0, here * deep * 4);
                for (int64_t i = 0; i < here; i++)
                    for (int64_t j = 0; j < tk; j++) {
                        if (!shown(bias ? bias + (first + i) * step : NULL, hidden, j)) continue;
                        add_row(of_queries + i * deep, keys + j * deep, change[i * step + j], deep);
                        add_row(of_keys + j * deep, queries + i * deep, change[i * step + j], deep);
                        add_row(of_values + j * wide, grad + i * wide, weights[i * step + j], wide);
                    }
            } else {
                multiply(here, deep, tk, of_queries, deep, change, step, 1, keys, deep, 0);
                multiply(tk, deep, here, of_keys, deep, change, 1, step, queries, deep, begun);
                multiply(tk, wide, here, of_values, wide, weights, 1, step, grad, wide, begun);
            }
            for (int64_t i = 0; i < here; i++) {
                float *target = (float *)row_of(&task->dq, item, row[i], head, 0), *from = of_queries + i * deep;
                move(target, from, dim, task->merge);
            }
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
    int64_t pieces = task->tiles * task->cuts, slices = task->apart ? pieces : task->slices;
    int64_t units = task->batch * task->kv_heads * slices;
#pragma omp parallel for schedule(static) num_threads(task->workers)
    for (int64_t i = 0; i < units; i++) {
        int64_t slice = i / task->kv_heads % slices, kv = i % task->kv_heads, item = i / task->kv_heads / slices;
        float *scratch = of_worker(task), *sums = NULL;
        if (task->sums) sums = task->sums + (scratch - task->scratch) / task->scratch_worker * task->sums_worker;
        for (int64_t piece = pieces * slice / slices; piece < pieces * (slice + 1) / slices; piece++) {
            int64_t after = least(piece + 1, pieces - 1);
            Unit unit = {item, piece / task->cuts, kv, piece % task->cuts};
            Unit next = {item, after / task->cuts, kv, after % task->cuts};
            if (task->apart) next = unit_at(task, least(i + 1, units - 1));
            differentiate(task, scratch, sums, unit, next, task->apart ? 0 : slice);
        }
    }
}
