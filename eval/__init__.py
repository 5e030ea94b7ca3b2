"""Evaluation: models and tasks in, scores with intervals and a report out. Reads artefacts only."""
