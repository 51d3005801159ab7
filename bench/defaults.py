"""Default budgets of a comparison."""

BUDGETS = {"nano": 2_000_000, "small": 5_000_000, "base": 20_000_000}  # training tokens of a run, by model size
SEEDS = 5
