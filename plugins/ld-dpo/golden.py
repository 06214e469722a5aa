"""What golden.json is made of, by tests/golden/make_objectives.py."""
from maker.expect import dpo


def expectations(others):
    yield dpo("ld-dpo", "sigmoid", 0.3, dict(alpha=0.4), ld_alpha=0.4)
