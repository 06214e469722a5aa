"""What golden.json is made of, by tests/golden/make_objectives.py."""
from maker.expect import dpo


def expectations(others):
    smooth = dict(label_smoothing=0.2)
    yield dpo("aot", "aot", 0.3, smooth, **smooth)
    yield dpo("aot-unpaired", "aot_unpaired", 0.3, smooth, **smooth)
