"""What a model can do: tasks, their examples, and grades that add up to a score."""
