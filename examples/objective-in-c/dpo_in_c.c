// DPO (arXiv 2305.18290, eq. 7): the mean over pairs of -log sigmoid(z), z = beta * (d_w - d_l), where
// d = log pi(y|x) - log pi_ref(y|x) of the chosen (w) and the rejected (l) response. Here, in C:
//
//     cc -O2 -shared -fPIC -I../../core/include -o libdpo_in_c.so dpo_in_c.c -lm

#include "uft_plugin.h"
#include <math.h>
#include <stdlib.h>

typedef struct { double beta; } Dpo;

static const UftParam PARAMS[] = {
  {.name = "beta", .about = "scale of the implicit reward", .kind = UFT_POSITIVE, .number = 0.1},
};

static void *create(const UftValue *values, UftFault *fault) {
  Dpo *dpo = malloc(sizeof *dpo);
  if (dpo) dpo->beta = values[0].number;
  else snprintf(fault->message, sizeof fault->message, "out of memory");
  return dpo;
}

// log(1 + exp(x)), finite for every x.
static double softplus(double x) { return fmax(x, 0) + log1p(exp(-fabs(x))); }

static int32_t evaluate(const void *objective, const UftBatch *batch, UftEvaluation *out, UftFault *fault) {
  const Dpo *dpo = objective;
  const UftSegment *s = batch->segments;
  double loss = 0, pairs = (double)batch->step->pairs; // of the whole step: the batch may be a part of it
  (void)fault;
  for (uint32_t first = 0, end; first < batch->segment_count; first = end) {
    end = uft_group_end(batch, first);
    for (uint32_t i = first; i < end; i++) {
      double slope = 0; // of all pairs that response i is in
      for (uint32_t j = first; j < end; j++) {
        if (s[i].kind == s[j].kind) continue;
        double sign = s[i].kind == UFT_CHOSEN ? 1 : -1;
        double z = sign * dpo->beta * (uft_log_ratio(batch, &s[i]) - uft_log_ratio(batch, &s[j]));
        slope -= sign * dpo->beta * exp(-softplus(z)); // sigmoid(-z)
        if (sign < 0) continue; // every pair's loss once
        loss += softplus(-z);
        uft_metric(out, "rewards/margins", z);
        uft_metric(out, "rewards/accuracies", z == 0 ? 0.5 : z > 0);
      }
      uft_gradient(out, &s[i], slope / pairs);
    }
  }
  out->loss = loss / pairs;
  return 0;
}

static const UftObjective DPO = {
  .size = sizeof(UftObjective),
  .name = "dpo-in-c",
  .about = "-log sigmoid(beta*(d_w - d_l)), d = log(pi/pi_ref) (DPO, arXiv 2305.18290, eq. 7)",
  .needs = UFT_NEEDS_REFERENCE | UFT_NEEDS_PAIRS,
  .accepts = UFT_ACCEPTS_PAIR,
  .params = PARAMS,
  .param_count = sizeof PARAMS / sizeof *PARAMS,
  .create = create,
  .destroy = free,
  .evaluate = evaluate,
};

static const UftObjective *const OBJECTIVES[] = {&DPO};

const UftPlugin *uft_c_plugin(void) {
  static const UftPlugin plugin = {UFT_C_REVISION, sizeof(UftPlugin), OBJECTIVES, 1};
  return &plugin;
}
