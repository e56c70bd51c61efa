"""Speed without meaning: kernels that plait.ops dispatches to, imported only inside its functions."""
