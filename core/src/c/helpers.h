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
