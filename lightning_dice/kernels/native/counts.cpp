// Counts of hard predictions, in one pass and without a mask of them: pixels of each class in each image that are both
// predicted and labelled so, that are predicted, that are labelled, and all that count.
#include "common.h"

#include <algorithm>

namespace {

enum Mode : int32_t { LOGITS, IDS, PLANES };

enum Wrong : int32_t { BAD_LABEL = 1, BAD_PREDICTION = 2 };

struct Count {
  int64_t images, classes, pixels;
  View predicted, target;  // logits (LOGITS, PLANES) or ids; ids or planes
  int32_t mode, has_ignored, threads;
  int32_t wrong;           // out
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

  const Count &job;
  const int64_t C;
  int32_t wrong = 0;
  R *row, *best, *arg, *label;
  // A bin for each class and one for what is of none, in two banks: neighbours of one class need not wait for each other.
  int64_t *both[2], *predicted[2], *actual[2];
  int64_t count = 0;
  int64_t *plane_count;

  explicit Counter(const Count &job) : job(job), C(job.classes) {
    const size_t bins = (C + 1) * sizeof(int64_t);
    scratch.reserve(4 * RUN * sizeof(R) + 7 * (bins + 64) + 4 * 64);
    for (R **line : {&row, &best, &arg, &label}) *line = scratch.take<R>(RUN);
    for (int64_t **bank : {&both[0], &both[1], &predicted[0], &predicted[1], &actual[0], &actual[1], &plane_count}) {
      *bank = scratch.take<int64_t>(C + 1);
      std::memset(*bank, 0, bins);
    }
  }

  // Ids of a run, with C for those that are ignored or none.
  void labels(int64_t image, int64_t at, int64_t n, int64_t padded) {
    read(job.target, image, 0, at, label, n);
    for (int64_t j = n; j < padded; j++) label[j] = static_cast<R>(C);
    const R end = static_cast<R>(C), ignored = static_cast<R>(job.ignored);
    mask special = {};
    for (int64_t j = 0; j < n / L * L; j += L) {
      const vec value = S::load(label + j);
      special |= !((value >= 0) & (value < end));
      if (job.has_ignored) special |= value == ignored;
    }
    for (int64_t j = any(special) ? 0 : n / L * L; j < n; j++) {
      if (job.has_ignored && label[j] == ignored) label[j] = end;
      else if (!(label[j] >= 0 && label[j] < end)) wrong |= BAD_LABEL, label[j] = end;
    }
  }

  // The class of the greatest logit, the first of several; none where one is NaN.
  void greatest(int64_t image, int64_t at, int64_t n, int64_t padded) {
    const bool direct = job.predicted.type == (sizeof(R) == 4 ? F32 : F64) && job.predicted.pixel == 1 && n == padded;
    for (int64_t c = 0; c < C; c++) {
      const R *line = row;
      if (direct) line = static_cast<const R *>(job.predicted.data) + image * job.predicted.image + c * job.predicted.cls + at;
      else {
        read(job.predicted, image, c, at, row, n);
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
    read(job.predicted, image, 0, at, arg, n);
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
        if (label[j] < end) wrong |= BAD_PREDICTION;
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
    const vec threshold = S::all(static_cast<R>(job.threshold)), ignored = S::all(static_cast<R>(job.ignored)), unit = S::all(1);
    for (int64_t c = 0; c < C; c++) {
      read(job.predicted, image, c, at, row, n);
      read(job.target, image, c, at, label, n);
      // A padding that is neither predicted nor labelled, and not counted.
      for (int64_t j = n; j < padded; j++) row[j] = static_cast<R>(job.threshold), label[j] = 0;
      mask overlap = {}, found = {}, labelled = {}, left_out = {}, bad = {};
      for (int64_t j = 0; j < padded; j += L) {
        const vec theirs = S::load(label + j);
        mask valid = theirs == theirs;
        if (job.has_ignored) valid = !(theirs == ignored);
        const mask above = S::load(row + j) > threshold, there = theirs == unit;
        bad |= valid & !((theirs >= R(-1e-5)) & (theirs <= R(1 + 1e-5)));
        if (!job.has_ignored) bad |= !(theirs == theirs);
        found += above & valid, labelled += there & valid, overlap += above & there & valid, left_out += !valid;
      }
      if (any(bad)) wrong |= BAD_LABEL;
      both[0][c] += lanes(overlap), predicted[0][c] += lanes(found), actual[0][c] += lanes(labelled);
      // The padding of label 0 is no pixel that was left out.
      plane_count[c] += n - lanes(left_out) + (job.has_ignored && job.ignored == 0 ? padded - n : 0);
    }
  }

  static int64_t lanes(mask negative) {  // true is -1
    int64_t total = 0;
    for (int lane = 0; lane < L; lane++) total -= negative[lane];
    return total;
  }

  void run(int64_t image, int64_t at, int64_t n) {
    const int64_t padded = (n + L - 1) / L * L;
    if (job.mode == PLANES) return planes(image, at, n, padded);
    labels(image, at, n, padded);
    job.mode == LOGITS ? greatest(image, at, n, padded) : ids(image, at, n, padded);
    tally(padded);
  }
};

template <class R> void run(Count &job) {
  const int64_t C = job.classes;
  // Partial counts of all units, 8 bytes each, should not be the larger part of the memory.
  int64_t length = UNIT;
  while (length < job.pixels && (job.pixels + length - 1) / length * job.images * 4 * C > (1 << 22)) length *= 2;
  const int64_t per_image = (job.pixels + length - 1) / length, units = per_image * job.images;
  std::vector<int64_t> parts(units * 4 * C);
  std::atomic<int32_t> wrong{0};
  const bool done = in_parallel(units, job.threads, job.region, [&](int64_t unit) {
    Counter<R> counter(job);
    const int64_t first = unit % per_image * length, end = std::min(first + length, job.pixels);
    for (int64_t at = first; at < end; at += RUN) counter.run(unit / per_image, at, std::min(RUN, end - at));
    int64_t *to = &parts[unit * 4 * C];
    for (int64_t c = 0; c < C; c++) {
      to[c] = counter.both[0][c] + counter.both[1][c];
      to[C + c] = counter.predicted[0][c] + counter.predicted[1][c];
      to[2 * C + c] = counter.actual[0][c] + counter.actual[1][c];
      to[3 * C + c] = job.mode == PLANES ? counter.plane_count[c] : counter.count;
    }
    if (counter.wrong) wrong |= counter.wrong;
  });
  job.wrong = done ? wrong.load() : NO_MEMORY;
  if (!done) return;
  for (int64_t row = 0; row < 4; row++)
    for (int64_t image = 0; image < job.images; image++) {
      int64_t *to = job.counts + (row * job.images + image) * C;
      std::memset(to, 0, C * sizeof(int64_t));
      for (int64_t unit = image * per_image; unit < (image + 1) * per_image; unit++)
        for (int64_t c = 0; c < C; c++) to[c] += parts[(unit * 4 + row) * C + c];
    }
}

}  // namespace

extern "C" {
void lightning_dice_count(Count *job) {
  guarded(job, [&] { job->predicted.type == F64 ? run<double>(*job) : run<float>(*job); });
}
int64_t lightning_dice_count_size() { return sizeof(Count); }
}
