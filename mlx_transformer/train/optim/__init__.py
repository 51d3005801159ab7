"""Optimizers, schedules and clipping: what mlx.optimizers lacks or does differently."""
