// my-plugin: what it is for, and the paper that it is from. Build it with
//
//     cc -std=c99 -Wall -Wextra -O2 -shared -fPIC -o path/of/the/library my_plugin.c -lm
//
// L = mean over responses of (sigmoid(r) - s)^2 with the implicit reward
// r = beta * (log pi(y|x) - log pi_ref(y|x)) and the feedback's value s: replace it by your own.

#include "uft_plugin.h"
#include <math.h>
#include <stdlib.h>

typedef struct {
  double beta;
} MyPlugin;

// What can be set in the configuration, in the order in which `create` gets it.
static const UftParam PARAMS[] = {
  {.name = "beta", .about = "scale of the implicit reward", .kind = UFT_POSITIVE, .number = 0.1},
};

static void *create(const UftValue *values, UftFault *fault) {
  MyPlugin *own = malloc(sizeof *own);
  if (own == NULL) {
    snprintf(fault->message, sizeof fault->message, "out of memory");
    return NULL;
  }
  own->beta = values[0].number;
  return own;
}

// Finite for every x.
static double sigmoid(double x) { return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x)); }

// Loss and gradient. Totals are the whole step's (`batch->step`): this batch may be a part of it.
static int32_t evaluate(const void *objective, const UftBatch *batch, UftEvaluation *out, UftFault *fault) {
  const MyPlugin *own = objective;
  double loss = 0, n = (double)batch->step->segments;
  (void)fault; // nothing here can fail
  for (uint32_t i = 0; i < batch->segment_count; i++) {
    const UftSegment *response = &batch->segments[i];
    double reward = own->beta * uft_log_ratio(batch, response);
    double p = sigmoid(reward), error = p - response->value;
    loss += error * error / n;
    uft_gradient(out, response, 2 * error * p * (1 - p) * own->beta / n);
    uft_metric(out, response->value > 0.5 ? "rewards/chosen" : "rewards/rejected", reward);
  }
  out->loss = loss;
  return 0;
}

static const UftObjective OBJECTIVE = {
  .size = sizeof(UftObjective),
  .name = "my-plugin",
  .about = "(sigmoid(r) - s)^2, r = beta*log(pi/pi_ref)",
  .needs = UFT_NEEDS_REFERENCE,
  .accepts = UFT_ACCEPTS_DEMONSTRATION | UFT_ACCEPTS_SCORE | UFT_ACCEPTS_BINARY,
  .params = PARAMS,
  .param_count = sizeof PARAMS / sizeof *PARAMS,
  .create = create,
  .destroy = free,
  .evaluate = evaluate,
};

static const UftObjective *const OBJECTIVES[] = {&OBJECTIVE};

const UftPlugin *uft_c_plugin(void) {
  static const UftPlugin plugin = {UFT_C_REVISION, sizeof(UftPlugin), OBJECTIVES, 1};
  return &plugin;
}
