"""Everything MLflow: a run's log on disk and its upload, lookups of runs and models, the logged model."""
