"""Phase 4's recipe with a schedule that ends after 0.4M tokens, as phase 6's does at nano, for a comparison of branches."""

from dataclasses import replace

from phases import phase4

SHORT = replace(
    phase4.RECIPE, schedule=replace(phase4.RECIPE.schedule, warmup_tokens=20_000, total_tokens=400_000)
)
