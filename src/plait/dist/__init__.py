"""Many devices, recompute, compilation and the state that a run resumes from; the model never knows."""
