// Counts of hard predictions, in one pass and without a mask of them: for each class and image, the pixels that are both
// predicted and labelled as the class, predicted as it, labelled as it, and not ignored.
#include "common.h"

#include <algorithm>

namespace {

enum Mode : int32_t { LOGITS, IDS, PLANES };

enum Invalid : int32_t { BAD_LABEL = 1, BAD_PREDICTION = 2 };

struct CountCall {
  int64_t images, classes, pixels;
  View predicted, target;  // logits (LOGITS, PLANES) or ids; ids or planes
  int32_t mode, has_ignored, threads;
  int32_t invalid;         // out: flags of Invalid, or NO_MEMORY
  double ignored, threshold;
  int64_t *counts;         // out: (overlap, predicted, actual, count; images, classes)
  void *region;
};

constexpr int64_t RUN = 2048;        // pixels
constexpr int64_t UNIT = 1 << 15;    // pixels

thread_local Scratch scratch;

template <class R> struct Counter {
  typedef Simd<R> S;
  typedef typename S::vec vec;
  typedef typename S::mask mask;
  static constexpr int L = S::lanes;

  const CountCall &call;
  const int64_t C;
  int32_t invalid = 0;
  R *row, *best, *arg, *label;
  // A bin for each class and one for other pixels, in two banks, so that neighbours of one class do not wait for each other.
  int64_t *both[2], *predicted[2], *actual[2];
  int64_t count = 0;
  int64_t *plane_count;

  explicit Counter(const CountCall &call) : call(call), C(call.classes) {
    const size_t bins = (C + 1) * sizeof(int64_t);
    scratch.reserve(4 * RUN * sizeof(R) + 7 * (bins + 64) + 4 * 64);
    for (R **line : {&row, &best, &arg, &label}) *line = scratch.take<R>(RUN);
    for (int64_t **bank : {&both[0], &both[1], &predicted[0], &predicted[1], &actual[0], &actual[1], &plane_count}) {
      *bank = scratch.take<int64_t>(C + 1);
      std::memset(*bank, 0, bins);
    }
  }

  // Reads the ids of a run, with C for ids that are ignored or invalid.
  void labels(int64_t image, int64_t at, int64_t n, int64_t padded) {
    read(call.target, image, 0, at, label, n);
    for (int64_t j = n; j < padded; j++) label[j] = static_cast<R>(C);
    const R end = static_cast<R>(C), ignored = static_cast<R>(call.ignored);
    mask special = {};
    for (int64_t j = 0; j < n / L * L; j += L) {
      const vec value = S::load(label + j);
      special |= !((value >= 0) & (value < end));
      if (call.has_ignored) special |= value == ignored;
    }
    for (int64_t j = any(special) ? 0 : n / L * L; j < n; j++) {
      if (call.has_ignored && label[j] == ignored) label[j] = end;
      else if (!(label[j] >= 0 && label[j] < end)) invalid |= BAD_LABEL, label[j] = end;
    }
  }

  // Finds the class of the greatest logit, the first among equals; C if one is NaN.
  void greatest(int64_t image, int64_t at, int64_t n, int64_t padded) {
    const bool direct = call.predicted.type == (sizeof(R) == 4 ? F32 : F64) && call.predicted.pixel == 1 && n == padded;
    for (int64_t c = 0; c < C; c++) {
      const R *line = row;
      if (direct) line = static_cast<const R *>(call.predicted.data) + image * call.predicted.image + c * call.predicted.cls + at;
      else {
        read(call.predicted, image, c, at, row, n);
        for (int64_t j = n; j < padded; j++) row[j] = 0;
      }
      R *const best = this->best, *const arg = this->arg;
      if (c == 0) {
        for (int64_t j = 0; j < padded; j += L) {
          const vec value = S::load(line + j);
          S::store(best + j, value), S::store(arg + j, value == value ? vec{} : S::all(static_cast<R>(C)));
        }
        continue;
      }
      const vec own = S::all(static_cast<R>(c)), none = S::all(static_cast<R>(C));
      for (int64_t j = 0; j < padded; j += L) {
        const vec value = S::load(line + j), before = S::load(best + j), which = S::load(arg + j);
        const auto above = value > before;  // never above NaN
        S::store(best + j, above ? value : value == value ? before : value);
        S::store(arg + j, above ? own : value == value ? which : none);
      }
    }
  }

  void ids(int64_t image, int64_t at, int64_t n, int64_t padded) {
    read(call.predicted, image, 0, at, arg, n);
    for (int64_t j = n; j < padded; j++) arg[j] = static_cast<R>(C);
    const R end = static_cast<R>(C);
    mask bad = {};
    for (int64_t j = 0; j < n / L * L; j += L) {
      const vec value = S::load(arg + j);
      bad |= (!((value >= 0) & (value < end))) & (S::load(label + j) < end);
    }
    for (int64_t j = any(bad) ? 0 : n / L * L; j < n; j++)
      if (!(arg[j] >= 0 && arg[j] < end)) {
        // An ignored pixel may hold anything.
        if (label[j] < end) invalid |= BAD_PREDICTION;
        arg[j] = end;
      }
  }

  void tally(int64_t padded) {
    const vec none = S::all(static_cast<R>(C));
    for (int64_t j = 0; j < padded; j += L) {
      const vec mine = S::load(arg + j), theirs = S::load(label + j);
      bool same = true;
      for (int lane = 1; lane < L; lane++) same &= (mine[lane] == mine[0]) & (theirs[lane] == theirs[0]);
      if (same) {
        if (theirs[0] == none[0]) continue;
        const int64_t p = static_cast<int64_t>(mine[0]), t = static_cast<int64_t>(theirs[0]);
        predicted[0][p] += L, actual[0][t] += L, both[0][p == t ? t : C] += L, count += L;
        continue;
      }
      for (int lane = 0; lane < L; lane++) {
        const int64_t t = static_cast<int64_t>(theirs[lane]), p = t == C ? C : static_cast<int64_t>(mine[lane]);
        const int bank = lane & 1;
        predicted[bank][p]++, actual[bank][t]++, both[bank][p == t ? t : C]++, count += t != C;
      }
    }
  }

  void planes(int64_t image, int64_t at, int64_t n, int64_t padded) {
    const vec threshold = S::all(static_cast<R>(call.threshold)), ignored = S::all(static_cast<R>(call.ignored)), unit = S::all(1);
    for (int64_t c = 0; c < C; c++) {
      read(call.predicted, image, c, at, row, n);
      read(call.target, image, c, at, label, n);
      // Padding that is neither predicted nor labelled.
      for (int64_t j = n; j < padded; j++) row[j] = static_cast<R>(call.threshold), label[j] = 0;
      mask overlap = {}, found = {}, labelled = {}, left_out = {}, bad = {};
      for (int64_t j = 0; j < padded; j += L) {
        const vec theirs = S::load(label + j);
        mask valid = theirs == theirs;
        if (call.has_ignored) valid = !(theirs == ignored);
        const mask above = S::load(row + j) > threshold, there = theirs == unit;
        bad |= valid & !((theirs >= R(-1e-5)) & (theirs <= R(1 + 1e-5)));
        if (!call.has_ignored) bad |= !(theirs == theirs);
        found += above & valid, labelled += there & valid, overlap += above & there & valid, left_out += !valid;
      }
      if (any(bad)) invalid |= BAD_LABEL;
      both[0][c] += lanes(overlap), predicted[0][c] += lanes(found), actual[0][c] += lanes(labelled);
      // Padding has label 0; if that is the ignored label, it must not reduce the count.
      plane_count[c] += n - lanes(left_out) + (call.has_ignored && call.ignored == 0 ? padded - n : 0);
    }
  }

  static int64_t lanes(mask negative) {  // true is -1
    int64_t total = 0;
    for (int lane = 0; lane < L; lane++) total -= negative[lane];
    return total;
  }

  void run(int64_t image, int64_t at, int64_t n) {
    const int64_t padded = (n + L - 1) / L * L;
    if (call.mode == PLANES) return planes(image, at, n, padded);
    labels(image, at, n, padded);
    call.mode == LOGITS ? greatest(image, at, n, padded) : ids(image, at, n, padded);
    tally(padded);
  }
};

template <class R> void run(CountCall &call) {
  const int64_t C = call.classes;
  // Longer units if the partial counts, 8 bytes each, would take much memory.
  int64_t length = UNIT;
  while (length < call.pixels && (call.pixels + length - 1) / length * call.images * 4 * C > (1 << 22)) length *= 2;
  const int64_t per_image = (call.pixels + length - 1) / length, units = per_image * call.images;
  std::vector<int64_t> parts(units * 4 * C);
  std::atomic<int32_t> invalid{0};
  const bool done = in_parallel(units, call.threads, call.region, [&](int64_t unit) {
    Counter<R> counter(call);
    const int64_t first = unit % per_image * length, end = std::min(first + length, call.pixels);
    for (int64_t at = first; at < end; at += RUN) counter.run(unit / per_image, at, std::min(RUN, end - at));
    int64_t *to = &parts[unit * 4 * C];
    for (int64_t c = 0; c < C; c++) {
      to[c] = counter.both[0][c] + counter.both[1][c];
      to[C + c] = counter.predicted[0][c] + counter.predicted[1][c];
      to[2 * C + c] = counter.actual[0][c] + counter.actual[1][c];
      to[3 * C + c] = call.mode == PLANES ? counter.plane_count[c] : counter.count;
    }
    if (counter.invalid) invalid |= counter.invalid;
  });
  call.invalid = done ? invalid.load() : NO_MEMORY;
  if (!done) return;
  for (int64_t row = 0; row < 4; row++)
    for (int64_t image = 0; image < call.images; image++) {
      int64_t *to = call.counts + (row * call.images + image) * C;
      std::memset(to, 0, C * sizeof(int64_t));
      for (int64_t unit = image * per_image; unit < (image + 1) * per_image; unit++)
        for (int64_t c = 0; c < C; c++) to[c] += parts[(unit * 4 + row) * C + c];
    }
}

}  // namespace

extern "C" {
void lightning_dice_count(CountCall *call) {
  guarded(call, [&] { call->predicted.type == F64 ? run<double>(*call) : run<float>(*call); });
}
int64_t lightning_dice_count_call_size() { return sizeof(CountCall); }
}
