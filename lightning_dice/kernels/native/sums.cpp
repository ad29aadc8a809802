// The overlap sums and their gradient. Each takes one pass over the logits, and nothing is stored in between.
//
// A unit of work is a run of pixels of one image, processed tile by tile: a tile is a few hundred pixels of all classes,
// small enough for the cache. Sums accumulate in the lanes of vectors within a tile, and in double across tiles.
//
// Softmax. With e_c = exp(z_c - max), `rest` is the sum of all e but the 1 of the greatest, so that p_m = 1/(1 + rest) and
// 1 - p_m = rest/(1 + rest) are exact where p_m rounds to 1, and -log p_c = (max - z_c) + log1p(rest).
//
// Sigmoid. With e = exp(-|z|), p and 1 - p are 1/(1 + e) and e/(1 + e), or the other way round for z < 0,
// -log p = max(-z, 0) + log1p(e), and -log(1 - p) = max(z, 0) + log1p(e).
//
// backend.py derives the gradient. Below, s is the sum of p_k D_k, and `sum_h` that of H, whose part at the true class is
// -H (1 - p). The gradient by -log(1 - p) is converted to one by p, B += K/(1 - p), unless one class alone has the
// greatest logit: that class takes the form for m.
#include "common.h"

#include <algorithm>

enum Row { OVERLAP, PREDICTED, ACTUAL, COUNT, SQUARES, ACTUAL_SQUARES, MINIMUM, NLL, ALL_NLL, ABSENT_NLL, FOCAL, ROWS };

enum Invalid : int32_t { BAD_ID = 1, BAD_LABEL = 2, BAD_TOTAL = 4, BAD_WEIGHT = 8 };

struct SumsCall {
  int64_t images, classes, pixels;
  View logits, target, weight, gradient;  // gradient: of the logits, out (backward)
  int32_t softmax, planes, weighted, weight_by_class, has_ignored, threads;
  double ignored;
  double gamma, front, back;  // focal factor, and its weights of foreground and background in planes
  int32_t row[ROWS];       // row of each sum in the result; -1 if not required
  int32_t rows;
  int32_t invalid;         // out: flags of Invalid, or NO_MEMORY
  double *sums;            // (rows, images, classes), out (forward); their gradient, in (backward)
  void *region;
};

static constexpr int64_t TILE = 16384;         // logits
static constexpr int64_t UNIT = 1 << 16;      // logits
static constexpr double LEAST = 0x1p-100;     // as in sums.py
static thread_local Scratch scratch;

template <class R> struct Tile {
  typedef Simd<R> S;
  typedef typename S::vec vec;
  typedef typename S::mask mask;
  static constexpr int L = S::lanes;
  static constexpr int N = 4;              // vectors processed together
  static constexpr int64_t BLOCK = 8 * L;  // pixels added in R before double

  const SumsCall &call;
  const int64_t C, P;  // classes; pixels of a tile, a multiple of N L
  const bool by_class;
  int32_t invalid = 0;

  // (C, P)
  R *z_own, *e, *b, *h, *t, *w, *out;
  // (P)
  R *top, *rest, *inv, *weight, *id, *one, *two, *three;
  // (C, P), rows `step` apart: the logits in place, or z_own
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

  Tile(const SumsCall &call) : call(call), C(call.classes), P(tile_pixels(call.classes)), by_class(call.weight_by_class || (call.planes && !call.softmax && call.has_ignored)) {
    scratch.reserve((7 * C * P + 8 * P + ROWS * C) * sizeof(R) + ROWS * C * sizeof(double) + 64 * 64);
    for (R **tile : {&z_own, &e, &b, &h, &t, &w, &out}) *tile = scratch.take<R>(C * P);
    for (R **line : {&top, &rest, &inv, &weight, &id, &one, &two, &three}) *line = scratch.take<R>(P);
    for (R *&g : grad) g = scratch.take<R>(C);
    for (double *&s : total) s = scratch.take<double>(C);
  }

  bool needs(Row row) const { return call.row[row] >= 0; }
  bool simple() const {
    // The sums of Dice and cross-entropy with class ids.
    return call.softmax && !call.planes && !by_class && !needs(SQUARES) && !needs(ALL_NLL) && !needs(ABSENT_NLL) && !needs(FOCAL);
  }

  void begin_image(int64_t of_image) {
    image = of_image;
    for (int row = 0; row < ROWS; row++) {
      std::memset(total[row], 0, C * sizeof(double));
      for (int64_t c = 0; c < C; c++)
        grad[row][c] = call.gradient.data && needs(Row(row)) ? static_cast<R>(call.sums[(call.row[row] * call.images + image) * C + c]) : R(0);
    }
  }

  void load(int64_t at, int64_t count) {
    pixel = at, n = count, padded = (n + N * L - 1) / (N * L) * (N * L);
    any_ignored = false;
    load_weight();
    if (call.planes) load_planes(); else load_ids();
    load_logits();
  }

  void load_weight() {
    const int64_t lines = by_class ? C : 1;
    R *to = by_class ? w : weight;
    for (int64_t c = 0; c < lines; c++, to += P) {
      if (!call.weighted) {
        for (int64_t j = 0; j < padded; j++) to[j] = j < n ? R(1) : R(0);
        continue;
      }
      read(call.weight, image, call.weight_by_class ? c : 0, pixel, to, n);
      for (int64_t j = n; j < padded; j++) to[j] = 0;
      mask bad = {};
      for (int64_t j = 0; j < padded; j += L) {
        const vec value = S::load(to + j);
        bad |= !((value >= 0) & (value - value == 0));  // infinity minus itself is NaN
      }
      if (any(bad)) invalid |= BAD_WEIGHT;
    }
  }

  void ignore_pixel(int64_t j) {
    any_ignored = true;
    weight[j] = 0;
    if (by_class) for (int64_t c = 0; c < C; c++) w[c * P + j] = 0;
  }

  void load_ids() {
    read(call.target, image, 0, pixel, id, n);
    const R ignored = static_cast<R>(call.ignored), end = static_cast<R>(C);
    mask special = {};
    for (int64_t j = n; j < padded; j++) id[j] = 0;
    for (int64_t j = 0; j < padded; j += L) {
      const vec value = S::load(id + j);
      special |= !((value >= 0) & (value < end));
      if (call.has_ignored) special |= value == ignored;
    }
    for (int64_t j = n; j < padded; j++) id[j] = -1;
    if (!any(special)) return;
    for (int64_t j = 0; j < n; j++) {
      if (call.has_ignored && id[j] == ignored) ignore_pixel(j), id[j] = -1;
      else if (!(id[j] >= 0 && id[j] < end)) invalid |= BAD_ID, id[j] = -1;
    }
  }

  void load_planes() {
    const R ignored = static_cast<R>(call.ignored);
    for (int64_t c = 0; c < C; c++) {
      R *to = t + c * P;
      read(call.target, image, c, pixel, to, n);
      for (int64_t j = n; j < padded; j++) to[j] = 0;
      if (call.has_ignored) {
        if (!call.softmax) std::memset(h + c * P, 0, padded * sizeof(R));
        // The other labels of an ignored pixel may be anything. With a sigmoid each plane ignores its own pixels.
        mask found = {};
        for (int64_t j = 0; j < padded; j += L) found |= S::load(to + j) == ignored;
        for (int64_t j = 0; any(found) && j < n; j++)
          if (to[j] == ignored) {
            any_ignored = true;
            if (call.softmax) ignore_pixel(j); else w[c * P + j] = 0, to[j] = 0, h[c * P + j] = 1;
          }
      }
    }
    if (call.softmax && any_ignored)
      for (int64_t j = 0; j < n; j++) {
        bool ignored_here = false;
        for (int64_t c = 0; c < C; c++) ignored_here |= t[c * P + j] == ignored;
        if (ignored_here) for (int64_t c = 0; c < C; c++) t[c * P + j] = 0;
        one[j] = ignored_here;
      }
    if (call.gradient.data) return;
    mask bad = {};
    for (int64_t c = 0; c < C; c++)
      for (int64_t j = 0; j < padded; j += L) {
        const vec value = S::load(t + c * P + j);
        bad |= !((value >= R(-1e-5)) & (value <= R(1 + 1e-5)));
      }
    if (any(bad)) invalid |= BAD_LABEL;
    if (!call.softmax) return;
    bad = mask{};
    for (int64_t j = 0; j < n; j++) two[j] = any_ignored && one[j] != 0;
    for (int64_t j = n; j < padded; j++) two[j] = 1;
    for (int64_t j = 0; j < padded; j += L) {
      vec whole = S::load(two + j);
      for (int64_t c = 0; c < C; c++) whole += S::load(t + c * P + j);
      bad |= !((whole >= R(1 - 2e-2)) & (whole <= R(1 + 2e-2)));
    }
    if (any(bad)) invalid |= BAD_TOTAL;
  }

  // Whether a tile can be read or written in place, without conversion, gathering or padding.
  bool is_direct(const View &v) const {
    return v.type == (sizeof(R) == 4 ? F32 : F64) && v.pixel == 1 && n == padded;
  }

  void load_logits() {
    // Read in place if possible; copied if it must be converted, padded or blanked.
    const bool direct = is_direct(call.logits) && !any_ignored;
    if (direct) {
      z = static_cast<const R *>(call.logits.data) + image * call.logits.image + pixel, step = call.logits.cls;
      return;
    }
    z = z_own, step = P;
    const bool across = call.logits.cls == 1 && call.logits.pixel != 1;
    if (across) read_across(call.logits, image, pixel, C, z_own, P, n);
    for (int64_t c = 0; c < C; c++) {
      R *to = z_own + c * P;
      if (!across) read(call.logits, image, c, pixel, to, n);
      for (int64_t j = n; j < padded; j++) to[j] = 0;
    }
    if (any_ignored)
      for (int64_t c = 0; c < C; c++) {
        // Replaced, not weighted by 0, as an ignored logit may be NaN.
        for (int64_t j = 0; j < n; j++)
          z_own[c * P + j] = ignored(c, j) ? R(0) : z_own[c * P + j];
      }
  }

  bool ignored(int64_t c, int64_t j) const {
    return call.planes ? (call.softmax ? one[j] : h[c * P + j]) != 0 : id[j] < 0;
  }

  void store_gradient(const R *rows) {
    if (call.gradient.cls == 1 && call.gradient.pixel != 1) return write_across(call.gradient, image, pixel, C, rows, P, n);
    for (int64_t c = 0; c < C; c++) write(call.gradient, image, c, pixel, rows + c * P, n);
  }

  // Computes e, top, rest and inv = 1/(1 + rest).
  void softmax() {
    // Local copies, as the compiler must assume that a store through memcpy changes a member.
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
        EACH small[u] += x[u] >= unit ? vec{} : x[u];  // includes NaN
      }
      // Plus the classes that share the greatest logit, all but one.
      EACH small[u] += rounded(whole[u] - small[u]) - unit;
      EACH S::store(rest + j + u * L, small[u]);
      EACH S::store(inv + j + u * L, unit / (small[u] + unit));
    }
  }

  // Rounds to the nearest integer, for values of at most a few thousand.
  static inline vec rounded(vec value) {
    const vec magic = S::all(sizeof(R) == 4 ? R(12582912) : R(6755399441055744));
    return value + magic - magic;
  }

  static inline double lanes(vec values) {
    Sum<R> sum;
    sum.take(values);
    return ::sum(sum.total);
  }

  static inline vec one_hot(vec id, int64_t c) {  // 1 where a pixel is of class c
    return id == S::all(static_cast<R>(c)) ? S::all(1) : vec{};
  }

  // Softmax and class ids: the sums of Dice and cross-entropy.

  void forward_simple() {
    softmax();
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
    if (needs(NLL)) {
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
      // Neighbouring pixels mostly have the same class.
      bool same = true;
      for (int lane = 1; lane < L; lane++) same &= ids[lane] == ids[0];
      if (same) {
        if (ids[0] < 0) continue;
        const int64_t c = static_cast<int64_t>(ids[0]);
        total[ACTUAL][c] += together;
        if (needs(NLL)) total[NLL][c] += lanes(S::load(two + j));
        continue;
      }
      for (int lane = 0; lane < L; lane++) {
        if (ids[lane] < 0) continue;
        const int64_t c = static_cast<int64_t>(ids[lane]);
        total[ACTUAL][c] += weights[lane];
        if (needs(NLL)) total[NLL][c] += two[j + lane];
      }
    }
    for (int64_t c = 0; c < C; c++) total[COUNT][c] += count;
  }

  template <bool with_nll> void backward_simple() {
    softmax();
    const bool direct = is_direct(call.gradient);
    R *to = out;
    int64_t to_step = this->P;
    if (direct) to = static_cast<R *>(call.gradient.data) + image * call.gradient.image + pixel, to_step = call.gradient.cls;
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
        vec by_p = S::all(g_p[c]) + (ids == S::all(static_cast<R>(c)) ? S::all(g_o[c]) : vec{});
        best = S::load(e + c * P + j) >= unit ? by_p : best;
      }
      for (int64_t c = 0; c < C; c++) {
        vec by_p = S::all(g_p[c]) + (ids == S::all(static_cast<R>(c)) ? S::all(g_o[c]) : vec{});
        s += S::load(e + c * P + j) * (by_p - best);
      }
      S::store(one + j, best);
      S::store(two + j, s * S::load(inv + j));
    }
    for (int64_t c = 0; c < C; c++) {
      const vec own = S::all(static_cast<R>(c)), by_predicted = S::all(g_p[c]), by_overlap = S::all(g_o[c]);
      R *const line = to + c * to_step;
      for (int64_t j = 0; j < padded; j += L) {
        const auto is_own = S::load(id + j) == own;
        const vec x = S::load(e + c * P + j), share = S::load(inv + j), p = x * share;
        vec dz = p * (by_predicted + (is_own ? by_overlap : vec{}) - S::load(one + j) - S::load(two + j));
        if (with_nll) {
          const vec q = x >= unit ? S::load(rest + j) * share : unit - p, g = S::load(three + j);
          dz += is_own ? -g * q : g * p;
        }
        S::store(line + j, dz * S::load(weight + j));
      }
    }
    if (!direct) store_gradient(out);
  }

  // Softmax: any sums.

  // (1 - p)^gamma and its derivative by -log p, gamma (1 - p)^(gamma - 1) p, which is 0 below the least normal 1 - p.
  void focal_factor(vec q, vec p, vec &factor, vec &derivative) const {
    const R least = sizeof(R) == 4 ? R(1.17549435e-38) : R(2.2250738585072014e-308);
    const vec floor = S::all(least), kept = q >= floor ? q : floor;
    for (int lane = 0; lane < L; lane++) factor[lane] = std::pow(kept[lane], static_cast<R>(call.gamma));
    derivative = q >= floor ? static_cast<R>(call.gamma) * factor / kept * p : vec{};
    factor = q == q ? factor : q;
  }

  // Sets `two` to the logarithm of the sum of e^z over all classes but the greatest, and `three` to 1 where one class alone
  // has the greatest logit.
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
  // The label times x. Class ids select instead of multiplying, as x may be infinite or NaN for a wrong class.
  vec times_label(int64_t c, int64_t j, vec label, vec x) const {
    if (call.planes) return label * x;
    return S::load(id + j) == S::all(static_cast<R>(c)) ? x : vec{};
  }
  vec labels(int64_t c, int64_t j) const { return call.planes ? S::load(t + c * P + j) : one_hot(S::load(id + j), c); }

  void forward_softmax() {
    softmax();
    if (needs(ABSENT_NLL)) others();
    const vec unit = S::all(1);
    const bool logs = needs(NLL) || needs(ALL_NLL) || needs(FOCAL) || needs(ABSENT_NLL);
    for (int64_t j = 0; logs && j < padded; j += L) S::store(one + j, log1p_(S::load(rest + j), S::load(inv + j)));
    for (int64_t c = 0; c < C; c++) {
      Sum<R> sums[ROWS];
      for (int64_t start = 0; start < padded; start += BLOCK) {
        vec sum[ROWS] = {};
        for (int64_t j = start; j < std::min(start + BLOCK, padded); j += L) {
          const vec x = S::load(e + c * P + j), share = S::load(inv + j), p = x * share, wt = weights(c, j), label = labels(c, j);
          sum[PREDICTED] += wt * p;
          sum[OVERLAP] += times_label(c, j, label, wt * p);
          sum[ACTUAL] += wt * label;
          sum[COUNT] += wt;
          if (needs(SQUARES)) sum[SQUARES] += wt * p * p;
          if (needs(ACTUAL_SQUARES)) sum[ACTUAL_SQUARES] += wt * label * label;
          if (needs(MINIMUM)) sum[MINIMUM] += wt * (p < label ? p : label);
          if (!logs) continue;
          const vec nll = S::load(top + j) - S::load(z + c * step + j) + S::load(one + j);
          sum[NLL] += times_label(c, j, label, wt * nll);
          sum[ALL_NLL] += wt * nll;
          if (needs(FOCAL)) {
            vec factor = {}, derivative;
            focal_factor(x >= unit ? S::load(rest + j) * share : unit - p, p, factor, derivative);
            sum[FOCAL] += times_label(c, j, label, wt * factor * nll);
          }
          if (needs(ABSENT_NLL)) {
            const vec exact = S::load(one + j) + S::load(top + j) - S::load(two + j);
            const auto alone = (x >= unit) & (S::load(three + j) == unit);
            sum[ABSENT_NLL] += wt * (alone ? exact : -exact_log1p(-p));
          }
        }
        for (int row = 0; row < ROWS; row++) sums[row].take(sum[row]);
      }
      for (int row = 0; row < ROWS; row++) total[row][c] += ::sum(sums[row].total);
    }
  }

  void backward_softmax() {
    softmax();
    if (needs(ABSENT_NLL)) others();
    const vec unit = S::all(1);
    const bool logs = needs(NLL) || needs(ALL_NLL) || needs(FOCAL);
    for (int64_t j = 0; j < padded; j += L) {
      vec best = {}, s = {}, sum_h = {}, k_likely = {};
      const vec share = S::load(inv + j), left = S::load(rest + j) * share, log_sum = needs(FOCAL) ? log1p_(S::load(rest + j), S::load(inv + j)) : vec{};
      for (int64_t c = 0; c < C; c++) {
        const vec x = S::load(e + c * P + j), p = x * share, wt = weights(c, j), label = labels(c, j);
        const auto is_top = x >= unit;
        vec by_p = S::all(grad[PREDICTED][c]) + label * grad[OVERLAP][c];
        if (needs(SQUARES)) by_p += p * (2 * grad[SQUARES][c]);
        if (needs(MINIMUM)) by_p += grad[MINIMUM][c] * (p < label ? unit : p == label ? unit * R(0.5) : vec{});
        if (needs(ABSENT_NLL)) {
          const auto alone = is_top & (S::load(three + j) == unit);
          by_p += alone ? vec{} : grad[ABSENT_NLL][c] / (unit - p);
          k_likely += alone ? wt * p * grad[ABSENT_NLL][c] : vec{};
        }
        by_p *= wt;
        best = is_top ? by_p : best;
        S::store(b + c * P + j, by_p);
        if (!logs) continue;
        vec by_log = label * grad[NLL][c] + grad[ALL_NLL][c];
        if (needs(FOCAL)) {
          vec factor = {}, derivative;
          focal_factor(is_top ? left : unit - p, p, factor, derivative);
          const vec nll = S::load(top + j) - S::load(z + c * step + j) + log_sum;
          by_log += times_label(c, j, label, grad[FOCAL][c] * (factor + derivative * nll));
        }
        by_log *= wt;
        sum_h += by_log;
        S::store(h + c * P + j, by_log);
      }
      for (int64_t c = 0; c < C; c++) s += S::load(e + c * P + j) * (S::load(b + c * P + j) - best);
      s *= share;
      for (int64_t c = 0; c < C; c++) {
        const vec x = S::load(e + c * P + j), p = x * share;
        const auto is_top = x >= unit;
        vec dz = p * (S::load(b + c * P + j) - best - s);
        if (logs) {
          const vec by_log = S::load(h + c * P + j);
          // The greatest class takes 1 - p from `rest`; for the others 1 - p is exact enough.
          dz += is_top ? p * (sum_h - by_log) - by_log * left : p * (sum_h - by_log) - by_log * (unit - p);
        }
        if (needs(ABSENT_NLL)) {
          const auto alone = is_top & (S::load(three + j) == unit);
          const vec share_of_rest = exp_(is_top ? vec{} : S::load(z + c * step + j) - S::load(two + j));
          dz += alone ? k_likely : -k_likely * share_of_rest;
        }
        S::store(out + c * P + j, dz);
      }
    }
    store_gradient(out);
  }

  // Sigmoid.

  // The required sums: of Dice, of Dice and cross-entropy, or any. The code for others is compiled away.
  enum Variant { DICE, DICE_AND_NLL, ANY };
  Variant variant() const { return call.rows == 4 ? DICE : call.rows == 5 && needs(NLL) ? DICE_AND_NLL : ANY; }

  struct Sigmoid {
    vec p, q, log_sum;
  };

  static Sigmoid sigmoid(vec value, bool logs) {
    const vec unit = S::all(1), x = exp_(value < 0 ? value : -value), large = unit / (unit + x), small = x * large;
    const auto positive = value > 0;
    return {positive ? large : small, positive ? small : large, logs ? log1p_of_share(x) : vec{}};
  }
  static vec positive_part(vec value) { return value < 0 ? vec{} : value; }

  // Planes: the sums of Dice.
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
          // 1/(1 + e^-z) is exact enough for p; only 1 - p would need the form of `sigmoid`.
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
    const bool direct = is_direct(call.gradient);
    for (int64_t c = 0; c < C; c++) {
      R *line = direct ? static_cast<R *>(call.gradient.data) + image * call.gradient.image + c * call.gradient.cls + pixel : out + c * P;
      const R of_p = grad[PREDICTED][c], of_overlap = grad[OVERLAP][c];
      const R *const shared = by_class ? w + c * P : weight;
      for (int64_t j = 0; j < padded; j += N * L) {
        // p (1 - p) is even in z.
        vec x[N], large[N];
        EACH x[u] = S::load(z + c * step + j + u * L);
        EACH x[u] = x[u] < 0 ? x[u] : -x[u];
        exp_each(x);
        EACH large[u] = unit / (unit + x[u]);
        EACH {
          const vec by_p = of_p + S::load(t + c * P + j + u * L) * of_overlap;
          S::store(line + j + u * L, by_p * (x[u] * large[u] * large[u]) * S::load(shared + j + u * L));
        }
      }
    }
    if (!direct) store_gradient(out);
  }

  template <Variant variant> void forward_sigmoid() {
    const vec unit = S::all(1);
    const R *const z = this->z, *const t = this->t;
    const int64_t step = this->step, P = this->P, C = this->C, padded = this->padded;
    const bool logs = needs(NLL) || needs(ALL_NLL) || needs(FOCAL) || needs(ABSENT_NLL);
    const R front = static_cast<R>(call.front), back = static_cast<R>(call.back);
    for (int64_t c = 0; c < C; c++) {
      Sum<R> sums[ROWS];
      const R *const shared = by_class ? w + c * P : weight;
      for (int64_t start = 0; start < padded; start += BLOCK) {
        vec sum[ROWS] = {};
        for (int64_t j = start; j < std::min(start + BLOCK, padded); j += L) {
          const vec value = S::load(z + c * step + j), wt = S::load(shared + j), label = S::load(t + c * P + j);
          const Sigmoid at = sigmoid(value, logs);
          const vec wp = wt * at.p;
          sum[PREDICTED] += wp;
          sum[OVERLAP] += wp * label;
          sum[ACTUAL] += wt * label;
          sum[COUNT] += wt;
          // t (-log p) + (1 - t) (-log(1 - p)); log1p(e) is common to both.
          sum[NLL] += wt * (label * positive_part(-value) + (unit - label) * positive_part(value) + at.log_sum);
          if (variant == DICE_AND_NLL) continue;
          if (needs(SQUARES)) sum[SQUARES] += wp * at.p;
          if (needs(ACTUAL_SQUARES)) sum[ACTUAL_SQUARES] += wt * label * label;
          if (needs(MINIMUM)) sum[MINIMUM] += wt * (at.p < label ? at.p : label);
          if (!logs) continue;
          const vec nll = positive_part(-value) + at.log_sum, absent = positive_part(value) + at.log_sum;
          sum[ALL_NLL] += wt * nll;
          sum[ABSENT_NLL] += wt * absent;
          if (needs(FOCAL)) {
            const R gamma = static_cast<R>(call.gamma);
            const vec there = exp_(-gamma * absent) * nll, not_there = exp_(-gamma * nll) * absent;
            sum[FOCAL] += wt * (front * label * there + back * (unit - label) * not_there);
          }
        }
        for (int row = 0; row < ROWS; row++)
          if (variant == ANY || row <= COUNT || (variant == DICE_AND_NLL && row == NLL)) sums[row].take(sum[row]);
      }
      for (int row = 0; row < ROWS; row++) total[row][c] += ::sum(sums[row].total);
    }
  }

  template <Variant variant> void backward_sigmoid() {
    const vec unit = S::all(1);
    const R *const z = this->z, *const t = this->t;
    const int64_t step = this->step, P = this->P, C = this->C, padded = this->padded;
    const R gamma = static_cast<R>(call.gamma);
    const R front = static_cast<R>(call.front), back = static_cast<R>(call.back);
    const bool direct = is_direct(call.gradient);
    for (int64_t c = 0; c < C; c++) {
      R *line = direct ? static_cast<R *>(call.gradient.data) + image * call.gradient.image + c * call.gradient.cls + pixel : out + c * P;
      const R of_p = grad[PREDICTED][c], of_overlap = grad[OVERLAP][c], of_nll = grad[NLL][c];
      const R *const shared = by_class ? w + c * P : weight;
      for (int64_t j = 0; j < padded; j += L) {
        const vec value = S::load(z + c * step + j), wt = S::load(shared + j), label = S::load(t + c * P + j);
        vec by_p = of_p + label * of_overlap;
        const Sigmoid at = sigmoid(value, variant == ANY && needs(FOCAL));
        if (variant == ANY && needs(SQUARES)) by_p += at.p * (2 * grad[SQUARES][c]);
        if (variant == ANY && needs(MINIMUM)) by_p += grad[MINIMUM][c] * (at.p < label ? unit : at.p == label ? unit * R(0.5) : vec{});
        vec dz = by_p * at.p * at.q;
        if ((variant == DICE_AND_NLL || (variant == ANY && needs(NLL)))) dz += of_nll * (at.p * (unit - label) - at.q * label);
        if (variant == ANY && needs(ALL_NLL)) dz -= grad[ALL_NLL][c] * at.q;
        if (variant == ANY && needs(ABSENT_NLL)) dz += grad[ABSENT_NLL][c] * at.p;
        if (variant == ANY && needs(FOCAL)) {
          const vec nll = positive_part(-value) + at.log_sum, absent = positive_part(value) + at.log_sum;
          const vec there = exp_(-gamma * absent) * (-gamma * at.p * nll - at.q);
          const vec not_there = exp_(-gamma * nll) * (gamma * at.q * absent + at.p);
          dz += grad[FOCAL][c] * (front * label * there + back * (unit - label) * not_there);
        }
        S::store(line + j, dz * wt);
      }
    }
    if (!direct) store_gradient(out);
  }

  void forward() {
    if (simple()) forward_simple();
    else if (call.softmax) forward_softmax();
    else if (variant() == DICE) forward_planes();
    else if (variant() == DICE_AND_NLL) forward_sigmoid<DICE_AND_NLL>();
    else forward_sigmoid<ANY>();
  }

  void backward() {
    if (simple()) needs(NLL) ? backward_simple<true>() : backward_simple<false>();
    else if (call.softmax) backward_softmax();
    else if (variant() == DICE) backward_planes();
    else if (variant() == DICE_AND_NLL) backward_sigmoid<DICE_AND_NLL>();
    else backward_sigmoid<ANY>();
  }
};

struct Plan {
  int64_t length, per_image, units;
  template <class R> static Plan of(const SumsCall &call) {
    // Depends on the shape alone, so that results do not depend on the number of threads.
    const int64_t tile = Tile<R>::tile_pixels(call.classes);
    int64_t length = UNIT / call.classes;
    const int64_t most = call.images * call.pixels / 4096;
    length = (length > most ? length : most) / tile * tile;
    length = length < tile ? tile : length;
    const int64_t per_image = (call.pixels + length - 1) / length;
    return {length, per_image, per_image * call.images};
  }
};

template <class R> static void forward(SumsCall &call) {
  const Plan plan = Plan::of<R>(call);
  const int64_t size = call.rows * call.classes;
  std::vector<double> parts(plan.units * size);
  std::atomic<int32_t> invalid{0};
  const bool done = in_parallel(plan.units, call.threads, call.region, [&](int64_t unit) {
    Tile<R> tile(call);
    tile.begin_image(unit / plan.per_image);
    const int64_t first = unit % plan.per_image * plan.length, end = std::min(first + plan.length, call.pixels);
    for (int64_t at = first; at < end; at += tile.P) {
      tile.load(at, std::min(tile.P, end - at));
      tile.forward();
    }
    for (int row = 0; row < ROWS; row++)
      if (call.row[row] >= 0) std::memcpy(&parts[unit * size + call.row[row] * call.classes], tile.total[row], call.classes * sizeof(double));
    if (tile.invalid) invalid |= tile.invalid;
  });
  call.invalid = done ? invalid.load() : NO_MEMORY;
  if (!done) return;
  for (int64_t row = 0; row < call.rows; row++)
    for (int64_t image = 0; image < call.images; image++) {
      double *to = call.sums + (row * call.images + image) * call.classes;
      std::memset(to, 0, call.classes * sizeof(double));
      for (int64_t unit = image * plan.per_image; unit < (image + 1) * plan.per_image; unit++)
        for (int64_t c = 0; c < call.classes; c++) to[c] += parts[unit * size + row * call.classes + c];
    }
  // A sum of probabilities that underflow counts as one of LEAST.
  const int64_t table = call.images * call.classes;
  for (const auto &[row, number] : {std::pair(OVERLAP, ACTUAL), {PREDICTED, COUNT}, {SQUARES, COUNT}, {MINIMUM, ACTUAL}}) {
    if (call.row[row] < 0) continue;
    double *const to = call.sums + call.row[row] * table, *const of = call.sums + call.row[number] * table;
    for (int64_t at = 0; at < table; at++) to[at] = to[at] < LEAST * of[at] ? LEAST * of[at] : to[at];
  }
}

template <class R> static void backward(SumsCall &call) {
  const Plan plan = Plan::of<R>(call);
  const bool done = in_parallel(plan.units, call.threads, call.region, [&](int64_t unit) {
    Tile<R> tile(call);
    tile.begin_image(unit / plan.per_image);
    const int64_t first = unit % plan.per_image * plan.length, end = std::min(first + plan.length, call.pixels);
    for (int64_t at = first; at < end; at += tile.P) {
      tile.load(at, std::min(tile.P, end - at));
      tile.backward();
    }
  });
  call.invalid = done ? 0 : NO_MEMORY;
}

extern "C" {
void lightning_dice_forward(SumsCall *call) {
  guarded(call, [&] { call->logits.type == F64 ? forward<double>(*call) : forward<float>(*call); });
}
void lightning_dice_backward(SumsCall *call) {
  guarded(call, [&] { call->logits.type == F64 ? backward<double>(*call) : backward<float>(*call); });
}
// Digest of the sources from which this was built.
uint64_t lightning_dice_source() { return SOURCE; }
int32_t lightning_dice_has_half() { return HAS_HALF; }
int64_t lightning_dice_sums_call_size() { return sizeof(SumsCall); }
}
