"""One training loop for any objective: batches in, weights and measurements out."""
