"""Video on disk (or rendered) to batches: sources, sampling, transforms, pipeline."""
