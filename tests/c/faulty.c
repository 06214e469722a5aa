// An objective in C with a fault to choose, or with a table that is wrong: that of the number in the
// environment's UFT_TABLE. Without a fault it is -log pi(y|x), the mean over responses, with a state that
// counts steps.

#include "uft_plugin.h"
#include <stdlib.h>

enum fault {
  NONE, CREATE_NULL, CREATE_SAYS, STEP_SAYS, BATCH_SAYS, NO_WORD, ENDLESS_MESSAGE, LONG_MESSAGE, NOT_UTF8,
  UNWRITTEN_LOSS, NAN_LOSS, UNWRITTEN_GRADIENT, BEYOND_GRADIENT, BEFORE_GRADIENT, MANY_METRICS, NO_NAME,
  ENDLESS_NAME, NAME_NOT_UTF8, UNWRITTEN_METRIC, BEYOND_METRICS, LONG_STATE, GROWING_STATE, BEYOND_STATE,
};

static UftParam params[] = {
  {.name = "fault", .about = "what goes wrong", .kind = UFT_CHOICE, .text = "none",
   .words = "none|create gives NULL|create says why|refuses the step|refuses the batch|without a word|"
            "endless message|long message|message not UTF-8|unwritten loss|NaN loss|unwritten gradient|"
            "beyond its gradient|before its gradient|many metrics|metric without a name|endless name|"
            "name not UTF-8|unwritten metric|beyond its metrics|long state|growing state|beyond its state"},
  {.name = "scale", .about = "factor of the loss", .kind = UFT_POSITIVE, .number = 1, .low = 2, .high = 3},
  {.name = "note", .about = "a text", .kind = UFT_TEXT, .text = "nothing"},
  {.name = "halve", .about = "half of the loss", .kind = UFT_FLAG},
};

typedef struct { enum fault fault; double scale; uint64_t steps; } Faulty;

static void *create(const UftValue *values, UftFault *fault) {
  enum fault chosen = (enum fault)values[0].number;
  if (chosen == CREATE_NULL) return NULL;
  if (chosen == CREATE_SAYS) {
    snprintf(fault->message, sizeof fault->message, "`%s` is no\nreason", values[2].text);
    return NULL;
  }
  Faulty *made = malloc(sizeof *made);
  if (made) *made = (Faulty){chosen, values[1].number * (values[3].number == 1 ? 0.5 : 1), 0};
  return made;
}

static int32_t begin_step(void *objective, const UftStep *step, UftFault *fault) {
  Faulty *own = objective;
  if (own->fault == STEP_SAYS) {
    snprintf(fault->message, sizeof fault->message, "a step of %u is too small", (unsigned)step->segments);
    return 1;
  }
  if (step->training) own->steps++;
  return 0;
}

static int32_t evaluate(const void *objective, const UftBatch *batch, UftEvaluation *out, UftFault *fault) {
  const Faulty *own = objective;
  double loss = 0, n = (double)batch->step->segments;
  for (uint32_t i = 0; i < batch->segment_count; i++) {
    loss -= own->scale * uft_sum(batch->logps, &batch->segments[i]) / n;
    if (own->fault != UNWRITTEN_GRADIENT) uft_gradient(out, &batch->segments[i], -own->scale / n);
  }
  if (own->fault != UNWRITTEN_LOSS) out->loss = loss;
  uft_metric(out, "steps", (double)own->steps);
  UftMetric *metric = &out->metrics[0];
  switch (own->fault) {
    case BATCH_SAYS: snprintf(fault->message, sizeof fault->message, "no token is long enough"); return 7;
    case NO_WORD: return -1;
    case ENDLESS_MESSAGE: memset(fault->message, 'x', sizeof fault->message); return 1;
    case LONG_MESSAGE: memset(fault->message, 'x', sizeof fault->message + 5); return 1;
    case NOT_UTF8: strcpy(fault->message, "too \xff small"); return 1;
    case NAN_LOSS: out->loss = loss / (loss - loss) - loss / (loss - loss); break;
    case BEYOND_GRADIENT: out->dlogp[batch->tokens] = 0; break;
    case BEFORE_GRADIENT: out->dlogp[-1] = 0; break;
    case MANY_METRICS:
      for (int i = 0; i < 100; i++) {
        char name[16];
        snprintf(name, sizeof name, "metric %d", i);
        uft_metric(out, name, i);
      }
      break;
    case NO_NAME: metric->name[0] = 0; break;
    case ENDLESS_NAME: memset(metric->name, 'x', sizeof metric->name); break;
    case NAME_NOT_UTF8: metric->name[0] = '\xff'; break;
    case UNWRITTEN_METRIC: out->metric_count++; strcpy(out->metrics[1].name, "lost"); break;
    case BEYOND_METRICS: out->metrics[out->metric_capacity].sum = 0; break;
    default: break;
  }
  return 0;
}

static uint64_t save_state(const void *objective, void *bytes, uint64_t capacity) {
  const Faulty *own = objective;
  uint64_t length = sizeof own->steps;
  if (own->fault == LONG_STATE) return (uint64_t)1 << 40;
  if (capacity < length) return length;
  memcpy(bytes, &own->steps, length);
  if (own->fault == BEYOND_STATE) ((char *)bytes)[length] = 0;
  return own->fault == GROWING_STATE ? length + 1 : length;
}

static int32_t load_state(void *objective, const void *bytes, uint64_t length, UftFault *fault) {
  Faulty *own = objective;
  if (length != sizeof own->steps) {
    snprintf(fault->message, sizeof fault->message, "the state of `c-faulty` is 8 bytes long");
    return 1;
  }
  memcpy(&own->steps, bytes, length);
  return 0;
}

static UftObjective faulty = {
  .size = sizeof(UftObjective),
  .name = "c-faulty",
  .about = "-log pi(y|x), with a fault",
  .needs = UFT_NEEDS_STATE,
  .accepts = UFT_ACCEPTS_DEMONSTRATION | UFT_ACCEPTS_SCORE,
  .params = params,
  .param_count = sizeof params / sizeof *params,
  .create = create,
  .destroy = free,
  .begin_step = begin_step,
  .evaluate = evaluate,
  .save_state = save_state,
  .load_state = load_state,
};

static const UftObjective *objectives[] = {&faulty, &faulty};
static UftPlugin plugin = {UFT_C_REVISION, sizeof(UftPlugin), objectives, 1};

const UftPlugin *uft_c_plugin(void) {
  const char *table = getenv("UFT_TABLE");
  switch (table ? atoi(table) : 0) {
    case 1: params[0].name = NULL; break;
    case 2: params[0].kind = 99; break;
    case 3: params[0].text = "no such"; break;
    case 4: params[1].name = "fault"; break;
    case 5: params[1].kind = UFT_WITHIN; break;
    case 6: params[3].number = 2; break;
    case 7: faulty.size = 64; break;
    case 8: faulty.name = NULL; break;
    case 9: faulty.name = "\xff"; break;
    case 10: faulty.about = " "; break;
    case 11: faulty.needs = 0; break;
    case 12: faulty.params = NULL; break;
    case 13: faulty.param_count = 5000; break;
    case 14: faulty.evaluate = NULL; break;
    case 15: objectives[0] = NULL; break;
    case 16: plugin.revision = 2; break;
    case 17: plugin.size = 8; break;
    case 18: plugin.objectives = NULL; break;
    case 19: plugin.objective_count = 0; break;
    case 20: return NULL;
    case 21: faulty.needs |= (uint64_t)1 << 40; break;
    case 22: faulty.accepts = 0; break;
    case 23: plugin.objective_count = 2; break;
    default: break;
  }
  return &plugin;
}
