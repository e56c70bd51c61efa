"""Smaller models from trained ones, to a budget: scores, search, cuts, distillation."""
