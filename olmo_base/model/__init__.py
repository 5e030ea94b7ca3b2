"""The OLMo models: shapes, forward pass, weights on disk, generation."""
