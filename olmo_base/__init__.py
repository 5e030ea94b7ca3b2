"""Text and tensors: the OLMo models and their pretraining; knows nothing of chat."""
