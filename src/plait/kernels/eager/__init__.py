"""Fast paths in plain PyTorch with backward passes written by hand: few large products, few passes over memory."""
