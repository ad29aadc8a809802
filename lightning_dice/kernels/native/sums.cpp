// The overlap sums and their gradient: one pass over the logits each, nothing kept in between.
//
// A unit of work is a run of pixels of one image, done tile by tile: a tile is a few hundred pixels of all classes, small
// enough for the cache. Within a tile sums are taken in the lanes of vectors, across tiles in double.
//
// Softmax. With e_c = exp(z_c - max), `rest` is the sum of all e but the greatest's own 1, so that p_m = 1/(1 + rest) and
// 1 - p_m = rest/(1 + rest) keep their digits where p_m rounds to 1, and -log p_c = (max - z_c) + log1p(rest).
//
// Its gradient. Let B_c be the gradient of p_c and H_c that of -log p_c, pixel weights included. With m the greatest class
// and D_c = B_c - B_m, which the softmax cannot tell from B_c as the p_c sum to 1,
//     dz_c = p_c (D_c - s) + p_c sum(H) - H_c,   s = sum_k p_k D_k.
// As D_m = 0, s holds only terms of the size of 1 - p_m, and dz_m = -p_m s cancels nothing. For the same reason the H part
// is taken as p_m (sum(H) - H_m) - H_m (1 - p_m) at m, and at the true class as -H (1 - p).
//
// Sigmoid. With e = exp(-|z|), p and q = 1 - p are 1/(1 + e) and e/(1 + e) or the other way round; dp = p q dz,
// -log p = max(-z, 0) + log1p(e) with the slope -q, and -log(1 - p) = max(z, 0) + log1p(e) with the slope p.
#include "common.h"

#include <algorithm>

enum Row { OVERLAP, PREDICTED, ACTUAL, COUNT, SQUARES, ACTUAL_SQUARES, MINIMUM, NLL, ALL_NLL, ABSENT_NLL, FOCAL, ROWS };

enum Wrong : int32_t { BAD_ID = 1, BAD_LABEL = 2, BAD_TOTAL = 4, BAD_WEIGHT = 8 };

struct Job {
  int64_t images, classes, pixels;
  View logits, target, weight, slope;  // slope: where the gradient of logits goes
  int32_t softmax, planes, weighted, weight_by_class, has_ignored, threads;
  double ignored;
  double gamma, front, back;  // of the focal factor; front and back weigh planes
  int32_t row[ROWS];       // the place of each sum in the result; -1: not wanted
  int32_t rows;
  int32_t wrong;           // out: what the values that were read have wrong
  double *sums;            // out (forward), in (backward: their gradient): (rows, images, classes)
  void *region;
};

static constexpr int64_t TILE = 16384;         // logits
static constexpr int64_t UNIT = 1 << 16;      // logits
static thread_local Scratch scratch;

template <class R> struct Tile {
  typedef Simd<R> S;
  typedef typename S::vec vec;
  typedef typename S::mask mask;
  static constexpr int L = S::lanes;
  static constexpr int N = 4;                // vectors that are worked on together
  static constexpr int64_t BLOCK = 8 * L;  // pixels whose terms are added in R

  const Job &job;
  const int64_t C, P;  // classes; pixels of a tile, a multiple of N L
  const bool by_class;
  int32_t wrong = 0;

  // (C, P)
  R *z_own, *e, *b, *h, *t, *w, *out;
  // (P)
  R *top, *rest, *inv, *weight, *id, *one, *two, *three;
  // (C, P), the rows `step` apart: where the logits lie, or z_own
  const R *z;
  int64_t step;
  // (C)
  R *grad[ROWS];
  double *total[ROWS];
  int64_t n, padded, image, pixel;
  bool any_ignored;

  static int64_t tile_pixels(int64_t classes) {
    int64_t pixels = TILE / classes / (N * L) * (N * L);
    return pixels < N * L ? N * L : pixels > 1024 ? 1024 : pixels;
  }

  Tile(const Job &job) : job(job), C(job.classes), P(tile_pixels(job.classes)), by_class(job.weight_by_class || (job.planes && !job.softmax && job.has_ignored)) {
    scratch.reserve((7 * C * P + 8 * P + ROWS * C) * sizeof(R) + ROWS * C * sizeof(double) + 64 * 64);
    for (R **tile : {&z_own, &e, &b, &h, &t, &w, &out}) *tile = scratch.take<R>(C * P);
    for (R **line : {&top, &rest, &inv, &weight, &id, &one, &two, &three}) *line = scratch.take<R>(P);
    for (R *&g : grad) g = scratch.take<R>(C);
    for (double *&s : total) s = scratch.take<double>(C);
  }

  bool wants(Row row) const { return job.row[row] >= 0; }
  bool simple() const {
    // What Dice and cross-entropy need of class ids.
    return job.softmax && !job.planes && !by_class && !wants(SQUARES) && !wants(ALL_NLL) && !wants(ABSENT_NLL) && !wants(FOCAL);
  }

  void start(int64_t of_image) {
    image = of_image;
    for (int row = 0; row < ROWS; row++) {
      std::memset(total[row], 0, C * sizeof(double));
      for (int64_t c = 0; c < C; c++)
        grad[row][c] = job.slope.data && wants(Row(row)) ? static_cast<R>(job.sums[(job.row[row] * job.images + image) * C + c]) : R(0);
    }
  }

  void load(int64_t at, int64_t count) {
    pixel = at, n = count, padded = (n + N * L - 1) / (N * L) * (N * L);
    any_ignored = false;
    load_weight();
    if (job.planes) load_planes(); else load_ids();
    load_logits();
  }

  void load_weight() {
    const int64_t lines = by_class ? C : 1;
    R *to = by_class ? w : weight;
    for (int64_t c = 0; c < lines; c++, to += P) {
      if (!job.weighted) {
        for (int64_t j = 0; j < padded; j++) to[j] = j < n ? R(1) : R(0);
        continue;
      }
      read(job.weight, image, job.weight_by_class ? c : 0, pixel, to, n);
      for (int64_t j = n; j < padded; j++) to[j] = 0;
      mask bad = {};
      for (int64_t j = 0; j < padded; j += L) {
        const vec value = S::load(to + j);
        bad |= !((value >= 0) & (value - value == 0));  // infinity minus itself is NaN
      }
      if (any(bad)) wrong |= BAD_WEIGHT;
    }
  }

  void leave_out(int64_t j) {
    any_ignored = true;
    weight[j] = 0;
    if (by_class) for (int64_t c = 0; c < C; c++) w[c * P + j] = 0;
  }

  void load_ids() {
    read(job.target, image, 0, pixel, id, n);
    const R ignored = static_cast<R>(job.ignored), end = static_cast<R>(C);
    mask special = {};
    for (int64_t j = n; j < padded; j++) id[j] = 0;
    for (int64_t j = 0; j < padded; j += L) {
      const vec value = S::load(id + j);
      special |= !((value >= 0) & (value < end));
      if (job.has_ignored) special |= value == ignored;
    }
    for (int64_t j = n; j < padded; j++) id[j] = -1;
    if (!any(special)) return;
    for (int64_t j = 0; j < n; j++) {
      if (job.has_ignored && id[j] == ignored) leave_out(j), id[j] = -1;
      else if (!(id[j] >= 0 && id[j] < end)) wrong |= BAD_ID, id[j] = -1;
    }
  }

  void load_planes() {
    const R ignored = static_cast<R>(job.ignored);
    for (int64_t c = 0; c < C; c++) {
      R *to = t + c * P;
      read(job.target, image, c, pixel, to, n);
      for (int64_t j = n; j < padded; j++) to[j] = 0;
      if (job.has_ignored) {
        if (!job.softmax) std::memset(h + c * P, 0, padded * sizeof(R));
        // An ignored pixel's other labels may be anything; with a sigmoid each plane has its own ignored pixels.
        mask found = {};
        for (int64_t j = 0; j < padded; j += L) found |= S::load(to + j) == ignored;
        for (int64_t j = 0; any(found) && j < n; j++)
          if (to[j] == ignored) {
            any_ignored = true;
            if (job.softmax) leave_out(j); else w[c * P + j] = 0, to[j] = 0, h[c * P + j] = 1;
          }
      }
    }
    if (job.softmax && any_ignored)
      for (int64_t j = 0; j < n; j++) {
        bool left_out = false;
        for (int64_t c = 0; c < C; c++) left_out |= t[c * P + j] == ignored;
        if (left_out) for (int64_t c = 0; c < C; c++) t[c * P + j] = 0;
        one[j] = left_out;
      }
    if (job.slope.data) return;
    mask bad = {};
    for (int64_t c = 0; c < C; c++)
      for (int64_t j = 0; j < padded; j += L) {
        const vec value = S::load(t + c * P + j);
        bad |= !((value >= R(-1e-5)) & (value <= R(1 + 1e-5)));
      }
    if (any(bad)) wrong |= BAD_LABEL;
    if (!job.softmax) return;
    bad = mask{};
    for (int64_t j = 0; j < n; j++) two[j] = any_ignored && one[j] != 0;
    for (int64_t j = n; j < padded; j++) two[j] = 1;
    for (int64_t j = 0; j < padded; j += L) {
      vec whole = S::load(two + j);
      for (int64_t c = 0; c < C; c++) whole += S::load(t + c * P + j);
      bad |= !((whole >= R(1 - 2e-2)) & (whole <= R(1 + 2e-2)));
    }
    if (any(bad)) wrong |= BAD_TOTAL;
  }

  // Whether a tile of rows can be used where it is: nothing to convert, to gather or to fill up.
  bool as_it_lies(const View &v) const {
    return v.type == (sizeof(R) == 4 ? F32 : F64) && v.pixel == 1 && n == padded;
  }

  void load_logits() {
    // Float rows are read where they lie; what has to be converted, padded or emptied is copied first.
    const bool direct = as_it_lies(job.logits) && !any_ignored;
    if (direct) {
      z = static_cast<const R *>(job.logits.data) + image * job.logits.image + pixel, step = job.logits.cls;
      return;
    }
    z = z_own, step = P;
    const bool across = job.logits.cls == 1 && job.logits.pixel != 1;
    if (across) read_across(job.logits, image, pixel, C, z_own, P, n);
    for (int64_t c = 0; c < C; c++) {
      R *to = z_own + c * P;
      if (!across) read(job.logits, image, c, pixel, to, n);
      for (int64_t j = n; j < padded; j++) to[j] = 0;
    }
    if (any_ignored)
      for (int64_t c = 0; c < C; c++) {
        // Replaced, not weighted by 0: an ignored logit may be NaN.
        for (int64_t j = 0; j < n; j++)
          z_own[c * P + j] = ignored(c, j) ? R(0) : z_own[c * P + j];
      }
  }

  bool ignored(int64_t c, int64_t j) const {
    return job.planes ? (job.softmax ? one[j] : h[c * P + j]) != 0 : id[j] < 0;
  }

  void store_slopes(const R *rows) {
    if (job.slope.cls == 1 && job.slope.pixel != 1) return write_across(job.slope, image, pixel, C, rows, P, n);
    for (int64_t c = 0; c < C; c++) write(job.slope, image, c, pixel, rows + c * P, n);
  }

  // e, top, rest and inv = 1/(1 + rest).
  void soften() {
    // Copies: a store through memcpy might, for all the compiler knows, change a member.
    const R *const z = this->z;
    R *const top = this->top, *const e = this->e;
    const int64_t step = this->step, P = this->P, C = this->C, padded = this->padded;
    std::memcpy(top, z, padded * sizeof(R));
    for (int64_t c = 0; c < C; c++)
      for (int64_t j = 0; j < padded; j += L) {
        const R *at = z + c * step + j;
        __builtin_prefetch(at + P);  // of the next tile
        const vec value = S::load(at), best = S::load(top + j);
        S::store(top + j, value > best ? value : best);
      }
    const vec unit = S::all(1);
    for (int64_t j = 0; j < padded; j += N * L) {
      vec best[N], small[N] = {}, whole[N] = {};
      EACH best[u] = S::load(top + j + u * L);
      for (int64_t c = 0; c < C; c++) {
        vec x[N];
        EACH x[u] = S::load(z + c * step + j + u * L) - best[u];
        exp_each(x);
        EACH S::store(e + c * P + j + u * L, x[u]);
        EACH whole[u] += x[u];
        EACH small[u] += x[u] >= unit ? vec{} : x[u];  // NaN goes in
      }
      // As many as share the greatest logit, all but one of them.
      EACH small[u] += rounded(whole[u] - small[u]) - unit;
      EACH S::store(rest + j + u * L, small[u]);
      EACH S::store(inv + j + u * L, unit / (small[u] + unit));
    }
  }

  // To the nearest integer, for values of at most a few thousand.
  static inline vec rounded(vec value) {
    const vec magic = S::all(sizeof(R) == 4 ? R(12582912) : R(6755399441055744));
    return value + magic - magic;
  }

  static inline double lanes(vec values) {
    Sum<R> sum;
    sum.take(values);
    return ::sum(sum.total);
  }

  static inline vec mine(vec id, int64_t c) {  // 1 where a pixel is of class c
    return id == S::all(static_cast<R>(c)) ? S::all(1) : vec{};
  }

  // ---------------------------------------------------------------- softmax and ids, the sums of Dice and cross-entropy

  void forward_simple() {
    soften();
    R *const e = this->e, *const one = this->one, *const id = this->id;
    const int64_t P = this->P, padded = this->padded;
    for (int64_t j = 0; j < padded; j += L) S::store(one + j, S::load(inv + j) * S::load(weight + j));
    for (int64_t c = 0; c < C; c++) {
      Sum<R> predicted, overlap;
      const vec own = S::all(static_cast<R>(c));
      for (int64_t start = 0; start < padded; start += BLOCK) {
        vec part = {}, own_part = {};
        for (int64_t j = start; j < std::min(start + BLOCK, padded); j += L) {
          const vec p = S::load(e + c * P + j) * S::load(one + j);
          part += p;
          own_part += S::load(id + j) == own ? p : vec{};
        }
        predicted.take(part), overlap.take(own_part);
      }
      total[PREDICTED][c] += ::sum(predicted.total);
      total[OVERLAP][c] += ::sum(overlap.total);
    }
    if (wants(NLL)) {
      for (int64_t j = 0; j < n; j++) two[j] = id[j] >= 0 ? z[static_cast<int64_t>(id[j]) * step + j] : top[j];
      for (int64_t j = n; j < padded; j++) two[j] = top[j];
      for (int64_t j = 0; j < padded; j += L)
        S::store(two + j, S::load(weight + j) * (S::load(top + j) - S::load(two + j) + log1p_(S::load(rest + j), S::load(inv + j))));
    }
    double count = 0;
    for (int64_t j = 0; j < padded; j += L) {
      const vec ids = S::load(id + j), weights = S::load(weight + j);
      const double together = lanes(weights);
      count += together;
      // Neighbours mostly belong to the same class.
      bool same = true;
      for (int lane = 1; lane < L; lane++) same &= ids[lane] == ids[0];
      if (same) {
        if (ids[0] < 0) continue;
        const int64_t c = static_cast<int64_t>(ids[0]);
        total[ACTUAL][c] += together;
        if (wants(NLL)) total[NLL][c] += lanes(S::load(two + j));
        continue;
      }
      for (int lane = 0; lane < L; lane++) {
        if (ids[lane] < 0) continue;
        const int64_t c = static_cast<int64_t>(ids[lane]);
        total[ACTUAL][c] += weights[lane];
        if (wants(NLL)) total[NLL][c] += two[j + lane];
      }
    }
    for (int64_t c = 0; c < C; c++) total[COUNT][c] += count;
  }

  template <bool with_nll> void backward_simple() {
    soften();
    const bool direct = as_it_lies(job.slope);
    R *to = out;
    int64_t to_step = this->P;
    if (direct) to = static_cast<R *>(job.slope.data) + image * job.slope.image + pixel, to_step = job.slope.cls;
    const R *const e = this->e, *const id = this->id, *const inv = this->inv, *const rest = this->rest, *const weight = this->weight;
    R *const one = this->one, *const two = this->two, *const three = this->three;
    const int64_t P = this->P, C = this->C, padded = this->padded;
    const R *g_p = grad[PREDICTED], *g_o = grad[OVERLAP], *g_n = grad[NLL];
    for (int64_t j = 0; j < n; j++) three[j] = with_nll && id[j] >= 0 ? g_n[static_cast<int64_t>(id[j])] : R(0);
    for (int64_t j = n; j < padded; j++) three[j] = 0;
    const vec unit = S::all(1);
    for (int64_t j = 0; j < padded; j += L) {
      const vec ids = S::load(id + j);
      vec best = {}, s = {};
      for (int64_t c = 0; c < C; c++) {
        vec slope = S::all(g_p[c]) + (ids == S::all(static_cast<R>(c)) ? S::all(g_o[c]) : vec{});
        best = S::load(e + c * P + j) >= unit ? slope : best;
      }
      for (int64_t c = 0; c < C; c++) {
        vec slope = S::all(g_p[c]) + (ids == S::all(static_cast<R>(c)) ? S::all(g_o[c]) : vec{});
        s += S::load(e + c * P + j) * (slope - best);
      }
      S::store(one + j, best);
      S::store(two + j, s * S::load(inv + j));
    }
    for (int64_t c = 0; c < C; c++) {
      const vec own = S::all(static_cast<R>(c)), p_slope = S::all(g_p[c]), o_slope = S::all(g_o[c]);
      R *const line = to + c * to_step;
      for (int64_t j = 0; j < padded; j += L) {
        const auto is_own = S::load(id + j) == own;
        const vec x = S::load(e + c * P + j), share = S::load(inv + j), p = x * share;
        vec dz = p * (p_slope + (is_own ? o_slope : vec{}) - S::load(one + j) - S::load(two + j));
        if (with_nll) {
          const vec q = x >= unit ? S::load(rest + j) * share : unit - p, g = S::load(three + j);
          dz += is_own ? -g * q : g * p;
        }
        S::store(line + j, dz * S::load(weight + j));
      }
    }
    if (!direct) store_slopes(out);
  }

  // ------------------------------------------------------------------------------------------ softmax, whatever is wanted

  // (1 - p)^gamma, and its slope by -log p, which is gamma (1 - p)^(gamma - 1) p; 0 below the least 1 - p.
  void focus(vec q, vec p, vec &factor, vec &slope) const {
    const R least = sizeof(R) == 4 ? R(1.17549435e-38) : R(2.2250738585072014e-308);
    const vec floor = S::all(least), kept = q >= floor ? q : floor;
    for (int lane = 0; lane < L; lane++) factor[lane] = std::pow(kept[lane], static_cast<R>(job.gamma));
    slope = q >= floor ? static_cast<R>(job.gamma) * factor / kept * p : vec{};
    factor = q == q ? factor : q;
  }

  // Of the classes but the greatest: `two` gets the logarithm of the sum of e^z, `three` 1 where the greatest is alone.
  void others() {
    const vec unit = S::all(1);
    for (int64_t j = 0; j < padded; j += L) {
      vec greatest = {}, second = S::all(-INFINITY), sum = {};
      for (int64_t c = 0; c < C; c++) {
        const vec value = S::load(z + c * step + j);
        const auto is_top = S::load(e + c * P + j) >= unit;
        greatest += is_top ? unit : vec{};
        second = is_top ? second : value > second ? value : second;
      }
      const auto alone = greatest == unit;
      second = alone ? second : S::load(top + j);
      for (int64_t c = 0; c < C; c++) {
        const auto is_top = S::load(e + c * P + j) >= unit;
        sum += is_top ? vec{} : exp_(S::load(z + c * step + j) - second);
      }
      S::store(two + j, second + log_(alone ? sum : unit));
      S::store(three + j, alone ? unit : vec{});
    }
  }

  vec weights(int64_t c, int64_t j) const { return S::load(by_class ? w + c * P + j : weight + j); }
  // The label times x. Not multiplied where it is true or false: x may be infinite, or NaN, where it is false.
  vec by_label(int64_t c, int64_t j, vec label, vec x) const {
    if (job.planes) return label * x;
    return S::load(id + j) == S::all(static_cast<R>(c)) ? x : vec{};
  }
  vec labels(int64_t c, int64_t j) const { return job.planes ? S::load(t + c * P + j) : mine(S::load(id + j), c); }

  void forward_softmax() {
    soften();
    if (wants(ABSENT_NLL)) others();
    const vec unit = S::all(1);
    const bool logs = wants(NLL) || wants(ALL_NLL) || wants(FOCAL) || wants(ABSENT_NLL);
    for (int64_t j = 0; logs && j < padded; j += L) S::store(one + j, log1p_(S::load(rest + j), S::load(inv + j)));
    for (int64_t c = 0; c < C; c++) {
      Sum<R> sums[ROWS];
      for (int64_t start = 0; start < padded; start += BLOCK) {
        vec sum[ROWS] = {};
        for (int64_t j = start; j < std::min(start + BLOCK, padded); j += L) {
          const vec x = S::load(e + c * P + j), share = S::load(inv + j), p = x * share, wt = weights(c, j), label = labels(c, j);
          sum[PREDICTED] += wt * p;
          sum[OVERLAP] += by_label(c, j, label, wt * p);
          sum[ACTUAL] += wt * label;
          sum[COUNT] += wt;
          if (wants(SQUARES)) sum[SQUARES] += wt * p * p;
          if (wants(ACTUAL_SQUARES)) sum[ACTUAL_SQUARES] += wt * label * label;
          if (wants(MINIMUM)) sum[MINIMUM] += wt * (p < label ? p : label);
          if (!logs) continue;
          const vec nll = S::load(top + j) - S::load(z + c * step + j) + S::load(one + j);
          sum[NLL] += by_label(c, j, label, wt * nll);
          sum[ALL_NLL] += wt * nll;
          if (wants(FOCAL)) {
            vec factor = {}, slope;
            focus(x >= unit ? S::load(rest + j) * share : unit - p, p, factor, slope);
            sum[FOCAL] += by_label(c, j, label, wt * factor * nll);
          }
          if (wants(ABSENT_NLL)) {
            const vec near = S::load(one + j) + S::load(top + j) - S::load(two + j);
            const auto alone = (x >= unit) & (S::load(three + j) == unit);
            sum[ABSENT_NLL] += wt * (alone ? near : -exact_log1p(-p));
          }
        }
        for (int row = 0; row < ROWS; row++) sums[row].take(sum[row]);
      }
      for (int row = 0; row < ROWS; row++) total[row][c] += ::sum(sums[row].total);
    }
  }

  void backward_softmax() {
    soften();
    if (wants(ABSENT_NLL)) others();
    const vec unit = S::all(1);
    const bool logs = wants(NLL) || wants(ALL_NLL) || wants(FOCAL);
    for (int64_t j = 0; j < padded; j += L) {
      vec best = {}, s = {}, sum_h = {}, near = {};
      const vec share = S::load(inv + j), left = S::load(rest + j) * share, log_sum = wants(FOCAL) ? log1p_(S::load(rest + j), S::load(inv + j)) : vec{};
      for (int64_t c = 0; c < C; c++) {
        const vec x = S::load(e + c * P + j), p = x * share, wt = weights(c, j), label = labels(c, j);
        const auto is_top = x >= unit;
        vec slope = S::all(grad[PREDICTED][c]) + label * grad[OVERLAP][c];
        if (wants(SQUARES)) slope += p * (2 * grad[SQUARES][c]);
        if (wants(MINIMUM)) slope += grad[MINIMUM][c] * (p < label ? unit : p == label ? unit * R(0.5) : vec{});
        if (wants(ABSENT_NLL)) {
          const auto alone = is_top & (S::load(three + j) == unit);
          slope += alone ? vec{} : grad[ABSENT_NLL][c] / (unit - p);
          near += alone ? wt * p * grad[ABSENT_NLL][c] : vec{};
        }
        slope *= wt;
        best = is_top ? slope : best;
        S::store(b + c * P + j, slope);
        if (!logs) continue;
        vec of_log = label * grad[NLL][c] + grad[ALL_NLL][c];
        if (wants(FOCAL)) {
          vec factor = {}, falling;
          focus(is_top ? left : unit - p, p, factor, falling);
          const vec nll = S::load(top + j) - S::load(z + c * step + j) + log_sum;
          of_log += by_label(c, j, label, grad[FOCAL][c] * (factor + falling * nll));
        }
        of_log *= wt;
        sum_h += of_log;
        S::store(h + c * P + j, of_log);
      }
      for (int64_t c = 0; c < C; c++) s += S::load(e + c * P + j) * (S::load(b + c * P + j) - best);
      s *= share;
      for (int64_t c = 0; c < C; c++) {
        const vec x = S::load(e + c * P + j), p = x * share;
        const auto is_top = x >= unit;
        vec dz = p * (S::load(b + c * P + j) - best - s);
        if (logs) {
          const vec of_log = S::load(h + c * P + j);
          // Near certainty by the rest; elsewhere as it stands, where 1 - p is exact enough: one form for both.
          dz += is_top ? p * (sum_h - of_log) - of_log * left : p * (sum_h - of_log) - of_log * (unit - p);
        }
        if (wants(ABSENT_NLL)) {
          const auto alone = is_top & (S::load(three + j) == unit);
          const vec fall = exp_(is_top ? vec{} : S::load(z + c * step + j) - S::load(two + j));
          dz += alone ? near : -near * fall;
        }
        S::store(out + c * P + j, dz);
      }
    }
    store_slopes(out);
  }

  // ---------------------------------------------------------------------------------------------------------------- sigmoid

  // What is wanted: the sums of Dice; those and of cross-entropy; any. What is not costs nothing.
  enum Wish { DICE, DICE_AND_NLL, ANY };
  Wish wish() const { return job.rows == 4 ? DICE : job.rows == 5 && wants(NLL) ? DICE_AND_NLL : ANY; }

  struct Both {
    vec p, q, log_sum;
  };

  static Both both(vec value, bool logs) {
    const vec unit = S::all(1), x = exp_(value < 0 ? value : -value), large = unit / (unit + x), small = x * large;
    const auto positive = value > 0;
    return {positive ? large : small, positive ? small : large, logs ? log1p_of_share(x) : vec{}};
  }
  static vec positive_part(vec value) { return value < 0 ? vec{} : value; }

  // Dice of planes alone.
  void forward_planes() {
    const vec unit = S::all(1), most = S::all(88);
    const R *const z = this->z, *const t = this->t;
    const int64_t step = this->step, P = this->P, padded = this->padded;
    for (int64_t c = 0; c < C; c++) {
      Sum<R> predicted, overlap, actual, count;
      const R *const shared = by_class ? w + c * P : weight;
      for (int64_t start = 0; start < padded; start += BLOCK) {
        vec sum[4] = {};
        for (int64_t j = start; j < std::min(start + BLOCK, padded); j += N * L) {
          // 1/(1 + e^-z) is as exact where p is small; where p is near 1, only 1 - p would lose.
          vec x[N];
          EACH x[u] = -S::load(z + c * step + j + u * L);
          EACH x[u] = most < x[u] ? most : x[u];
          exp_each(x);
          EACH x[u] = unit / (unit + x[u]);
          EACH {
            const vec wt = S::load(shared + j + u * L), label = S::load(t + c * P + j + u * L), wp = wt * x[u];
            sum[0] += wp, sum[1] += wp * label, sum[2] += wt * label, sum[3] += wt;
          }
        }
        predicted.take(sum[0]), overlap.take(sum[1]), actual.take(sum[2]), count.take(sum[3]);
      }
      total[PREDICTED][c] += ::sum(predicted.total), total[OVERLAP][c] += ::sum(overlap.total);
      total[ACTUAL][c] += ::sum(actual.total), total[COUNT][c] += ::sum(count.total);
    }
  }

  void backward_planes() {
    const vec unit = S::all(1);
    const R *const z = this->z, *const t = this->t;
    const int64_t step = this->step, P = this->P, padded = this->padded;
    const bool direct = as_it_lies(job.slope);
    for (int64_t c = 0; c < C; c++) {
      R *line = direct ? static_cast<R *>(job.slope.data) + image * job.slope.image + c * job.slope.cls + pixel : out + c * P;
      const R of_p = grad[PREDICTED][c], of_overlap = grad[OVERLAP][c];
      const R *const shared = by_class ? w + c * P : weight;
      for (int64_t j = 0; j < padded; j += N * L) {
        // p (1 - p), the same on both sides of 0.
        vec x[N], large[N];
        EACH x[u] = S::load(z + c * step + j + u * L);
        EACH x[u] = x[u] < 0 ? x[u] : -x[u];
        exp_each(x);
        EACH large[u] = unit / (unit + x[u]);
        EACH {
          const vec slope = of_p + S::load(t + c * P + j + u * L) * of_overlap;
          S::store(line + j + u * L, slope * (x[u] * large[u] * large[u]) * S::load(shared + j + u * L));
        }
      }
    }
    if (!direct) store_slopes(out);
  }

  template <Wish wish> void forward_sigmoid() {
    const vec unit = S::all(1);
    const R *const z = this->z, *const t = this->t;
    const int64_t step = this->step, P = this->P, C = this->C, padded = this->padded;
    const bool logs = wants(NLL) || wants(ALL_NLL) || wants(FOCAL) || wants(ABSENT_NLL);
    const R front = static_cast<R>(job.front), back = static_cast<R>(job.back);
    for (int64_t c = 0; c < C; c++) {
      Sum<R> sums[ROWS];
      const R *const shared = by_class ? w + c * P : weight;
      for (int64_t start = 0; start < padded; start += BLOCK) {
        vec sum[ROWS] = {};
        for (int64_t j = start; j < std::min(start + BLOCK, padded); j += L) {
          const vec value = S::load(z + c * step + j), wt = S::load(shared + j), label = S::load(t + c * P + j);
          const Both at = both(value, logs);
          const vec wp = wt * at.p;
          sum[PREDICTED] += wp;
          sum[OVERLAP] += wp * label;
          sum[ACTUAL] += wt * label;
          sum[COUNT] += wt;
          // t (-log p) + (1 - t) (-log q), of which log(1 + e) is a part of both.
          sum[NLL] += wt * (label * positive_part(-value) + (unit - label) * positive_part(value) + at.log_sum);
          if (wish == DICE_AND_NLL) continue;
          if (wants(SQUARES)) sum[SQUARES] += wp * at.p;
          if (wants(ACTUAL_SQUARES)) sum[ACTUAL_SQUARES] += wt * label * label;
          if (wants(MINIMUM)) sum[MINIMUM] += wt * (at.p < label ? at.p : label);
          if (!logs) continue;
          const vec nll = positive_part(-value) + at.log_sum, absent = positive_part(value) + at.log_sum;
          sum[ALL_NLL] += wt * nll;
          sum[ABSENT_NLL] += wt * absent;
          if (wants(FOCAL)) {
            const R gamma = static_cast<R>(job.gamma);
            const vec there = exp_(-gamma * absent) * nll, not_there = exp_(-gamma * nll) * absent;
            sum[FOCAL] += wt * (front * label * there + back * (unit - label) * not_there);
          }
        }
        for (int row = 0; row < ROWS; row++)
          if (wish == ANY || row <= COUNT || (wish == DICE_AND_NLL && row == NLL)) sums[row].take(sum[row]);
      }
      for (int row = 0; row < ROWS; row++) total[row][c] += ::sum(sums[row].total);
    }
  }

  template <Wish wish> void backward_sigmoid() {
    const vec unit = S::all(1);
    const R *const z = this->z, *const t = this->t;
    const int64_t step = this->step, P = this->P, C = this->C, padded = this->padded;
    const R gamma = static_cast<R>(job.gamma);
    const R front = static_cast<R>(job.front), back = static_cast<R>(job.back);
    const bool direct = as_it_lies(job.slope);
    for (int64_t c = 0; c < C; c++) {
      R *line = direct ? static_cast<R *>(job.slope.data) + image * job.slope.image + c * job.slope.cls + pixel : out + c * P;
      const R of_p = grad[PREDICTED][c], of_overlap = grad[OVERLAP][c], of_nll = grad[NLL][c];
      const R *const shared = by_class ? w + c * P : weight;
      for (int64_t j = 0; j < padded; j += L) {
        const vec value = S::load(z + c * step + j), wt = S::load(shared + j), label = S::load(t + c * P + j);
        vec slope = of_p + label * of_overlap;
        const Both at = both(value, wish == ANY && wants(FOCAL));
        if (wish == ANY && wants(SQUARES)) slope += at.p * (2 * grad[SQUARES][c]);
        if (wish == ANY && wants(MINIMUM)) slope += grad[MINIMUM][c] * (at.p < label ? unit : at.p == label ? unit * R(0.5) : vec{});
        vec dz = slope * at.p * at.q;
        if ((wish == DICE_AND_NLL || (wish == ANY && wants(NLL)))) dz += of_nll * (at.p * (unit - label) - at.q * label);
        if (wish == ANY && wants(ALL_NLL)) dz -= grad[ALL_NLL][c] * at.q;
        if (wish == ANY && wants(ABSENT_NLL)) dz += grad[ABSENT_NLL][c] * at.p;
        if (wish == ANY && wants(FOCAL)) {
          const vec nll = positive_part(-value) + at.log_sum, absent = positive_part(value) + at.log_sum;
          const vec there = exp_(-gamma * absent) * (-gamma * at.p * nll - at.q);
          const vec not_there = exp_(-gamma * nll) * (gamma * at.q * absent + at.p);
          dz += grad[FOCAL][c] * (front * label * there + back * (unit - label) * not_there);
        }
        S::store(line + j, dz * wt);
      }
    }
    if (!direct) store_slopes(out);
  }

  void forward() {
    if (simple()) forward_simple();
    else if (job.softmax) forward_softmax();
    else if (wish() == DICE) forward_planes();
    else if (wish() == DICE_AND_NLL) forward_sigmoid<DICE_AND_NLL>();
    else forward_sigmoid<ANY>();
  }

  void backward() {
    if (simple()) wants(NLL) ? backward_simple<true>() : backward_simple<false>();
    else if (job.softmax) backward_softmax();
    else if (wish() == DICE) backward_planes();
    else if (wish() == DICE_AND_NLL) backward_sigmoid<DICE_AND_NLL>();
    else backward_sigmoid<ANY>();
  }
};

struct Plan {
  int64_t length, per_image, units;
  template <class R> static Plan of(const Job &job) {
    // Fixed by the shape alone, so that a result does not depend on the number of threads.
    const int64_t tile = Tile<R>::tile_pixels(job.classes);
    int64_t length = UNIT / job.classes;
    const int64_t most = job.images * job.pixels / 4096;
    length = (length > most ? length : most) / tile * tile;
    length = length < tile ? tile : length;
    const int64_t per_image = (job.pixels + length - 1) / length;
    return {length, per_image, per_image * job.images};
  }
};

template <class R> static void forward(Job &job) {
  const Plan plan = Plan::of<R>(job);
  const int64_t size = job.rows * job.classes;
  std::vector<double> parts(plan.units * size);
  std::atomic<int32_t> wrong{0};
  const bool done = in_parallel(plan.units, job.threads, job.region, [&](int64_t unit) {
    Tile<R> tile(job);
    tile.start(unit / plan.per_image);
    const int64_t first = unit % plan.per_image * plan.length, end = std::min(first + plan.length, job.pixels);
    for (int64_t at = first; at < end; at += tile.P) {
      tile.load(at, std::min(tile.P, end - at));
      tile.forward();
    }
    for (int row = 0; row < ROWS; row++)
      if (job.row[row] >= 0) std::memcpy(&parts[unit * size + job.row[row] * job.classes], tile.total[row], job.classes * sizeof(double));
    if (tile.wrong) wrong |= tile.wrong;
  });
  job.wrong = done ? wrong.load() : NO_MEMORY;
  if (!done) return;
  for (int64_t row = 0; row < job.rows; row++)
    for (int64_t image = 0; image < job.images; image++) {
      double *to = job.sums + (row * job.images + image) * job.classes;
      std::memset(to, 0, job.classes * sizeof(double));
      for (int64_t unit = image * plan.per_image; unit < (image + 1) * plan.per_image; unit++)
        for (int64_t c = 0; c < job.classes; c++) to[c] += parts[unit * size + row * job.classes + c];
    }
}

template <class R> static void backward(Job &job) {
  const Plan plan = Plan::of<R>(job);
  const bool done = in_parallel(plan.units, job.threads, job.region, [&](int64_t unit) {
    Tile<R> tile(job);
    tile.start(unit / plan.per_image);
    const int64_t first = unit % plan.per_image * plan.length, end = std::min(first + plan.length, job.pixels);
    for (int64_t at = first; at < end; at += tile.P) {
      tile.load(at, std::min(tile.P, end - at));
      tile.backward();
    }
  });
  job.wrong = done ? 0 : NO_MEMORY;
}

extern "C" {
void lightning_dice_forward(Job *job) {
  guarded(job, [&] { job->logits.type == F64 ? forward<double>(*job) : forward<float>(*job); });
}
void lightning_dice_backward(Job *job) {
  guarded(job, [&] { job->logits.type == F64 ? backward<double>(*job) : backward<float>(*job); });
}
// Of which sources this was built.
uint64_t lightning_dice_source() { return SOURCE; }
int32_t lightning_dice_has_half() { return HAS_HALF; }
int64_t lightning_dice_job_size() { return sizeof(Job); }
}
