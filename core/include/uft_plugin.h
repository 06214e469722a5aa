// A plugin for uft in C, or in any language that can export a C function: docs/plugins.md.
//
// Generated from core/src/c; a test compares the two.

#ifndef UFT_PLUGIN_H
#define UFT_PLUGIN_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

// The revision of this interface; `UftPlugin.revision`.
#define UFT_C_REVISION 1

// A response to imitate; its value is 1.
#define UFT_DEMONSTRATION 0

// A response with a score from 0 to 1.
#define UFT_SCORE 1

// A response with thumbs up (1) or down (0).
#define UFT_BINARY 2

// The better response of a pair; its value is the margin, 0 if none is known.
#define UFT_CHOSEN 3

// The worse response of a pair; its value is the margin.
#define UFT_REJECTED 4

// `UftObjective.accepts` is a sum of bits, one for each kind of feedback.
#define UFT_ACCEPTS_DEMONSTRATION 1

// UFT_SCORE.
#define UFT_ACCEPTS_SCORE 2

// UFT_BINARY.
#define UFT_ACCEPTS_BINARY 4

// UFT_CHOSEN.
#define UFT_ACCEPTS_CHOSEN 8

// UFT_REJECTED.
#define UFT_ACCEPTS_REJECTED 16

// Chosen and rejected.
#define UFT_ACCEPTS_PAIR 24

// `UftObjective.needs` is a sum of bits, too. This one: log-probs of the reference, in `UftBatch.ref_logps`.
#define UFT_NEEDS_REFERENCE 1

// Every group has a chosen and a rejected response.
#define UFT_NEEDS_PAIRS 2

// Every group has two responses or more.
#define UFT_NEEDS_GROUPS 4

// `UftStep.mismatched`; implies the reference.
#define UFT_NEEDS_MISMATCHED 8

// `UftStep.log_ratios`; implies the reference.
#define UFT_NEEDS_STEP_LOG_RATIOS 16

// The loss depends on how many tokens a response has.
#define UFT_NEEDS_TOKEN_COUNTS 32

// Single tokens matter, not only their sum.
#define UFT_NEEDS_TOKEN_LOGPS 64

// `save_state` goes into checkpoints.
#define UFT_NEEDS_STATE 128

// `UftStep.responses`; implies `UFT_NEEDS_STEP_LOG_RATIOS`.
#define UFT_NEEDS_STEP_RESPONSES 256

// `UftParam.kind`: any finite number.
#define UFT_NUMBER 0

// A number above 0.
#define UFT_POSITIVE 1

// A number that is not negative.
#define UFT_NOT_NEGATIVE 2

// A number from `low` to `high`, both included.
#define UFT_WITHIN 3

// true or false; the number is 1 or 0.
#define UFT_FLAG 4

// One of the words in `words`; the number is its place among them, from 0.
#define UFT_CHOICE 5

// A text.
#define UFT_TEXT 6

// A parameter of the configuration: the host reads it, refuses what it cannot be, and gives its
// value to `create`. Texts are UTF-8 and end with a zero byte, here and everywhere.
typedef struct UftParam {
  // The key in the configuration.
  const char *name;
  // What it does, in one line.
  const char *about;
  // UFT_NUMBER, UFT_POSITIVE, ...
  uint32_t kind;
  // The default of a number; of a flag 1 or 0.
  double number;
  // The default of a text, or of a choice one of its words.
  const char *text;
  // The words of a choice, with `|` between them: "mse|bce".
  const char *words;
  // The least number of UFT_WITHIN.
  double low;
  // The largest number of UFT_WITHIN.
  double high;
} UftParam;

// The value of a parameter.
typedef struct UftValue {
  // Of a number, a flag or a choice; otherwise 0.
  double number;
  // Of a text or a choice; otherwise NULL.
  const char *text;
} UftValue;

// Why something cannot be done. The host gives it empty; whoever fails writes one line into it.
typedef struct UftFault {
  // sizeof(UftFault) of the host.
  uint32_t size;
  // In UTF-8, with a zero byte at its end.
  char message[508];
} UftFault;

// A response of the step, whatever batch it is in.
typedef struct UftResponse {
  // `UftSegment.group`.
  uint32_t group;
  // `UftSegment.kind`.
  uint32_t kind;
  // log pi(y|x) in nats.
  double logp;
  // log pi(y|x) - log pi_ref(y|x) in nats.
  double log_ratio;
} UftResponse;

// Totals of one objective over the whole optimizer step. A step is evaluated in one or more
// batches; divide by these and never by what is in a batch, so that the gradient does not depend on
// how a step is split.
typedef struct UftStep {
  // sizeof(UftStep) of the host.
  uint32_t size;
  // 0 in evaluation and in checks: state must not change.
  uint32_t training;
  // Optimizer step, from 0.
  uint64_t number;
  // Optimizer steps planned in all.
  uint64_t steps;
  // Prompts with their responses.
  uint64_t groups;
  // Responses.
  uint64_t segments;
  // Pairs of a chosen and a rejected response of the same group.
  uint64_t pairs;
  // Trained tokens.
  uint64_t tokens;
  // Responses of each kind, in the order of the kinds.
  uint64_t by_kind[5];
  // log pi - log pi_ref of every response of the step, in nats, `segments` of them; NULL without
  // UFT_NEEDS_STEP_LOG_RATIOS.
  const double *log_ratios;
  // log pi - log pi_ref of every response's prompt with a completion of the group before it,
  // `segments` of them; NULL without UFT_NEEDS_MISMATCHED.
  const double *mismatched;
  // Every response of the step, `segments` of them; NULL without UFT_NEEDS_STEP_RESPONSES.
  const struct UftResponse *responses;
} UftStep;

// A response of a batch: a range of trained tokens with the feedback that it got.
typedef struct UftSegment {
  // Equal for the responses to one prompt.
  uint32_t group;
  // Its place among the responses of the step, the index into `UftStep.log_ratios`.
  uint32_t in_step;
  // Its first token in `UftBatch.logps`.
  uint32_t start;
  // Number of its tokens, at least 1.
  uint32_t tokens;
  // UFT_DEMONSTRATION, UFT_SCORE, ...
  uint32_t kind;
  // What was said of it; see its kind.
  float value;
} UftSegment;

// The part of a step that one call of `evaluate` sees. Groups are never split between batches, and
// the responses of a group are neighbours.
typedef struct UftBatch {
  // sizeof(UftBatch) of the host.
  uint32_t size;
  // Number of `segments`.
  uint32_t segment_count;
  // The step that the batch is a part of.
  const struct UftStep *step;
  // The responses.
  const struct UftSegment *segments;
  // Log-probs of the policy for every trained token, response after response, in nats.
  const float *logps;
  // The same of the reference; NULL without UFT_NEEDS_REFERENCE.
  const float *ref_logps;
  // Number of trained tokens: of `logps`, of `ref_logps` and of `UftEvaluation.dlogp`.
  uint64_t tokens;
} UftBatch;

// A named number, averaged by the host over batches as sum / count.
typedef struct UftMetric {
  // As it appears in metrics.jsonl.
  char name[64];
  // Sum of the observations.
  double sum;
  // Number of the observations.
  double count;
} UftMetric;

// What an evaluation gives. Everything is in the host's memory, and NaN until it is written.
typedef struct UftEvaluation {
  // sizeof(UftEvaluation) of the host.
  uint32_t size;
  // How many metrics were written.
  uint32_t metric_count;
  // How many there is room for.
  uint32_t metric_capacity;
  // The batch's share of the step's loss.
  double loss;
  // d loss / d logp of every token, in the order of `UftBatch.logps`. All have to be written.
  float *dlogp;
  // `uft_metric` writes them.
  struct UftMetric *metrics;
} UftEvaluation;

// An objective: what it is called, what it asks for, and its functions. Those that give an int give
// 0, or anything else after writing `fault`. `evaluate` may be called by several threads at once,
// the others are not. None of them may unwind (C++ exceptions) or jump out.
typedef struct UftObjective {
  // sizeof(UftObjective) of the library.
  uint32_t size;
  // Number of `params`.
  uint32_t param_count;
  // The name in the configuration: objective = { plugin = "..." }.
  const char *name;
  // One line: the formula and, in parentheses, where it is from.
  const char *about;
  // UFT_NEEDS_... that the host has to prepare.
  uint64_t needs;
  // UFT_ACCEPTS_... that it is defined for.
  uint64_t accepts;
  // NULL if there are none.
  const struct UftParam *params;
  // Makes an objective; NULL after writing `fault`. `values` are those of `params`, in the same
  // order, and are there during the call only.
  void *(*create)(const struct UftValue *values, struct UftFault *fault);
  // Frees what `create` made; may be NULL.
  void (*destroy)(void *objective);
  // Called once before the batches of a step: the place to update state; may be NULL.
  int32_t (*begin_step)(void *objective, const struct UftStep *step, struct UftFault *fault);
  // Writes loss and gradient of a batch. The same batch gives the same result.
  int32_t (*evaluate)(const void *objective,
                      const struct UftBatch *batch,
                      struct UftEvaluation *out,
                      struct UftFault *fault);
  // Writes the state if it fits into `capacity` bytes, and gives its length in any case: it is
  // asked for the length first. Needed with UFT_NEEDS_STATE, otherwise NULL.
  uint64_t (*save_state)(const void *objective, void *bytes, uint64_t capacity);
  // Takes back what `save_state` wrote. Needed with UFT_NEEDS_STATE, otherwise NULL.
  int32_t (*load_state)(void *objective, const void *bytes, uint64_t length, struct UftFault *fault);
} UftObjective;

// What a library has. It stays as it is and where it is for the life of the process, with
// everything that it points to.
typedef struct UftPlugin {
  // UFT_C_REVISION.
  uint32_t revision;
  // sizeof(UftPlugin) of the library.
  uint32_t size;
  // Pointers to the objectives.
  const struct UftObjective *const *objectives;
  // How many they are.
  uint64_t objective_count;
} UftPlugin;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The one symbol that a library exports.
extern const struct UftPlugin *uft_c_plugin(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

// What most objectives do. Nothing of it is needed.

// log pi(y|x) or log pi_ref(y|x) of a response: the sum over its tokens of `logps` or `ref_logps`.
static inline double uft_sum(const float *logps, const UftSegment *s) {
  double sum = 0;
  for (uint32_t t = 0; t < s->tokens; t++) sum += logps[s->start + t];
  return sum;
}

// log pi(y|x) - log pi_ref(y|x) of a response.
static inline double uft_log_ratio(const UftBatch *batch, const UftSegment *s) {
  return uft_sum(batch->logps, s) - uft_sum(batch->ref_logps, s);
}

// Sets d loss / d log pi(y|x) of a response: the same number for each of its tokens.
static inline void uft_gradient(UftEvaluation *out, const UftSegment *s, double dlogp) {
  for (uint32_t t = 0; t < s->tokens; t++) out->dlogp[s->start + t] = (float)dlogp;
}

// The responses to a prompt are neighbours: those to the prompt of response `first` end before this one.
static inline uint32_t uft_group_end(const UftBatch *batch, uint32_t first) {
  uint32_t end = first;
  while (end < batch->segment_count && batch->segments[end].group == batch->segments[first].group) end++;
  return end;
}

// Adds an observation to the mean of a metric. Beyond the capacity the count alone grows, which the
// host refuses.
static inline void uft_metric(UftEvaluation *out, const char *name, double value) {
  uint32_t i = 0, room = out->metric_capacity;
  while (i < out->metric_count && i < room && strcmp(out->metrics[i].name, name) != 0) i++;
  if (i < out->metric_count && i < room) {
    out->metrics[i].sum += value;
    out->metrics[i].count += 1;
    return;
  }
  if (i < room) {
    snprintf(out->metrics[i].name, sizeof out->metrics[i].name, "%s", name);
    out->metrics[i].sum = value;
    out->metrics[i].count = 1;
  }
  out->metric_count++;
}

#endif // UFT_PLUGIN_H
