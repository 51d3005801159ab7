"""Compare variants: runs, measuring, statistics, tables, plots."""
