"""Memory of a run, counted from the shapes of its tensors before anything is loaded."""
